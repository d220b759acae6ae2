"""The ring of step windows: nothing is overwritten, puts wait for their window or say which step is in the way."""

from __future__ import annotations

import pytest

from tests.unit.ledger.driver import Driver, rows
from transfer_queue.errors import CapacityExceeded


def ring(steps: int = 2) -> Driver:
    """Windows of 4 rows."""
    return Driver(global_batch_size=2, num_n_samples=2, num_global_batch=steps)


def test_a_step_owns_its_window_and_named_partitions_lie_behind_the_ring() -> None:
    """Step k starts at (k % steps) · size; `global_step=k` and `partition_id='step_k'` are the same."""
    queue = ring()
    assert rows(queue.put(4, global_step=1)) == [4, 5, 6, 7]
    assert rows(queue.put(2, global_step=0)) == [0, 1]
    assert rows(queue.put(1, partition_id="train")) == [8]
    assert rows(queue.put(1, partition_id="step_0")) == [2]
    assert queue.ledger.reports.partitions() == ("step_1", "step_0", "train")
    assert rows(queue.draw(3, global_step=0)) == [0, 1, 2]


def test_without_a_ring_steps_are_partitions_like_others() -> None:
    """There is no limit and no window."""
    queue = Driver()
    assert rows(queue.put(100, global_step=7)) == list(range(100))
    assert rows(queue.draw(1, partition_id="step_7")) == [0]


def test_a_put_waits_for_its_window_and_then_names_the_step_in_the_way() -> None:
    """At its deadline it raises `CapacityExceeded`; nothing was overwritten."""
    queue = ring()
    first = queue.put(4, global_step=0)
    before = queue.snapshot()
    with pytest.raises(CapacityExceeded, match=r"no capacity for step 2: the ring waits for step 0, which has 4"):
        queue.put(1, global_step=2)
    assert queue.snapshot() == before
    assert queue.put(1, global_step=2, timeout_s=5.0) is None
    assert queue.ledger.next_deadline() == queue.now + 5.0
    queue.later(5.0)
    error = queue.answers[queue.ticket]
    assert isinstance(error, CapacityExceeded)
    assert "no capacity for step 2 after 5.0 s: the ring waits for step 0" in str(error)
    assert queue.snapshot() | {"answers": []} == before
    assert rows(queue.locate(first)) == [0, 1, 2, 3]


def test_a_waiting_put_is_applied_when_the_last_row_of_its_window_is_cleared() -> None:
    """A window is free when all its inserted rows are cleared, by row or by partition."""
    queue = ring()
    first = queue.put(3, global_step=0)
    assert queue.put(2, global_step=2, timeout_s=5.0) is None
    put = queue.ticket
    assert queue.draw(2, global_step=2) is None
    draw = queue.ticket
    queue.clear_rows(0, 1)
    assert not queue.answers
    queue.clear_rows(2)
    done = queue.answers[put]
    assert rows(done) == rows(queue.answers[draw]) == [0, 1]
    assert queue.locate(partition_id="step_2").generations.tolist() == [1, 1]
    assert rows(queue.locate(partition_id="step_0")) == []
    assert first.generations.tolist() == [0, 0, 0]


def test_a_cancelled_put_is_not_applied() -> None:
    """Who does not wait any more gets no window."""
    queue = ring(1)
    queue.put(1, global_step=0)
    assert queue.put(1, global_step=1, timeout_s=5.0) is None
    assert queue.cancel()
    queue.clear("step_0")
    assert queue.ledger.reports.partitions() == ()
    assert rows(queue.put(1, global_step=2)) == [0]


def test_more_rows_than_a_step_has_and_older_steps_raise_at_once() -> None:
    """Waiting could not help: the error says by how much, or whose window it is now."""
    queue = ring()
    queue.put(3, global_step=0)
    with pytest.raises(CapacityExceeded, match="capacity of 4 samples.*3 are inserted; 2 more exceed it by 1"):
        queue.put(2, global_step=0, timeout_s=5.0)
    queue.clear("step_0")
    queue.put(1, global_step=2)
    with pytest.raises(CapacityExceeded, match="step 0 is over: the capacity of its window belongs to step 2"):
        queue.put(1, global_step=0, timeout_s=5.0)


def test_a_waiting_put_whose_window_went_to_a_later_step_is_told() -> None:
    """It does not wait until its deadline."""
    queue = ring(1)
    queue.put(1, global_step=0)
    for step in (2, 1):
        assert queue.put(1, global_step=step, timeout_s=60.0) is None
    queue.clear("step_0")
    assert rows(queue.answers[queue.ticket - 1]) == [0]
    assert "step 1 is over" in str(queue.answers[queue.ticket])


def test_a_cleared_step_may_be_filled_again() -> None:
    """The window stays with its step until a later one takes it."""
    queue = ring()
    for _ in range(3):
        assert rows(queue.put(4, global_step=0)) == [0, 1, 2, 3]
        queue.clear(queue.locate(partition_id="step_0"))
    assert queue.ledger.reports.audit("step_0")["partitions"]["step_0"]["inserted"] == 12


def test_names_that_only_look_like_steps_are_no_steps() -> None:
    """`step_01`, `step_` and `step_x` are named partitions behind the ring."""
    queue = ring()
    found = [rows(queue.put(1, partition_id=name))[0] for name in ("step_01", "step_", "step_x", "step_-1")]
    assert min(found) >= 8
