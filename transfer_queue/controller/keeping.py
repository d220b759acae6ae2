"""What a controller writes down before it answers, and how its state comes back from it.

Each change of the ledger is one record of the journal: the request, when and by whom it was asked, and what the state
alone did not decide. A snapshot is the state as a whole; it takes the place of the records before it. Replayed, both
give the ledger, the units with their numbers, and the answers that clients may still ask for by request id.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgpack
import numpy as np

from transfer_queue.controller.units import UnitBook
from transfer_queue.errors import CapacityExceeded, DecodeError, JournalDamaged, TransferQueueError
from transfer_queue.journal import Journal, Recovered
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.records import Record
from transfer_queue.ledger.replaying import replay
from transfer_queue.ledger.selection import Split
from transfer_queue.messages import (
    Admit,
    Announce,
    Announced,
    Draw,
    FreesDone,
    Put,
    RegisterSampler,
    Reply,
    Request,
    SetTags,
)
from transfer_queue.messages.journal import DrawUndone, Marked
from transfer_queue.wire.codec import decode, encode_message, frame_bytes, pack_value, unpack_value
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.ticket import Ticket

log = logging.getLogger(__name__)

_FORMAT = 1
_LENGTHS = struct.Struct("<II")  # of what stands before the request, and of the request's header; its body follows
_GROWING = (Put, Draw, SetTags, RegisterSampler, Admit, Announce)  # refused where space is short; all else gets it free
_RECORD_BYTES = 4096  # of a record beside the request and the rows
_ROW_BYTES = 32  # index and mark of a row that a draw hands out, twice


class Keeper:
    """Keeps the state of one controller in a journal. Used under the controller's lock, but for `close`."""

    def __init__(self, journal: Journal, ledger: Ledger, units: UnitBook, requests: RequestTable) -> None:
        self._journal = journal
        self._ledger = ledger
        self._units = units
        self._requests = requests
        self._encoded: tuple[Any, Sequence[Any]] | None = None  # the request that was looked at last, and its frames
        self._snapshot: threading.Thread | None = None
        self._promised = 0  # bytes of records to come
        self.held_back = False  # some that wait were not let in
        ledger.records.keep = True
        ledger.serving.admits = self.admits

    @classmethod
    def open(
        cls, folder: Path, ledger: Ledger, units: UnitBook, requests: RequestTable, *, sync: bool, now: float
    ) -> Keeper:
        """Fill an empty ledger with what the folder holds, and go on from there.

        Raises `JournalDamaged`, changing nothing, if it does not fit together; `JournalUnavailable` if it is in use.
        """
        journal, recovered = Journal.open(folder, sync=sync)
        try:
            for note in recovered.notes:
                log.warning("%s", note)
            known = recovered.sequence > 0
            recover(recovered, ledger, units, requests)
            keeper = cls(journal, ledger, units, requests)
            if known:
                ledger.resume(now)
                keeper.keep(ledger.records.take())
            return keeper
        except BaseException:
            journal.close()
            raise

    def __repr__(self) -> str:
        return f"<Keeper of {self._journal!r}>"

    # ------------------------------------------------------------ writing

    def admit(self, request: Request, frames: Sequence[Any] | None = None) -> None:
        """Raise `CapacityExceeded` if there may be no room to write down what this request changes.

        `frames`: as it came, if it did; they are written down as they are.
        """
        growing = isinstance(request, _GROWING)
        if frames is None and growing:
            frames = encode_message(request)
        self._encoded = None if frames is None else (request, frames)
        if growing and frames is not None:
            self._journal.check_room(self._size(request, frames))

    def admits(self, request: Put) -> bool:
        """Whether there is room as well for this put, which has waited, beside those let in since the last `keep`."""
        size = self._promised + self._size(request, encode_message(request))
        try:
            self._journal.check_room(size)
        except CapacityExceeded:
            self.held_back = True
            return False
        self._promised = size
        return True

    def _size(self, request: Request, frames: Sequence[Any]) -> int:
        """The most that a record of this request takes."""
        rows = min(request.batch_size, self._ledger.capacity) if isinstance(request, Draw) else 0
        return sum(map(frame_bytes, frames)) + _RECORD_BYTES + _ROW_BYTES * max(rows, 0)

    @property
    def short(self) -> bool:
        """There is no room for more than what gives room back: nothing that waits is to be served now."""
        try:
            self._journal.check_room(_RECORD_BYTES * 16)
        except CapacityExceeded:
            return True
        return False

    def keep(self, records: list[Record], ticket: Ticket | None = None) -> None:
        """Write changes down. `ticket`: of the request that is being carried out; others name theirs themselves.

        Raises `CapacityExceeded` or `JournalUnavailable` if that is not possible although `admit` let it pass.
        """
        for record in records:
            asked = record.ticket
            if asked is None and ticket is not None and record.request is ticket.request:
                asked = (ticket.client_id, ticket.request_id)
            self._journal.append(*self._parts(record, asked), essential=True)
        self._encoded, self._promised = None, 0

    def when_durable(self, done: Callable[[BaseException | None], None]) -> None:
        """Call back when all that was kept so far will be there after a restart."""
        self._journal.when_durable(done)

    def flush(self) -> None:
        """Wait for that."""
        self._journal.flush()

    def close(self) -> None:
        """End the snapshot under way and let go of the journal. May be called twice."""
        if self._snapshot is not None:
            self._snapshot.join()
        self._journal.close()

    def _parts(self, record: Record, asked: Any) -> Iterator[Any]:
        known = self._encoded is not None and self._encoded[0] is record.request
        request = self._encoded[1] if known and self._encoded else encode_message(record.request)
        recorded = _packed(record, *(asked if asked is not None else ("", 0)))
        yield _LENGTHS.pack(len(recorded), len(request[0]))
        yield recorded
        yield from request

    # ------------------------------------------------------------ snapshots

    def snapshot_if_due(self) -> None:
        """Write the state down as a whole once the records take too much space."""
        if self._journal.wants_snapshot and (self._snapshot is None or not self._snapshot.is_alive()):
            self.snapshot()

    def snapshot(self) -> threading.Thread:
        """Write the state down as it is now, in a thread: only copying it holds others up."""
        work = (self._journal.begin_snapshot(), self.state())
        self._snapshot = threading.Thread(target=_write, args=work, name="transfer_queue snapshot", daemon=True)
        self._snapshot.start()
        return self._snapshot

    def replace(self, ticket: Ticket, reply: Reply, now: float) -> None:
        """The state was changed by no record: write it down as a whole, with the answer to who asked for that.

        A record that changes nothing comes first, so that no snapshot of before has the same place.
        """
        self.keep([Record(Marked(), now)])
        self._requests.restore(ticket.client_id, ticket.request_id, ticket.request, reply)
        self._journal.begin_snapshot().write(pack_state(self.state()))

    def state(self) -> dict[str, Any]:
        """Everything that has to be there after a restart."""
        return {
            "format": _FORMAT,
            "ledger": self._ledger.state(),
            "units": self._units.state(),
            "requests": self._requests.dump(),
        }


def _write(writer: Any, state: dict[str, Any]) -> None:
    try:
        writer.write(pack_state(state))
    except TransferQueueError as error:
        log.warning("no snapshot of the controller was written; its journal goes on growing: %s", error)


# ---------------------------------------------------------------- reading


def pack_state(state: dict[str, Any]) -> list[bytes]:
    """The bytes of what `Keeper.state` returned."""
    requests = [
        (client, floor, forgotten, [(number, code, b"".join(_framed(reply))) for number, code, reply in answers])
        for client, floor, forgotten, answers in state["requests"]
    ]
    return [pack_value(state | {"requests": requests})]


def recover(recovered: Recovered, ledger: Ledger, units: UnitBook, requests: RequestTable) -> None:
    """Bring the state back into an empty ledger; raises `JournalDamaged` where a record does not fit the state."""
    if recovered.snapshot is not None:
        _load(recovered.snapshot, ledger, units, requests)
    first = recovered.sequence - len(recovered.records) + 1
    for sequence, data in enumerate(recovered.records, first):
        try:
            _replay(data, ledger, units, requests)
        except (TransferQueueError, KeyError, ValueError, AssertionError, IndexError) as error:
            raise JournalDamaged(
                f"record {sequence} of the journal does not fit the state that those before it make: {error}; "
                f"{sequence - first} records before it are good",
                sequence=sequence - 1,
                records=sequence - first,
            ) from error
    ledger.blocks.take_orders()  # those that are not confirmed are sent when their unit comes back


def _load(snapshot: bytes, ledger: Ledger, units: UnitBook, requests: RequestTable) -> None:
    try:
        state = unpack_value(snapshot)
        if state["format"] != _FORMAT:
            raise DecodeError(f"it has format {state['format']}, this version reads {_FORMAT}")
        ledger.load(state["ledger"])
        units.load(state["units"])
        requests.load(
            (client, floor, forgotten, [(number, code, _unframed(reply)) for number, code, reply in answers])
            for client, floor, forgotten, answers in state["requests"]
        )
    except (TransferQueueError, KeyError, TypeError, ValueError, AssertionError) as error:
        raise JournalDamaged(
            f"the snapshot of the controller cannot be read: {error}", sequence=0, records=0
        ) from error


def _replay(data: bytes, ledger: Ledger, units: UnitBook, requests: RequestTable) -> None:
    record = unpack_record(data)
    request, asked = record.request, cast("tuple[str, int]", record.ticket)
    reply: Reply | None
    match request:
        case Marked():
            reply = None
        case Announce():
            reply = Announced(number=units.announce(request, None).info.number)
        case FreesDone():
            number = units.number_of(request.unit_id)
            if number is not None:
                ledger.blocks.confirm(number, request.sequence)
            reply = None
        case _:
            reply = replay(ledger, record)
    if isinstance(request, DrawUndone):
        requests.withdraw(*asked)
    elif reply is not None:
        requests.restore(*asked, request, reply)


def unpack_record(data: bytes) -> Record:
    """Return what `Keeper.keep` wrote; its ticket is a client id and a request id. Raises `DecodeError`."""
    try:
        size, header = _LENGTHS.unpack_from(data)
        recorded, rest = data[_LENGTHS.size : _LENGTHS.size + size], data[_LENGTHS.size + size :]
        request = decode([rest[:header], rest[header:]])[1]
        found = msgpack.unpackb(recorded, unicode_errors="surrogatepass")
        now, client, asked_by, request_id, partition, rows, consumed, check, choice = found
        split, bounds, sampler_state = (None, None, None) if choice is None else unpack_value(choice)
        return Record(
            request,
            now,
            (asked_by, request_id),
            client,
            partition,
            None if rows is None else np.frombuffer(rows, np.int64),
            None if consumed is None else np.frombuffer(consumed, np.int64),
            check,
            None if split is None else Split(*split),
            bounds,
            sampler_state,
        )
    except (struct.error, msgpack.UnpackException, TypeError, ValueError) as error:
        raise DecodeError(f"these {len(data)} bytes are no record: {error}") from error


def _packed(record: Record, asked_by: str, request_id: int) -> bytes:
    """What stands before the request. Every change waits for it, so it is no message type of its own."""
    choice = None
    if record.split is not None or record.bounds is not None or record.sampler_state is not None:
        split = record.split and [record.split.rank, record.split.size, record.split.group, record.split.batch_index]
        choice = pack_value([split, record.bounds, record.sampler_state])
    rows = None if record.rows is None else record.rows.tobytes()
    consumed = None if record.consumed is None else record.consumed.tobytes()
    head = (record.now, record.client, asked_by, request_id, record.partition)
    packed: bytes = msgpack.packb((*head, rows, consumed, record.check, choice), unicode_errors="surrogatepass")
    return packed


def _framed(message: Any) -> list[bytes]:
    header, body = encode_message(message)
    return [bytes((len(header),)), header, body]


def _unframed(data: bytes) -> Any:
    header = data[0]
    return decode([data[1 : 1 + header], data[1 + header :]])[1]
