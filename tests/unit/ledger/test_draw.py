"""Draws: who gets which rows, what comes with them, what is refused, what they cost."""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest

from tests.unit.ledger.driver import Driver, draw_request, ints, rows
from transfer_queue.errors import InvalidArgument, TransferQueueError, UnknownName, WrongType
from transfer_queue.messages import Drawn


def test_a_task_gets_rows_that_have_its_fields_and_no_others() -> None:
    """With one field there and one missing, a task that needs only the first is served."""
    queue = Driver()
    done = queue.put(2, ["x"])
    assert rows(queue.draw(2, ["x"], "first")) == rows(done)
    assert queue.draw(2, ["x", "y"], "both") is None
    queue.put(fields=["y"], to=done)
    assert rows(queue.answers[queue.ticket - 1]) == rows(done)


def test_a_row_consumed_by_one_task_comes_once_to_another() -> None:
    """Consumption is a matter of each task alone."""
    queue = Driver()
    done = queue.put(2)
    assert rows(queue.draw(2, task="a")) == rows(queue.draw(2, task="b")) == rows(done)
    assert queue.draw(1, task="a") is None
    assert queue.draw(1, task="b") is None
    status = queue.status("a")
    assert status.consumption is not None
    assert status.consumption.tolist() == [1, 1]


def test_rows_come_in_allocation_order_even_where_slots_are_reused() -> None:
    """The order is that of insertion, not of global indexes."""
    queue = Driver()
    first = queue.put(2)
    queue.put(2)
    queue.clear(first)
    queue.put(2)
    assert rows(queue.draw(4)) == [2, 3, 0, 1]


def test_the_order_in_which_fields_are_asked_for_is_kept_and_does_not_matter() -> None:
    """Two field orders share one ready set; each reply has its own order."""
    queue = Driver()
    queue.put(4, ["x", "y"])
    first, second = queue.draw(2, ["y", "x"]), queue.draw(2, ["x", "y"])
    assert first is not None
    assert second is not None
    assert (first.fields, second.fields) == (("y", "x"), ("x", "y"))
    assert [column.name for column in first.columns] == ["y", "x"]
    assert rows(first) + rows(second) == [0, 1, 2, 3]


def test_a_draw_brings_keys_groups_and_places() -> None:
    """What a handle carries beside its indexes; None where no row has it."""
    queue = Driver(num_n_samples=2)
    queue.put(2, keys=["a", "b"], group_ids=["g", "g"])
    drawn = queue.draw(2)
    assert drawn is not None
    assert (drawn.partition_id, drawn.keys, drawn.group_ids, drawn.tags) == ("p", ("a", "b"), ("g", "g"), None)
    assert drawn.produced is None
    assert drawn.extra_info == {}
    assert drawn.generations.tolist() == [0, 0]


def test_overlapping_field_sets_of_a_task_never_hand_a_row_out_twice() -> None:
    """A row drawn for one field set is gone for all field sets of the task."""
    queue = Driver()
    queue.put(4, ["x", "y"])
    assert queue.draw(1, ["y"]) is not None
    assert queue.draw(1, ["x", "y"]) is not None
    assert rows(queue.draw(2, ["x"])) == [2, 3]


def test_an_undelivered_draw_is_undone() -> None:
    """Rows of a cancelled draw are ready again, in their old place, and only once."""
    queue = Driver()
    queue.put(4)
    assert rows(queue.draw(2)) == [0, 1]
    assert queue.cancel()
    assert not queue.cancel()
    assert queue.account()["consumed"] == 0
    assert rows(queue.draw(4)) == [0, 1, 2, 3]


def test_undoing_a_draw_serves_whom_it_kept_waiting() -> None:
    """A parked draw gets the rows that never reached the first client."""
    queue = Driver()
    queue.put(2)
    assert queue.draw(2) is not None
    first = queue.ticket
    assert queue.draw(2) is None
    queue.cancel(first)
    assert rows(queue.answers[queue.ticket]) == [0, 1]


@pytest.mark.parametrize("how", ["reset", "clear", "clear and insert"])
def test_a_draw_whose_rows_were_given_back_or_cleared_is_not_undone_any_more(how: str) -> None:
    """A late cancel must not take rows from those who got them since."""
    queue = Driver()
    done = queue.put(2)
    assert queue.draw(2) is not None
    first = queue.ticket
    if how == "reset":
        queue.reset()
    else:
        queue.clear(done if how == "clear" else "p")
        queue.put(2)
    owner = queue.draw(2)
    queue.cancel(first)
    assert queue.draw(1) is None
    assert rows(owner) == [0, 1]
    assert queue.account()["pending"] == 0


def test_a_reset_gives_rows_back_to_one_task_or_to_all() -> None:
    """What was consumed or reserved is ready again; other tasks and partitions are untouched."""
    queue = Driver()
    queue.put(2)
    queue.put(1, partition_id="q")
    for task in ("a", "b"):
        assert queue.draw(2, task=task) is not None
    assert queue.draw(1, task="a", partition_id="q") is not None
    queue.reset("a")
    assert (queue.account("a")["pending"], queue.account("b")["pending"]) == (2, 0)
    queue.reset()
    assert (queue.account("a")["pending"], queue.account("b")["pending"]) == (2, 2)
    assert queue.account("a", "q")["pending"] == 0
    assert rows(queue.draw(2, task="b")) == [0, 1]
    queue.reset("nobody")
    queue.reset(partition="nowhere")
    assert set(queue.ledger.reports.audit("p")["partitions"]["p"]["tasks"]) == {"a", "b"}


ILLEGAL: dict[str, tuple[type[TransferQueueError], str, dict[str, Any]]] = {
    "zero": (InvalidArgument, "at least 1, not 0", {"count": 0}),
    "negative": (InvalidArgument, "at least 1, not -2", {"count": -2}),
    "fraction": (WrongType, "must be an int, not 1.5", {"count": 1.5}),
    "no task": (InvalidArgument, "needs a task_name", {"task": ""}),
    "no field": (InvalidArgument, "at least one field", {"fields": ()}),
    "field type": (InvalidArgument, "at least one field", {"fields": (1,)}),
    "more than a step": (InvalidArgument, "holds at most 4.*draw of 5 can never", {"count": 5, "global_step": 1}),
    "ranks more than a step": (
        InvalidArgument,
        "draw of 6 can never",
        {"count": 3, "global_step": 1, "sampler_params": {"dp_rank": 0, "dp_size": 2}},
    ),
    "groups": (InvalidArgument, r"\(3\) must be divisible by num_n_samples \(2\)", {"count": 3, "get_n_samples": True}),
    "sampler": (
        UnknownName,
        "unknown sampler 'GRPOSampl'.*did you mean 'GRPOSampler'",
        {"sampler_params": {"sampler": "GRPOSampl"}},
    ),
    "sampler type": (WrongType, "registered name", {"sampler_params": {"sampler": 3}}),
    "rank": (
        InvalidArgument,
        r"dp_rank must lie in \[0, dp_size=2\), not 2",
        {"sampler_params": {"dp_rank": 2, "dp_size": 2}},
    ),
    "size alone": (InvalidArgument, "give both", {"sampler_params": {"dp_size": 2}}),
    "size zero": (InvalidArgument, "must be positive, not 0", {"sampler_params": {"dp_rank": 0, "dp_size": 0}}),
    "rank type": (WrongType, "must be an int", {"sampler_params": {"dp_rank": "0", "dp_size": 2}}),
    "group id": (
        WrongType,
        "dp_group_id must be",
        {"sampler_params": {"dp_rank": 0, "dp_size": 2, "dp_group_id": 1.5}},
    ),
    "batch index": (
        WrongType,
        "batch_index must be an int",
        {"sampler_params": {"dp_rank": 0, "dp_size": 2, "batch_index": "0"}},
    ),
    "group size": (
        InvalidArgument,
        "num_n_samples must be a whole number of at least 1, not 0",
        {"get_n_samples": True, "sampler_params": {"num_n_samples": 0}},
    ),
    "both addresses": (InvalidArgument, "exactly one of", {"partition_id": None}),
}


@pytest.mark.parametrize("case", ILLEGAL)
def test_an_illegal_draw_raises_at_once_and_leaves_the_whole_state_as_before(case: str) -> None:
    """A draw that no state could serve is refused, not parked, also where its partition does not exist yet."""
    queue = Driver(global_batch_size=2, num_n_samples=2, num_global_batch=2)
    queue.put(4)
    assert queue.draw(1, task="other") is not None
    before = queue.snapshot()
    error, text, options = ILLEGAL[case]
    with pytest.raises(error, match=text):
        queue.draw(**options)
    assert queue.snapshot() == before


def test_more_draws_than_the_ledger_remembers_stay_delivered() -> None:
    """Only the latest thousands of draws can be undone; memory does not grow with draws."""
    queue = Driver()
    queue.put(5000)
    for _ in range(5000):
        assert queue.ledger.draw(draw_request(1), queue._next(), 0.0) is not None
    assert not queue.cancel(1)
    assert queue.cancel(5000)
    assert queue.account()["pending"] == 1


def _median_of_draws(queue: Driver, count: int) -> float:
    """Seconds per draw of 64 rows; each is undone, so that all meet the same state."""
    request, spent = draw_request(64, ["x", "y", "z"]), []
    for _ in range(count):
        ticket = queue._next()
        start = time.perf_counter()
        drawn = queue.ledger.draw(request, ticket, 0.0)
        spent.append(time.perf_counter() - start)
        assert isinstance(drawn, Drawn)
        queue.ledger.cancel(ticket, 0.0)
    return statistics.median(spent)


def test_a_draw_of_64_rows_costs_the_same_at_a_thousand_and_a_million_rows() -> None:
    """The medians of interleaved rounds differ by less than 2×; the best of five attempts counts."""
    small, large = Driver(), Driver()
    for queue, size in ((small, 1_000), (large, 1_000_000)):
        queue.put(size, ["x", "y", "z"])
        taken = queue.draw(size // 2 // 64 * 64, ["x", "y", "z"])  # the first half is consumed
        assert taken is not None
        assert len(taken.indexes) == size // 2 // 64 * 64
    ratios = [_median_of_draws(large, 50) / _median_of_draws(small, 50) for _ in range(5)]
    assert min(ratios) < 2, ratios


def test_draws_of_rows_far_apart_are_served_in_order() -> None:
    """Ready rows may lie anywhere in the table."""
    queue = Driver()
    done = queue.put(10_000, ["x"])
    far = ints(1, 1_023, 1_024, 5_000, 9_999)
    queue.put(5, ["y"], indexes=done.indexes[far], generations=done.generations[far])
    assert rows(queue.draw(2, ["y"])) == [1, 1_023]
    assert rows(queue.draw(3, ["x", "y"])) == [1_024, 5_000, 9_999]
