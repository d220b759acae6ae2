"""A storage unit: lends spans of its arenas to writers, pins blocks for readers, and takes back what nobody wants.

All decisions are `UnitSpace`'s; this is the shell that locks, parks and answers. A reservation that finds no space
is parked until some is freed or a new arena is there; arenas are made, and the fate of a dead writer's blocks is
asked for, in threads beside, so that no other request waits for either.

A unit with a `journal` survives the death of its process. What it lends, finds, pins and drops are facts, written to a
journal in its folder before anybody sees their effect. The next `UnitService` on the folder goes on with its arenas:

1. Built, it has its index again (`recovery`): spans and pins as they were, blocks whose heads are sound, free space. It
   serves readers of blocks of which no byte was ever given back. What the dead hold is released as ever; spans of
   living writers stay theirs, and blocks that they carved meanwhile are found. What clients gave back while nobody
   listened ends when they say what they still have (`reaping`).
2. `return_to` verifies checksums and asks the controller which blocks are in use and which of their rows were cleared
   (`returning`). Then readers of the other blocks, and writers, are served.

Block ids go on from where they were. A unit without its journal, or with one that is damaged or not whole, starts
empty: that is another `life`, to which the controller gives another number, and its files have new names, so that
handles and mappings of the life before meet nothing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from transfer_queue.errors import ConnectionLost, InvalidArgument, TransferQueueError, WrongType
from transfer_queue.journal import SnapshotWriter
from transfer_queue.messages import (
    ONE_WAY,
    AbortBlocks,
    Done,
    Fetch,
    FreeBlocks,
    GetUnitStats,
    Pin,
    Pinned,
    ReadBlock,
    Report,
    Reserve,
    Reserved,
    ReturnSpan,
    StillHeld,
    Unpin,
    Write,
)
from transfer_queue.storage.arena import DEFAULT_ARENA_BYTES, PAGE_BYTES, Arenas, Spill, usual_capacity
from transfer_queue.storage.beside import Beside
from transfer_queue.storage.block import aligned
from transfer_queue.storage.facts import Asked, Fact, Known
from transfer_queue.storage.figures import figures, no_space, rss_bytes
from transfer_queue.storage.growth import Growth
from transfer_queue.storage.log import FactLog
from transfer_queue.storage.packing import pack, piece
from transfer_queue.storage.reaping import Reaper, Settle
from transfer_queue.storage.recovery import all_facts, rebuild
from transfer_queue.storage.returning import AskController, Returning
from transfer_queue.wire.ticket import Ticket

_REAP_S = 1.0
_HOST_BYTES = 128


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Reserve
    ticket: Ticket
    deadline: float


class UnitService:
    """Serves `UnitRequest` and `FreeBlocks`. Thread-safe; may serve before its `number` is known.

    capacity_bytes  of all arenas in memory together; None: half of what the file system of `folder` has free now
    spill_folder    on disk, for arenas when memory is full; None: there are none
    spill_bytes     of all arenas on disk together; None: half of what that file system has free now
    settle          given the blocks of dead writers, returns 0/1 for each: was it committed? None: keep them
    journal         keep facts in `folder`/journal, and go on with what an earlier process left there
    recovered       how many blocks of an earlier process are there; `lost_blocks` says which are not, and why
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity_bytes: int | None = None,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        spill_folder: Path | None = None,
        spill_bytes: int | None = None,
        settle: Settle | None = None,
        journal: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `CapacityExceeded` if there is no memory for the first arena or the journal."""
        if (capacity_bytes is not None and capacity_bytes < PAGE_BYTES) or arena_bytes < PAGE_BYTES:
            raise InvalidArgument(f"capacity_bytes and arena_bytes must be {PAGE_BYTES} or more")
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._unconfirmed: list[tuple[Pin | Fetch, Ticket]] = []  # about blocks that are not to be read yet
        self._reap_at = clock() + _REAP_S
        self._closed = False
        self._shortening = False  # a snapshot of the journal is being written
        self._log: FactLog | None = None
        known = Known()
        with contextlib.ExitStack() as half_made:
            if journal:
                self._log, known = FactLog.open(folder)
                half_made.callback(self._log.close, remove=not known.arenas)
            if capacity_bytes is None:
                capacity_bytes = usual_capacity(folder, known.arenas, on_disk=False)
            spill = None if spill_folder is None else Spill.of(spill_folder, spill_bytes, known.arenas)
            self._arenas = Arenas(folder, capacity_bytes, arena_bytes, spill)
            half_made.callback(self._leave_arenas, keep=bool(known.arenas))
            self._space, self.lost_blocks = rebuild(self._arenas, known)
            self.recovered = sum(len(span.blocks) for span in self._space.spans.values())
            self._beside = Beside(2, "tq-unit")
            half_made.callback(self._beside.close)
            self._reaper = Reaper(self._space, self._lock, self._beside, settle, self._serve)
            self._growth = Growth(self._arenas, self._lock, self._serve, clock)
            half_made.callback(self._growth.close)
            with self._lock:
                self._save()
            if not self._arenas.members:
                self._arenas.check_first()
                with self._lock:
                    self._growth.make_room(1)
            half_made.pop_all()

    def __repr__(self) -> str:
        return f"<UnitService {self.number}: {self._arenas!r}, {len(self._waiting)} waiting>"

    def __enter__(self) -> UnitService:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def number(self) -> int:
        """The number that the controller gave this unit, part of every block id. Until it is set (0), writers wait."""
        return self._space.number

    @number.setter
    def number(self, number: int) -> None:
        with self._lock:
            self._space.number = number
        self._serve()

    @property
    def life(self) -> str:
        """A name for what is stored here: a unit that comes back with another one has nothing of it."""
        return self._space.life

    @property
    def capacity_bytes(self) -> int:
        return self._arenas.capacity_bytes

    def return_to(self, number: int, reconcile: AskController) -> None:
        """Agree with the controller on what is stored, then serve everybody, under this number.

        To be called, in place of setting `number`, when the controller has numbered the unit; in a thread that may
        wait: checksums are verified first. `reconcile` is called once or twice, to ask the controller. If it raises, so
        does this, and it is to be called again: until then writers wait.
        """
        with self._lock:
            self._space.number = 0
        returning = Returning(self._space, self._lock, self._save, number)
        returning.reconcile(lambda question: self._reaper.agree(question, reconcile))
        self.lost_blocks.update(returning.lost)
        with self._lock:
            unconfirmed, self._unconfirmed = self._unconfirmed, []
        self.number = number
        for request, ticket in unconfirmed:
            self.submit(request, ticket)

    # ------------------------------------------------------------ the handler

    def submit(self, request: Any, ticket: Ticket) -> None:
        """Answer a request, now or when there is space; one-way messages are only carried out."""
        try:
            with self._lock:
                self._reaper.came(ticket.client_id)
                try:
                    reply = self._handle(request, ticket)
                    answers = self._serve_waiting() if isinstance(request, _FREEING) else []
                finally:
                    self._save()
        except TransferQueueError as error:
            reply, answers = error, []
        _answer_all(answers)
        if reply is not None and not isinstance(request, ONE_WAY):
            ticket.answer(reply)

    def tick(self) -> float | None:
        """Release what the dead hold, give up on reservations that are due; return seconds to the next turn."""
        now = self._clock()
        answers: list[tuple[Ticket, Reserved | TransferQueueError]] = []
        try:
            with self._lock:
                if self._closed:
                    return None
                expired = [one for one in self._waiting if one.deadline <= now]
                answers += [(one.ticket, no_space(self._space, one.request, self._growth.full)) for one in expired]
                self._waiting = [one for one in self._waiting if one.deadline > now]
                if now >= self._reap_at:
                    self._reap_at = now + _REAP_S
                    self._reaper.reap(now)
                answers += self._serve_waiting()
                self._save()
                return max(0.0, min([self._reap_at, *(one.deadline for one in self._waiting)]) - now)
        finally:  # who waits no more is told so, whatever failed
            _answer_all(answers)

    def lost(self, ticket: Ticket, reply: Any) -> None:
        """The reply (None: any) to this request has nobody to go to: undo what it granted."""
        with self._lock:
            self._take_back(ticket, reply)
        self._serve()

    def gone(self, client_id: str) -> None:
        """A client has no connection any more: what it held without having it mapped ends with the next `tick`."""
        with self._lock:
            self._reaper.gone(client_id)

    def holding(self) -> Collection[str]:
        return self._reaper.clients

    def close(self) -> None:
        """Answer who waits, stop the threads, remove arenas and journal. May be called twice."""
        self._end(keep=False)

    def abandon(self) -> None:
        """As `close`, but leave arenas and journal as they are, for the next unit on this folder."""
        self._end(keep=True)

    def _end(self, *, keep: bool) -> None:
        with self._lock:
            self._closed = True
            self._growth.stop()
            tickets = [*(one.ticket for one in self._waiting), *(ticket for _, ticket in self._unconfirmed)]
            self._waiting, self._unconfirmed = [], []
        error = ConnectionLost("the storage unit was closed while this request waited")
        _answer_all([(ticket, error) for ticket in tickets])
        self._beside.close()
        self._growth.close()
        with self._lock:
            self._leave_arenas(keep=keep)
            if self._log is not None:
                self._log.close(remove=not keep)
                self._log = None

    def _leave_arenas(self, *, keep: bool) -> None:
        if keep:
            self._arenas.members.clear()
        self._arenas.close()

    # ------------------------------------------------------------ requests

    def _handle(self, request: Any, ticket: Ticket) -> Any:
        """Return the reply; None if there is none, or not yet."""
        match request:
            case Reserve():
                return self._reserve(request, ticket)
            case Pin() | Fetch() if not self._space.unconfirmed.isdisjoint(request.blocks.tolist()):
                self._unconfirmed.append((request, ticket))
                return None
            case Pin():
                asked = self._asked(request, ticket)
                self._check_room(blocks=len(request.blocks))
                return self._space.pin(request.blocks, request.holder, asked)
            case Unpin():
                return self._space.unpin(request.pin, ticket.client_id)
            case ReturnSpan():
                return self._space.return_span(request.span, ticket.client_id)
            case Write():
                frames = (np.frombuffer(frame, np.uint8) for frame in request.frames if len(frame))
                return Done(count=self._space.write(request.span, request.offset, frames, ticket.client_id))
            case Fetch():
                return pack(self._space, request)
            case ReadBlock():
                return piece(self._space, request)
            case AbortBlocks():
                return self._space.abort(ticket.client_id, request.blocks)
            case StillHeld():
                return self._reaper.take(ticket.client_id, request)
            case FreeBlocks():
                self._space.free(request.blocks)
                return self._space.free_slots(request)
            case GetUnitStats():
                return Report(entries={**figures(self._space), "waiting": len(self._waiting), "rss_bytes": rss_bytes()})
        raise WrongType(f"a storage unit does not serve {type(request).__name__}")

    def _reserve(self, request: Reserve, ticket: Ticket) -> Reserved | None:
        if request.size_bytes <= 0:
            raise InvalidArgument(f"cannot reserve {request.size_bytes} bytes")
        if self._closed:
            raise ConnectionLost("the storage unit is closed")
        if not self._arenas.could_hold(aligned(request.size_bytes)):
            raise no_space(self._space, request, self._growth.full)
        asked = self._asked(request, ticket)
        if self.number:
            reserved = self._lend(request, asked)
            self._growth.make_room_if_low()
            if reserved is not None:
                return reserved
            self._growth.make_room(request.size_bytes)
        if request.timeout_s <= 0:
            raise no_space(self._space, request, self._growth.full)
        self._waiting.append(_Waiting(request, ticket, self._clock() + request.timeout_s))
        return None

    def _lend(self, request: Reserve, asked: Asked) -> Reserved | None:
        self._check_room()
        return self._space.reserve(request.size_bytes, request.holder, asked)

    def _asked(self, request: Reserve | Pin, ticket: Ticket) -> Asked:
        """Return who asked. A request that comes again did not get what it was granted before: that ends."""
        if len(request.holder.host.encode("utf-8", "surrogatepass")) > _HOST_BYTES:
            raise InvalidArgument(f"the host of a holder has more than {_HOST_BYTES} bytes: {request.holder.host}")
        asked = ticket.client_id, ticket.request_id
        self._space.take_back(asked)
        return asked

    def _check_room(self, blocks: int = 0) -> None:
        """Raise `CapacityExceeded` if one more thing to be granted could not be written down."""
        if self._log is not None:
            self._log.check_room(len(self._space.facts) + 1, blocks)

    def _take_back(self, ticket: Ticket, reply: Any) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting.ticket is not ticket]
        self._unconfirmed = [one for one in self._unconfirmed if one[1] is not ticket]
        match reply:
            case Reserved(span=span):
                self._space.return_span(span)
            case Pinned(pin=pin):
                self._space.unpin(pin)

    def _serve(self) -> None:
        """Answer the reservations that there is space for now."""
        with self._lock:
            answers = self._serve_waiting()
            self._save()
        _answer_all(answers)

    def _serve_waiting(self) -> list[tuple[Ticket, Reserved | TransferQueueError]]:
        """Try every parked reservation, in order; one that finds no space does not stand in the way of the next."""
        if not self.number:
            return []
        answers: list[tuple[Ticket, Reserved | TransferQueueError]] = []
        still = []
        for waiting in self._waiting:
            try:
                reserved = self._lend(waiting.request, (waiting.ticket.client_id, waiting.ticket.request_id))
            except TransferQueueError as error:
                answers.append((waiting.ticket, error))
                continue
            if reserved is None:
                still.append(waiting)
            else:
                answers.append((waiting.ticket, reserved))
        self._waiting = still
        for waiting in still:
            self._growth.make_room(waiting.request.size_bytes)
        return answers

    def _save(self) -> None:
        """Write down what happened since the last time."""
        facts = self._space.facts
        if self._log is None:
            facts.clear()
            return
        if facts:
            self._log.write(facts)
        if self._log.wants_snapshot and not (facts or self._shortening or self._closed):
            self._shortening = True
            self._beside.submit(self._shorten, self._log.begin_snapshot(), all_facts(self._space))

    def _shorten(self, writer: SnapshotWriter, facts: list[Fact]) -> None:
        try:
            FactLog.finish_snapshot(writer, facts)
        finally:
            with self._lock:
                self._shortening = False


_FREEING = (ReturnSpan, AbortBlocks, FreeBlocks, Unpin, StillHeld)


def _answer_all(answers: list[tuple[Ticket, Reserved | TransferQueueError]]) -> None:
    for ticket, answer in answers:
        ticket.answer(answer)
