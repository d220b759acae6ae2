"""Requests that are answered at once, whoever asks: one table from request to reply."""

from __future__ import annotations

from transfer_queue.errors import ProtocolMismatch
from transfer_queue.ledger.core import Ledger
from transfer_queue.messages import (
    AbortGroup,
    Ack,
    Acked,
    AckMany,
    Clear,
    Done,
    Drop,
    GetAudit,
    GetExplanation,
    GetKeys,
    GetStatus,
    Leased,
    ListPartitions,
    Locate,
    Names,
    Reconcile,
    RegisterSampler,
    Release,
    Renew,
    Reply,
    Report,
    Request,
    ResetConsumption,
    SealGroup,
    SetTags,
    Settle,
    SetVersion,
)
from transfer_queue.samplers import create_sampler


def ask(ledger: Ledger, request: Request, now: float) -> Reply:
    """Carry out a request that never waits. Raises `ProtocolMismatch` for any other."""
    match request:
        case Locate():
            return ledger.locate(request)
        case Ack():
            return Done(count=ledger.ack(request, now))
        case AckMany():
            return Acked(refused=ledger.ack_many(request, now))
        case Release():
            return Done(count=ledger.release(request, now))
        case Renew():
            return Leased(lease_s=ledger.renew(request, now))
        case Drop():
            return Done(count=ledger.drop(request, now))
        case Clear():
            return Done(count=ledger.clear(request, now))
        case SetTags():
            return Done(count=ledger.set_tags(request, now))
        case SealGroup():
            return Done(count=ledger.seal_group(request, now))
        case AbortGroup():
            return Done(count=ledger.abort_group(request, now))
        case ResetConsumption():
            return Done(count=ledger.reset(request, now))
        case RegisterSampler():
            sampler = create_sampler(request.sampler, **request.arguments)
            ledger.register_sampler(request.task_name, sampler, now, request)
            return Done()
        case SetVersion():
            return Done(count=ledger.set_policy_version(request, now))
        case Settle():
            return ledger.settle(request, now)
        case Reconcile():
            return ledger.reconcile(request, now)
        case GetStatus():
            return ledger.reports.status(request)
        case GetKeys():
            return ledger.serving.keys.listing(request)
        case GetAudit():
            return Report(entries=ledger.reports.audit(request.partition_id))
        case GetExplanation():
            return Report(entries={"text": ledger.reports.explain(request, now)})
        case ListPartitions():
            return Names(names=ledger.reports.partitions())
        case _:
            raise ProtocolMismatch(f"{type(request).__name__} is not a request that a controller serves")
