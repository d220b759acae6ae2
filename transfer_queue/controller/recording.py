"""What stands in the journal of a controller, and how its state comes back from it.

A record is the request, when and by whom it was asked, and what the state alone did not decide. A snapshot is the state
as a whole. Replayed, both give the ledger, the units with their numbers, and the answers that clients may still ask for
by request id.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, cast

import msgpack
import numpy as np

from transfer_queue.controller.units import UnitBook
from transfer_queue.errors import DecodeError, JournalDamaged, TransferQueueError
from transfer_queue.journal import Recovered
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.records import Record
from transfer_queue.ledger.replaying import replay
from transfer_queue.ledger.selection import Split
from transfer_queue.messages import Announce, Announced, FreesDone, Reply
from transfer_queue.messages.journal import DrawUndone, Marked
from transfer_queue.wire.codec import decode, encode_message, pack_value, unpack_value
from transfer_queue.wire.requests import RequestTable

FORMAT = 2

_LENGTHS = struct.Struct("<II")  # of what stands before the request, and of the request's header; its body follows


def packed(record: Record, asked: tuple[str, int] | None, request: Sequence[Any]) -> bytes:
    """The bytes of a record. `asked`: client id and request id; `request`: its frames."""
    recorded = _packed_head(record, *(asked if asked is not None else ("", 0)))
    return b"".join((_LENGTHS.pack(len(recorded), len(request[0])), recorded, *request))


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
        if state["format"] != FORMAT:
            raise DecodeError(f"it has format {state['format']}, this version reads {FORMAT}")
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
            replaced = units.replaced_by(request)
            number = units.announce(request, None).info.number
            if replaced is not None:
                ledger.lose_unit(replaced, record.now, request)
            reply = Announced(number=number, given_up=ledger.blocks.given_up(number))
        case FreesDone():
            known = units.number_of(request.unit_id)
            if known is not None:
                ledger.blocks.confirm(known, request.sequence)
            reply = None
        case _:
            reply = replay(ledger, record)
    if isinstance(request, DrawUndone):
        requests.withdraw(*asked)
    elif reply is not None:
        requests.restore(*asked, request, reply)


def unpack_record(data: bytes) -> Record:
    """Return what `packed` made; its ticket is a client id and a request id. Raises `DecodeError`."""
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


def _packed_head(record: Record, asked_by: str, request_id: int) -> bytes:
    """What stands before the request. Every change waits for it, so it is no message type of its own."""
    choice = None
    if record.split is not None or record.bounds is not None or record.sampler_state is not None:
        split = record.split and [record.split.rank, record.split.size, record.split.group, record.split.batch_index]
        choice = pack_value([split, record.bounds, record.sampler_state])
    rows = None if record.rows is None else record.rows.tobytes()
    consumed = None if record.consumed is None else record.consumed.tobytes()
    head = (record.now, record.client, asked_by, request_id, record.partition)
    found: bytes = msgpack.packb((*head, rows, consumed, record.check, choice), unicode_errors="surrogatepass")
    return found


def _framed(message: Any) -> list[bytes]:
    header, body = encode_message(message)
    return [bytes((len(header),)), header, body]


def _unframed(data: bytes) -> Any:
    header = data[0]
    return decode([data[1 : 1 + header], data[1 + header :]])[1]
