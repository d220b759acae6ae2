"""The state of a checkpoint in a queue that goes on from it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import Driver, ints, rows
from transfer_queue.errors import StaleSampleError


def restored(queue: Driver, into: Driver | None = None) -> Driver:
    """The queue, or another one, after it has loaded what was saved of it just now."""
    into = queue if into is None else into
    block = ints(queue.latest_block)
    into.ledger.replace(queue.ledger.state(), block, ints(next(queue.blocks)))
    for unit, order in into.ledger.blocks.take_orders():
        into.ledger.blocks.confirm(unit, order.sequence)
    into.shadow.load(into.ledger.state())
    return into


@pytest.mark.parametrize("where", ["same", "other"])
def test_how_often_samples_were_given_back_is_carried(where: str) -> None:
    """A sample that nobody can finish does not begin anew: its count goes on, up to the quarantine."""
    queue = Driver(max_deliveries=3)
    queue.put(2)
    for _ in range(2):
        leased: Any = queue.lease(1, client="trainer/1")
        queue.release(leased)
    queue = restored(queue, Driver(max_deliveries=3) if where == "other" else None)
    again: Any = queue.lease(2, client="trainer/2")
    assert again.extra_info["deliveries"] == [3, 1]
    queue.release(again)
    quarantined = queue.ledger.reports.audit("p")["partitions"]["p"]["quarantined"]
    assert [one["given_back_by"] for one in quarantined] == [{"t": ["trainer", "trainer", "trainer"]}]
    assert rows(queue.draw(1)) == [1]


def test_a_lease_that_a_checkpoint_ends_does_not_count() -> None:
    """Whoever had the samples was not at fault: a job that goes on from its last checkpoint loses none of them."""
    queue = Driver(max_deliveries=1)
    queue.put(1)
    leased: Any = queue.lease(1)
    queue = restored(queue)
    with pytest.raises(StaleSampleError):
        queue.locate(leased)
    again: Any = queue.lease(1)
    assert "deliveries" not in again.extra_info
    assert queue.ack(again) == 1


def test_a_sample_whose_lease_had_run_out_counts_as_handed_out_again() -> None:
    """Duplicates are counted although the queue was loaded in between."""
    queue = Driver()
    queue.put(1)
    queue.lease(1, 5.0)
    queue.later(6.0)
    queue = restored(queue)
    queue.lease(1)
    assert queue.account()["redelivered"] == 1
