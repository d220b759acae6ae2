"""A storage unit: lends spans of its arenas to writers, pins blocks for readers, and takes back what nobody wants.

All decisions are `UnitSpace`'s; this is the shell that locks, parks and answers. A reservation that finds no space
is parked until some is freed or a new arena is there; arenas are made, and the fate of a dead writer's blocks is
asked for, in threads beside, so that no other request waits for either.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from transfer_queue.errors import CapacityExceeded, ConnectionLost, InvalidArgument, TransferQueueError, WrongType
from transfer_queue.messages import (
    ONE_WAY,
    AbortBlocks,
    Done,
    Fetch,
    FreeBlocks,
    GetUnitStats,
    Int64s,
    Pin,
    Pinned,
    Report,
    Reserve,
    Reserved,
    ReturnSpan,
    Unpin,
    Write,
)
from transfer_queue.storage.arena import DEFAULT_ARENA_BYTES, PAGE_BYTES, Arena, Arenas, free_bytes, no_memory
from transfer_queue.storage.block import aligned
from transfer_queue.storage.packing import pack
from transfer_queue.storage.space import UnitSpace
from transfer_queue.storage.spans import Span
from transfer_queue.wire.holders import is_alive
from transfer_queue.wire.ticket import Ticket

_REAP_S = 1.0
_RETRY_GROWTH_S = 1.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Reserve
    ticket: Ticket
    deadline: float


class UnitService:
    """Serves `UnitRequest` and `FreeBlocks`. Thread-safe; may serve before its `number` is known.

    capacity_bytes  of all arenas together; None: half of what the file system of `folder` has free now
    settle          given the blocks of dead writers, returns 0/1 for each: was it committed? None: keep them
    """

    def __init__(
        self,
        folder: Path,
        *,
        capacity_bytes: int | None = None,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        settle: Callable[[Int64s], Int64s] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises `CapacityExceeded` if there is no memory for the first arena."""
        if capacity_bytes is None:
            capacity_bytes = max(free_bytes(folder) // 2, PAGE_BYTES)
        if capacity_bytes < PAGE_BYTES or arena_bytes < PAGE_BYTES:
            raise InvalidArgument(f"capacity_bytes and arena_bytes must be {PAGE_BYTES} or more")
        self.settle = settle
        self._clock = clock
        self._arenas = Arenas(folder, capacity_bytes, arena_bytes)
        self._space = UnitSpace(self._arenas)
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        self._growing = False
        self._full: CapacityExceeded | None = None
        self._retry_growth_at = 0.0
        self._reap_at = clock() + _REAP_S
        self._closed = False
        self._beside = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tq-unit")
        size = self._arenas.plan_growth(1)
        assert size is not None
        if size > free_bytes(folder):
            raise no_memory(folder, size)
        self._growing = True
        self._beside.submit(self._grow, size)

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
            answers = self._serve_waiting()
        for waiting, reserved in answers:
            waiting.ticket.answer(reserved)

    @property
    def capacity_bytes(self) -> int:
        return self._arenas.capacity_bytes

    # ------------------------------------------------------------ the handler

    def submit(self, request: Any, ticket: Ticket) -> None:
        """Answer a request, now or when there is space; one-way messages are only carried out."""
        try:
            with self._lock:
                reply = self._handle(request, ticket)
                answers = self._serve_waiting() if isinstance(request, _FREEING) else []
        except TransferQueueError as error:
            reply, answers = error, []
        for waiting, reserved in answers:
            waiting.ticket.answer(reserved)
        if reply is not None and not isinstance(request, ONE_WAY):
            ticket.answer(reply)

    def tick(self) -> float | None:
        """Release what the dead hold, give up on reservations that are due; return seconds to the next turn."""
        now = self._clock()
        with self._lock:
            if self._closed:
                return None
            expired = [waiting for waiting in self._waiting if waiting.deadline <= now]
            self._waiting = [waiting for waiting in self._waiting if waiting.deadline > now]
            errors = [self._no_space(waiting.request) for waiting in expired]
            if now >= self._reap_at:
                self._reap_at = now + _REAP_S
                self._reap()
            answers = self._serve_waiting()
            due = min([self._reap_at, *(waiting.deadline for waiting in self._waiting)])
        for waiting, error in zip(expired, errors, strict=True):
            waiting.ticket.answer(error)
        for waiting, reserved in answers:
            waiting.ticket.answer(reserved)
        return max(0.0, due - now)

    def lost(self, ticket: Ticket, reply: Any) -> None:
        """The reply (None: any) to this request has nobody to go to: undo what it granted."""
        with self._lock:
            self._take_back(ticket, reply)
            answers = self._serve_waiting()
        for waiting, reserved in answers:
            waiting.ticket.answer(reserved)

    def close(self) -> None:
        """Answer who waits, stop the threads, remove the arenas. May be called twice."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, []
        for one in waiting:
            one.ticket.answer(
                ConnectionLost(f"the storage unit was closed while {one.request.size_bytes} bytes were awaited")
            )
        self._beside.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            self._arenas.close()

    # ------------------------------------------------------------ requests

    def _handle(self, request: Any, ticket: Ticket) -> Any:
        """Return the reply; None if there is none, or not yet."""
        match request:
            case Reserve():
                return self._reserve(request, ticket)
            case Pin():
                return self._space.pin(request.blocks, request.holder)
            case Unpin():
                return self._space.unpin(request.pin)
            case ReturnSpan():
                return self._space.return_span(request.span)
            case Write():
                frames = (np.frombuffer(frame, np.uint8) for frame in request.frames if len(frame))
                return Done(count=self._space.write(request.span, request.offset, frames))
            case Fetch():
                return pack(self._space, request)
            case AbortBlocks():
                return self._space.free(request.blocks)
            case FreeBlocks():
                self._space.free(request.blocks)
                return self._space.free_slots(request)
            case GetUnitStats():
                return Report(entries={**self._space.stats(), "waiting": len(self._waiting)})
        raise WrongType(f"a storage unit does not serve {type(request).__name__}")

    def _reserve(self, request: Reserve, ticket: Ticket) -> Reserved | None:
        if request.size_bytes <= 0:
            raise InvalidArgument(f"cannot reserve {request.size_bytes} bytes")
        if self._closed:
            raise ConnectionLost("the storage unit is closed")
        if aligned(request.size_bytes) > self._arenas.capacity_bytes:
            raise self._no_space(request)
        if self.number:
            reserved = self._space.reserve(request.size_bytes, request.holder)
            self._grow_if_low()
            if reserved is not None:
                return reserved
            self._grow_for(request.size_bytes)
        if request.timeout_s <= 0:
            raise self._no_space(request)
        self._waiting.append(_Waiting(request, ticket, self._clock() + request.timeout_s))
        return None

    def _take_back(self, ticket: Ticket, reply: Any) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting.ticket is not ticket]
        match reply:
            case Reserved(span=span):
                self._space.return_span(span)
            case Pinned(pin=pin):
                self._space.unpin(pin)

    def _serve_waiting(self) -> list[tuple[_Waiting, Reserved]]:
        """Try every parked reservation, in order; one that finds no space does not stand in the way of the next."""
        if not self.number:
            return []
        served, still = [], []
        for waiting in self._waiting:
            reserved = self._space.reserve(waiting.request.size_bytes, waiting.request.holder)
            if reserved is None:
                still.append(waiting)
            else:
                served.append((waiting, reserved))
        self._waiting = still
        for waiting in still:
            self._grow_for(waiting.request.size_bytes)
        return served

    def _no_space(self, request: Reserve) -> CapacityExceeded:
        stats = self._space.stats()
        needed, limit, free = aligned(request.size_bytes), stats["bytes_capacity"], stats["bytes_free"]
        if needed > limit:
            text = f"a block of {needed} bytes exceeds the capacity of the storage unit, {limit} bytes: put fewer rows"
        else:
            text = (
                f"no capacity for a block of {needed} bytes within {request.timeout_s} s: of {limit} bytes {free} are "
                f"free (not in one piece), {stats['bytes_live']} live, {stats['bytes_pinned']} pinned; clear samples "
                "or raise capacity_bytes"
            )
        if self._full is not None:
            text += f". The unit could not grow: {self._full.message}"
        return CapacityExceeded(text, needed_bytes=needed, free_bytes=free, limit_bytes=limit)

    # ------------------------------------------------------------ growing

    def _grow_if_low(self) -> None:
        """Have the next arena ready before the last one is full."""
        arenas = self._arenas
        room = arenas.capacity_bytes - arenas.total_bytes - arenas.growing_bytes
        if arenas.members and arenas.free_bytes < arenas.arena_bytes // 4 and room >= arenas.arena_bytes:
            self._grow_for(arenas.arena_bytes)

    def _grow_for(self, size_bytes: int) -> None:
        if self._growing or self._closed or self._clock() < self._retry_growth_at:
            return
        planned = self._arenas.plan_growth(size_bytes)
        if planned is not None:
            self._growing = True
            self._beside.submit(self._grow, planned)

    def _grow(self, size_bytes: int) -> None:
        try:
            arena = self._arenas.create(size_bytes)
        except CapacityExceeded as error:
            with self._lock:
                self._growing = False
                self._arenas.give_up(size_bytes)
                self._full = error
                self._retry_growth_at = self._clock() + _RETRY_GROWTH_S
            return
        self._fill(arena)

    def _fill(self, arena: Arena) -> None:
        arena.fill()
        with self._lock:
            self._growing = False
            self._full = None
            self._arenas.add(arena)
            answers = self._serve_waiting()
        for waiting, reserved in answers:
            waiting.ticket.answer(reserved)

    # ------------------------------------------------------------ the dead

    def _reap(self) -> None:
        for holder in self._space.holders():
            if is_alive(holder):
                continue
            spans = self._space.release(holder)
            if spans:
                self._beside.submit(self._settle, spans)

    def _settle(self, spans: list[Span]) -> None:
        """Free what a dead writer sealed and never committed; if that cannot be learnt now, it is asked again."""
        with self._lock:
            blocks = np.array([block.block_id for span in spans for block in span.blocks.values()], np.int64)
        lost: Int64s | None = np.empty(0, np.int64)
        if self.settle is not None:
            try:
                lost = blocks[np.asarray(self.settle(blocks)) == 0]
            except (TransferQueueError, OSError):
                lost = None
        with self._lock:
            self._space.settle(spans, lost)
            answers = self._serve_waiting()
        for waiting, reserved in answers:
            waiting.ticket.answer(reserved)


_FREEING = (ReturnSpan, AbortBlocks, FreeBlocks, Unpin)
