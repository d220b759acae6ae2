"""What a controller writes to its journal beside the requests themselves. None of these is ever sent."""

from __future__ import annotations

from typing import Any

from transfer_queue.messages.base import Int64s, message


@message(100)
class Recorded:
    """One change. It stands before the request that made it, or one of the types below, in a record of the journal.

    With the same requests, times and choices the same state comes about again; `check` finds out if it did not.
    """

    now: float
    client: str  # who asked, as the ledger was told
    asked_by: str  # who asked, as on the wire; "" for what nobody asked for
    request_id: int
    partition_id: str  # of a put or draw
    rows: Int64s | None  # put: the rows; draw: what was handed out
    consumed: Int64s | None  # draw: what the sampler marks consumed, where that is not `rows`
    check: int  # sum of the generations of `rows`
    split: dict[str, Any] | None  # draw of a data-parallel rank: which, of how many, in which group
    bounds: Int64s | None  # where the slices begin, if the draw fixed them
    sampler_state: dict[str, Any] | None  # of a sampler that keeps state, after the draw


@message(101)
class LeaseEnded:
    """Nobody asked: the lease was over, or its holder is gone."""

    lease_token: int
    how: str


@message(102)
class DrawUndone:
    """The answer to the request named by the record never arrived."""


@message(103)
class TaskSeen:
    """A task asked for rows of the partition for the first time."""

    task_name: str


@message(104)
class TurnSkipped:
    """A rank was told that the samples of its next batch are gone."""

    task_name: str
    rank: int


@message(105)
class SamplerGiven:
    """A task (None: every task without its own) got a sampler as an object, which a journal does not keep."""

    task_name: str | None
    described: str


@message(106)
class Resumed:
    """The controller was started again: leases last from now on for as long as they were granted for."""
