"""What a controller writes to its journal beside the requests themselves. None of these is ever sent."""

from __future__ import annotations

from transfer_queue.messages.base import message


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


@message(107)
class Marked:
    """Nothing changed."""


@message(109)
class RowsExpected:
    """When its first rows came, the partition was expected to get so many."""

    rows: int


@message(108)
class UnitGivenUp:
    """A storage unit was away for too long: what it held is lost, unless it comes back."""

    unit: int
