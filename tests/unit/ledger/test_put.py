"""Inserting rows, writing fields, keys, tags and blocks; and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import UNIT, Driver, column, ints, put_request, rows
from transfer_queue.errors import (
    BlockLost,
    CapacityExceeded,
    InvalidArgument,
    StaleSampleError,
    TransferQueueError,
    UnknownName,
    WrongType,
)
from transfer_queue.ledger import Ledger
from transfer_queue.messages import Settle


def test_a_put_gets_one_run_of_slots_also_after_many_clears() -> None:
    """Holes of earlier rows are used for runs that fit, never for pieces of one."""
    queue = Driver()
    puts = [queue.put(10) for _ in range(20)]
    for done in puts[::2]:
        queue.clear(done)
    for count in (3, 10, 25):
        found = rows(queue.put(count))
        assert found == list(range(found[0], found[0] + count))
    live = rows(queue.locate())
    assert len(set(live)) == len(live) == 100 + 38


def test_status_of_rows_without_any_field_is_complete() -> None:
    """Rows that were only allocated are counted, with no field and nothing consumed."""
    queue = Driver()
    queue.put(3, fields=())
    status = queue.status("t")
    assert status.exists
    assert status.indexes.tolist() == [0, 1, 2]
    assert status.fields == ()
    assert status.production.tolist() == []
    assert status.consumption is not None
    assert status.consumption.tolist() == [0, 0, 0]
    assert queue.status("t", ["nothing"]).production.tolist() == [0, 0, 0]
    assert not queue.status(partition="elsewhere").exists
    assert queue.ledger.reports.production_status().shape[1] == 0


def test_a_schema_mismatch_leaves_no_field_ready_and_the_old_schema_in_place() -> None:
    """One wrong dtype among two fields refuses both."""
    queue = Driver()
    queue.put(2, ["x"])
    before = queue.snapshot()
    with pytest.raises(InvalidArgument, match=r"'x' of partition 'p' holds float32, this put brings int64"):
        queue.put(2, columns=(column("new"), column("x", dtype="int64")))
    assert queue.snapshot() == before
    assert queue.locate().columns == (queue.locate().columns[0],)
    queue.put(1, ["x"])
    queue.clear()
    assert rows(queue.put(1, columns=(column("x", dtype="int64"),))) == [0]


def test_columns_tell_a_shape_only_while_all_rows_share_it() -> None:
    """Rows of two shapes are described as shaped, rows of two kinds as objects."""
    queue = Driver()
    queue.put(1, ["x"])
    assert queue.locate().columns[0].shape == (3,)
    queue.put(1, columns=(column("x", shape=(4,)),))
    assert (queue.locate().columns[0].layout, queue.locate().columns[0].shape) == ("shaped", None)
    queue.put(1, columns=(column("x", dtype=None, layout="text", shape=None),))
    assert (queue.locate().columns[0].layout, queue.locate().columns[0].dtype) == ("object", None)


@pytest.mark.parametrize("late", ["field", "tags", "locate"])
def test_a_handle_of_a_cleared_row_is_refused_and_the_new_row_is_unchanged(late: str) -> None:
    """A slot that was cleared and reused never answers to its old name."""
    queue = Driver()
    old = queue.put(1, ["x"], tags=[{"a": 1}])
    queue.clear(old)
    new = queue.put(1, ["x"], tags=[{"a": 2}])
    assert rows(new) == rows(old)
    assert new.generations.tolist() != old.generations.tolist()
    before = queue.snapshot()
    calls: dict[str, Any] = {
        "field": lambda: queue.put(fields=["y"], to=old),
        "tags": lambda: queue.set_tags(old, {"a": 3}),
        "locate": lambda: queue.locate(old),
    }
    with pytest.raises(StaleSampleError, match="cleared since this handle was made") as caught:
        calls[late]()
    assert caught.value.details["indexes"] == rows(old)
    assert queue.clear(old) == 0
    assert queue.snapshot() == before


def test_a_late_field_does_not_bring_a_cleared_row_back_to_life() -> None:
    """A write to a row that is gone, and whose slot is free, raises and leaves nothing behind."""
    queue = Driver()
    done = queue.put(2, ["x"])
    queue.clear(done)
    with pytest.raises(StaleSampleError):
        queue.put(fields=["y"], to=done)
    assert rows(queue.locate()) == []
    assert queue.draw(1, ["y"]) is None
    assert len(queue.ledger.blocks) == 0


def test_keys_name_existing_rows_and_make_new_ones() -> None:
    """A put by keys extends the rows it knows and inserts the others."""
    queue = Driver()
    first = queue.put(2, ["x"], keys=["a", "b"])
    second = queue.put(2, ["y"], keys=["b", "c"])
    assert rows(second)[0] == rows(first)[1]
    assert rows(queue.locate(keys=("c", "b"), allow_missing=True)) == rows(second)[::-1]
    assert queue.locate(keys=("b",)).fields == ("x", "y")
    with pytest.raises(UnknownName, match=r"1 of 2 keys are not in partition 'p': \['bb'\].*did you mean 'b'"):
        queue.locate(keys=("a", "bb"))
    queue.clear(second)
    assert rows(queue.put(1, ["x"], keys=["b"])) != rows(first)[:1]


def test_a_key_is_free_again_after_its_row_was_cleared() -> None:
    """Keys live as long as their row."""
    queue = Driver()
    first = queue.put(1, keys=["a"])
    queue.clear(first)
    again = queue.put(1, keys=["a"])
    assert (again.indexes.tolist(), again.generations.tolist()) == ([0], [1])
    assert queue.locate(again).keys == ("a",)


def test_tags_are_visible_with_the_data_and_two_writers_lose_neither() -> None:
    """Whoever sees the field sees the tag that came with it; tags of different names are merged."""
    queue = Driver()
    queue.put(1, ["x"], tags=[{"version": 1, "nested": {"k": [1]}}])
    drawn = queue.draw(1)
    assert drawn is not None
    assert drawn.tags == ({"version": 1, "nested": {"k": [1]}},)
    queue.put(fields=["y"], to=drawn, tags=[{"reward": 0.5}])
    queue.set_tags(drawn, {"version": 2})
    tags = queue.locate(drawn).tags
    assert tags == ({"version": 2, "nested": {"k": [1]}, "reward": 0.5},)
    queue.set_tags(drawn, {"version": 3})
    assert tags == ({"version": 2, "nested": {"k": [1]}, "reward": 0.5},)  # what was told stays as it was told
    queue.clear(drawn)
    queue.put(1)
    assert queue.locate().tags is None


def test_fields_written_together_share_one_location() -> None:
    """Where the fields of rows lie is told per put, slot by slot; block 0 where a row lacks the field."""
    queue = Driver()
    done = queue.put(3, ["x", "y"])
    queue.put(2, ["x"])
    queue.put(fields=["z"], to=done)
    found = queue.locate(fields=["x", "y", "z"], allow_missing=True)
    assert found.produced is not None
    assert found.produced.tolist() == [1, 1, 1, 0, 0]
    places = {place.fields: (place.blocks.tolist(), place.slots.tolist()) for place in found.locations}
    assert places == {
        ("x",): ([UNIT + 1] * 3 + [UNIT + 2] * 2, [0, 1, 2, 0, 1]),
        ("y",): ([UNIT + 1] * 3 + [0, 0], [0, 1, 2, 0, 0]),
        ("z",): ([UNIT + 3] * 3 + [0, 0], [0, 1, 2, 0, 0]),
    }
    both = queue.locate(done, ["x", "y"])
    assert [place.fields for place in both.locations] == [("x", "y")]
    with pytest.raises(InvalidArgument, match="'y' is not produced for 2 of 5 samples"):
        queue.locate(fields=["x", "y"])
    with pytest.raises(UnknownName, match="no field 'zz' in partition 'p'.*did you mean 'z'"):
        queue.locate(fields=["zz"])


def test_a_block_is_free_when_nothing_points_to_it_and_only_then() -> None:
    """Overwritten fields and cleared rows release cells; slots of a block in use are told one by one."""
    queue = Driver()
    done = queue.put(2, ["x", "y"])
    queue.put(fields=["x"], to=done)
    assert (queue.freed, queue.freed_slots) == ([], [])
    queue.put(fields=["y"], to=done)
    assert (queue.freed, queue.freed_slots) == ([UNIT + 1], [])
    queue.clear_rows(1)
    assert sorted(queue.freed_slots) == [(UNIT + 2, 1), (UNIT + 3, 1)]
    queue.clear_rows(0)
    assert queue.freed == [UNIT + 1, UNIT + 2, UNIT + 3]
    assert len(queue.ledger.blocks) == 0


def test_a_block_of_a_dead_writer_is_refused() -> None:
    """Blocks that were not committed when their writer died never are; committed ones stay."""
    queue = Driver()
    queue.put(1)
    settled = queue.after(queue.ledger.settle, Settle(blocks=ints(UNIT + 1, UNIT + 2)), queue.now)
    assert settled.committed.tolist() == [1, 0]
    with pytest.raises(BlockLost, match="was given up"):
        queue.put(1)
    assert rows(queue.locate()) == [0]


def test_a_block_without_cells_is_free_at_once() -> None:
    """A put that stores no column gives its block back."""
    queue = Driver()
    queue.after(queue.ledger.put, put_request(1, (), UNIT + 9), 1, "writer", queue.now)
    assert queue.freed == [UNIT + 9]


ILLEGAL: dict[str, tuple[type[TransferQueueError], str, dict[str, Any]]] = {
    "no row": (InvalidArgument, "at least one row", {"count": 0}),
    "too many keys": (InvalidArgument, "3 keys for 2 rows", {"count": 2, "keys": ["d", "e", "f"]}),
    "too few tags": (InvalidArgument, "1 tags for 2 rows", {"count": 2, "tags": [{}]}),
    "wrong tag": (WrongType, "dict or None", {"count": 1, "tags": ["text"]}),
    "wrong groups": (InvalidArgument, "1 group_ids for 2 rows", {"count": 2, "group_ids": ["g"]}),
    "key twice": (InvalidArgument, r"more than once: \['k'\]", {"count": 2, "keys": ["k", "k"]}),
    "field twice": (InvalidArgument, "fields given more than once", {"count": 1, "fields": ["x", "x"]}),
    "group size": (InvalidArgument, "at least 1, not 0", {"count": 1, "group_size": 0}),
    "group too large": (InvalidArgument, "gets 3 rows at once", {"count": 3, "group_ids": ["n"] * 3}),
    "group full": (InvalidArgument, "2 rows has 2; 1 more", {"count": 1, "group_ids": ["full"]}),
    "group aborted": (StaleSampleError, "was aborted", {"count": 1, "group_ids": ["aborted"]}),
    "group sealed": (InvalidArgument, "is sealed with 1", {"count": 1, "group_ids": ["sealed"]}),
    "other group size": (InvalidArgument, "has group_size 2", {"count": 1, "group_ids": ["half"], "group_size": 3}),
    "group changed": (InvalidArgument, "cannot move", {"count": 1, "keys": ["key"], "group_ids": ["other"]}),
    "no name": (InvalidArgument, "exactly one of", {"count": 1, "partition_id": None}),
    "wrong name": (WrongType, "must be a str", {"count": 1, "partition_id": 3}),
    "wrong step": (WrongType, "must be an int", {"count": 1, "global_step": "1"}),
    "negative step": (InvalidArgument, "negative", {"count": 1, "global_step": -1}),
    "over capacity": (CapacityExceeded, "capacity of 4 samples.*exceed it by 2", {"count": 6, "global_step": 0}),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_put_raises_and_leaves_the_whole_state_as_before(case: str) -> None:
    """Each wrong put says what is wrong with which values, and nothing of it is applied."""
    queue = Driver(global_batch_size=2, num_n_samples=2, num_global_batch=2)
    queue.put(2, group_ids=["full"] * 2)
    queue.put(1, keys=["key"], tags=[{"a": 1}])
    queue.put(1, group_ids=["half"])
    queue.put(2, group_ids=["sealed", "aborted"])
    queue.seal("sealed")
    queue.abort("aborted")
    assert queue.draw(2) is not None
    before = queue.snapshot()
    error, text, options = ILLEGAL[case]
    with pytest.raises(error, match=text):
        queue.put(**options)
    assert queue.snapshot() == before


def test_rows_of_a_handle_are_written_once_and_by_whole_handles() -> None:
    """Repeated rows, half a handle, keys with a handle, a block of another put and no block are refused."""
    queue = Driver()
    done = queue.put(2, keys=["a", "b"])
    before = queue.snapshot()
    twice = {"indexes": ints(0, 0), "generations": ints(0, 0)}
    with pytest.raises(InvalidArgument, match="repeated rows"):
        queue.put(2, ["y"], **twice)
    with pytest.raises(InvalidArgument, match="one entry per row"):
        queue.put(2, ["y"], indexes=ints(0, 1))
    with pytest.raises(InvalidArgument, match="not with a handle"):
        queue.put(fields=["y"], to=done, keys=["a", "b"])
    with pytest.raises(InvalidArgument, match="2 tags for 1|1 tags for 2"):
        queue.set_tags(done, {})
    with pytest.raises(InvalidArgument, match="must name the block"):
        queue.put(1, (), columns=(column("y"),))
    queue.blocks = iter([UNIT + 1])
    with pytest.raises(InvalidArgument, match="holds the data of an earlier put"):
        queue.put(1)
    assert queue.snapshot() == before


@pytest.mark.parametrize(
    "options",
    [{"num_n_samples": 0}, {"global_batch_size": 0}, {"num_global_batch": -1}, {"num_n_samples": True}],
)
def test_sizes_of_the_ring_are_checked_when_the_ledger_is_made(options: dict[str, Any]) -> None:
    """Zero, negative and truth values are no sizes."""
    with pytest.raises(InvalidArgument, match=f"{next(iter(options))} must be a whole number of at least 1"):
        Ledger(**options)


def test_rows_that_a_partition_is_expected_to_get_come_and_are_not_asked_for_again() -> None:
    queue = Driver()
    queue.ledger.serving.expected_rows = lambda: 5
    queue.put(2)
    queue.ledger.serving.expected_rows = lambda: 0
    assert queue.status().to_come == 3
    queue.restart()
    done = queue.put(4)
    assert queue.status().to_come == 0
    queue.clear(done)
    assert queue.status().to_come == 0
