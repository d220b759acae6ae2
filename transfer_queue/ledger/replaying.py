"""Making the changes of one ledger again in another: no sampler is asked, no clock is read."""

from __future__ import annotations

from transfer_queue.ledger.asking import ask
from transfer_queue.ledger.core import Ledger
from transfer_queue.ledger.records import Record
from transfer_queue.ledger.selection import Split
from transfer_queue.messages import Draw, Put, Reply
from transfer_queue.messages.journal import (
    DrawUndone,
    LeaseEnded,
    Resumed,
    RowsExpected,
    SamplerGiven,
    TaskSeen,
    TurnSkipped,
    UnitGivenUp,
)


def replay(ledger: Ledger, record: Record) -> Reply | None:
    """Make a change again that was noted by a ledger in the same state; return the reply it had, if somebody asked.

    Raises whatever the change raises in a state that it does not fit, `JournalDamaged` if its outcome is another one.
    """
    request = record.request
    serving = ledger.serving
    match request:
        case Put():
            return serving.redo_put(record)
        case Draw():
            return serving.redo_draw(record)
        case LeaseEnded():
            ledger.end_lease(ledger.leases.get(request.lease_token), request.how, record.now)
        case DrawUndone():
            serving.undo(record.ticket, record.now)
        case TaskSeen():
            serving.meet(record.partition, request.task_name, record.now)
        case RowsExpected():
            serving.expect(record.partition, request.rows, record.now)
        case TurnSkipped():
            serving.skip_turn(record, Split(request.rank, request.rank + 1, None, 0))
        case UnitGivenUp():
            ledger.lose_unit(request.unit, record.now, request)
        case SamplerGiven():
            ledger.lose_sampler(request, record.now)
        case Resumed():
            ledger.resume(record.now)
        case _:
            return ask(ledger, request, record.now)
    return None
