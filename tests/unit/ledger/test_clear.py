"""Clearing: which rows go, what is accounted, what becomes free, and long-lived partitions."""

from __future__ import annotations

from tests.unit.ledger.driver import UNIT, Driver, rows


def test_clearing_a_partition_removes_its_rows_and_its_name() -> None:
    """Other partitions are untouched; clearing again finds nothing to do."""
    queue = Driver()
    queue.put(3)
    other = queue.put(2, partition_id="q")
    assert queue.clear() == 3
    assert queue.ledger.reports.partitions() == ("q",)
    assert queue.clear() == 0
    assert rows(queue.locate(other)) == rows(other)
    assert queue.freed == [UNIT + 1]


def test_clearing_rows_of_several_partitions_is_one_step() -> None:
    """Each partition accounts for its own rows; a row named twice counts once."""
    queue = Driver()
    for name in ("p", "q"):
        queue.put(2, partition_id=name)
        assert queue.draw(1, partition_id=name) is not None
    assert queue.clear_rows(0, 3, 3, 0) == 2
    assert queue.account() | {"consumed": 1, "pending": 1, "dropped": {}} == queue.account()
    assert queue.account(partition="q") | {"consumed": 1, "pending": 0} == queue.account(partition="q")
    assert queue.account(partition="q")["dropped"] == {"cleared": 1}


def test_stale_rows_are_left_out_of_a_clear() -> None:
    """The others go; rows that took the slots of the stale ones stay, and rows that never were are nothing."""
    queue = Driver()
    done = queue.put(3)
    queue.clear_rows(1)
    new = queue.put(1)
    assert new.indexes.tolist() == [1]
    assert queue.clear(done) == 2
    assert queue.locate().indexes.tolist() == [1]
    before = queue.snapshot()
    assert queue.clear(done) == 0
    assert queue.clear_rows(-1, 0, 5, 10**9) == 0
    assert queue.snapshot() == before


def test_rows_cleared_before_a_task_was_seen_count_as_dropped_for_it() -> None:
    """The account of each task starts with all rows ever inserted."""
    queue = Driver()
    queue.put(4)
    assert queue.draw(1, task="early") is not None
    queue.clear_rows(0, 1)
    assert queue.draw(1, task="late") is not None
    assert queue.account("early") | {"consumed": 1, "pending": 2, "dropped": {"cleared": 1}} == queue.account("early")
    assert queue.account("late")["dropped"] == {"cleared_before_task": 2}


def test_a_field_is_forgotten_with_its_last_row() -> None:
    """Reports and the check of types follow what lives."""
    queue = Driver()
    queue.put(1, ["x"])
    done = queue.put(1, ["y"])
    queue.clear(done)
    assert queue.locate(allow_missing=True).fields == ("x",)
    assert queue.ledger.reports.audit()["partitions"]["p"]["fields"] == {"x": 1}
    assert queue.ledger.reports.field_mapping() == {"x": 0, "y": 1}


def test_a_stream_through_one_partition_keeps_its_tables_small() -> None:
    """Rows come and go for long; draws that wait across compactions are served, in order."""
    queue = Driver()
    for step in range(60):
        assert queue.draw(500) is None
        waiting = queue.ticket
        queue.put(500)
        found = queue.answers[waiting]
        assert len(rows(found)) == 500
        if step % 3:
            queue.clear(found)
        else:
            queue.clear_rows(*rows(found)[::2])
            queue.clear_rows(*rows(found)[1::2])
    assert queue.account()["consumed"] == 30_000
    assert len(queue.ledger.reports.consumption_status("t")) <= 2048
    assert len(queue.ledger.blocks) == 0


def test_rows_that_stay_behind_keep_their_place_across_compactions() -> None:
    """Old rows are drawn before new ones, however many went between."""
    queue = Driver()
    queue.put(3, ["x"], keys=["a", "b", "c"])
    for _ in range(20):
        queue.clear(queue.put(1000, ["y"]))
    queue.put(1, ["x"], keys=["d"])
    queue.clear(queue.locate(keys=("a",)))
    for _ in range(20):
        queue.clear(queue.put(1000, ["y"]))
    drawn = queue.draw(3, ["x"])
    assert drawn is not None
    assert drawn.keys == ("b", "c", "d")
