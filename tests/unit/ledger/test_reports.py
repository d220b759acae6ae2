"""Audit, status and explanation: they tell the state and leave no trace in it."""

from __future__ import annotations

import pytest

from tests.unit.ledger.driver import Driver, rows
from transfer_queue import GRPOSampler
from transfer_queue.errors import UnknownName


def test_the_audit_accounts_for_every_row_of_every_task() -> None:
    """inserted = pending + reserved + consumed + dropped, also for rows that are gone."""
    queue = Driver()
    queue.put(6, ["x"])
    queue.put(4, ["y"])
    assert rows(queue.draw(2)) == [0, 1]
    assert queue.rank(0, 2, 1, group="g") is not None
    queue.clear_rows(0, 2, 5)
    found = queue.ledger.reports.audit("p")["partitions"]["p"]
    assert (found["inserted"], found["live"], found["dropped"]) == (10, 7, {"cleared": 3})
    assert found["missing"] == {"x": 4, "y": 3}
    assert queue.account() == {
        "inserted": 10,
        "pending": 5,
        "reserved": 1,
        "consumed": 2,
        "dropped": {"cleared": 2},
        "balanced": True,
    }
    assert queue.ledger.reports.audit()["samplers"] == {"": "SequentialSampler()"}
    with pytest.raises(UnknownName, match="no partition 'pp'.*did you mean 'p'"):
        queue.ledger.reports.audit("pp")


def test_status_arrays_are_indexed_by_global_index_and_are_copies() -> None:
    """What a caller does to them changes nothing."""
    queue = Driver()
    queue.put(2, ["x"])
    queue.put(1, ["y"])
    assert queue.draw(1) is not None
    reports = queue.ledger.reports
    production, mapping = reports.production_status(), reports.field_mapping()
    assert production[:3, mapping["x"]].tolist() == [1, 1, 0]
    assert production[:3, mapping["y"]].tolist() == [0, 0, 1]
    assert reports.consumption_status("t")[:3].tolist() == [1, 0, 0]
    assert reports.consumption_status("nobody").sum() == 0
    production[:] = 7
    reports.consumption_status("t")[:] = 7
    assert reports.production_status().max() == reports.consumption_status("t").max() == 1


def test_asking_why_leaves_no_trace() -> None:
    """An explanation creates no task, no ready set and no account."""
    queue = Driver()
    queue.put(2)
    before = queue.snapshot()
    assert "2 of 3 samples ready" in queue.explain(3, task="curious")
    assert "0 of 3 samples ready" in queue.explain(3, ["zzz"], task="curious")
    assert "there is no partition 'q' yet" in queue.explain(partition="q")
    assert queue.snapshot() == before


def test_an_explanation_tells_what_was_taken_and_by_whom_it_was_meant() -> None:
    """Rows that are consumed already, and a task name that looks like a typing error."""
    queue = Driver()
    queue.put(2)
    assert queue.draw(2, task="actor_update") is not None
    assert "0 of 1 samples ready in partition 'p' for task 'actor_update'; 2 of 2 are consumed" in queue.explain(
        task="actor_update"
    )
    assert "task 'actor_updat' has consumed nothing so far (did you mean 'actor_update'?)" in queue.explain(
        task="actor_updat"
    )


def test_a_timeout_of_groups_counts_the_complete_ones() -> None:
    """So that three rows of four do not look like almost there."""
    queue = Driver(num_n_samples=2, sampler=GRPOSampler())
    queue.put(4, group_ids=["a", "b", "c", "c"])
    assert queue.draw(4, timeout_s=1.0) is None
    queue.later(1.0)
    text = str(queue.answers[queue.ticket])
    assert "4 of 4 samples ready" in text
    assert "1 complete groups of 2" in text
    assert "2 groups lack rows: 'a' has 1 of 2, 'b' has 1 of 2" in text


def test_partitions_are_listed_in_the_order_of_their_creation() -> None:
    """Also after one was cleared and made anew."""
    queue = Driver()
    for name in ("b", "a", "c"):
        queue.put(1, partition_id=name)
    queue.clear("b")
    queue.put(1, partition_id="b")
    assert queue.ledger.reports.partitions() == ("a", "c", "b")
