"""Draws split over data-parallel ranks: one owner per row, replay, cancels, clears, disagreement."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.unit.ledger.driver import Driver, rows
from transfer_queue import BaseSampler, DPSampler, GRPOSampler, SequentialSampler
from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.ledger import assignments, state


def test_ranks_get_contiguous_slices_of_one_selection() -> None:
    """Whoever asks first, rank r gets the r-th slice; the rows are consumed when all have theirs."""
    queue = Driver()
    queue.put(8)
    assert rows(queue.rank(1, 2, 2, group="g")) == [2, 3]
    assert queue.account() | {"reserved": 4, "consumed": 0, "pending": 4} == queue.account()
    assert rows(queue.rank(0, 2, 2, group="g")) == [0, 1]
    assert queue.account() | {"reserved": 0, "consumed": 4, "pending": 4} == queue.account()
    assert rows(queue.rank(0, 2, 2, group="h")) == [4, 5]


def test_a_batch_index_names_several_batches_of_one_group() -> None:
    """The group id may stay; the batch index tells its batches apart."""
    queue = Driver()
    queue.put(4)
    for index in (0, 1):
        assert rows(queue.rank(0, 2, 1, group="g", params={"batch_index": index})) == [2 * index]
        assert rows(queue.rank(1, 2, 1, group="g", params={"batch_index": index})) == [2 * index + 1]


@pytest.mark.parametrize("named", [True, False])
def test_a_thousand_random_schedules_with_skew_give_each_row_to_one_rank(named: bool) -> None:
    """Ranks run ahead or behind, rows come early or late: no row comes twice, none is lost, slices fit together."""
    steps, ranks = 3, 4
    for seed in range(500):
        order = random.Random(seed)
        queue = Driver()
        count = order.choice([1, 2])
        left = steps * ranks * count
        turns = [rank for rank in range(ranks) for _ in range(steps)]
        order.shuffle(turns)
        tickets: dict[int, tuple[int, int]] = {}
        for rank in turns:
            while left and order.random() < 0.5:
                size = min(left, order.randint(1, 5))
                queue.put(size)
                left -= size
            step = sum(who == rank for who, _ in tickets.values())
            got = queue.rank(rank, ranks, count, group=f"step {step}" if named else None)
            tickets[queue.ticket] = (rank, step)
            if got is not None:
                queue.answers[queue.ticket] = got
        if left:
            queue.put(left)
        handed = {tickets[ticket]: rows(answer) for ticket, answer in queue.answers.items()}
        assert len(handed) == steps * ranks
        batches = [[row for rank in range(ranks) for row in handed[rank, step]] for step in range(steps)]
        assert all(batch == sorted(batch) for batch in batches)
        assert sorted(row for batch in batches for row in batch) == list(range(steps * ranks * count))
        assert queue.account()["consumed"] == steps * ranks * count


def test_a_rank_that_asks_again_gets_the_same_rows_until_they_are_cleared() -> None:
    """Restarted ranks and tensor-parallel peers read the slice of their rank, also after the batch was complete."""
    queue = Driver()
    done = queue.put(4)
    first = queue.rank(0, 2, 1, group="g")
    again = queue.rank(0, 2, 1, group="g")
    assert first is not None
    assert again is not None
    assert rows(first) == rows(again) == [0]
    assert (first.extra_info, again.extra_info) == ({}, {"replayed": True})
    assert rows(queue.rank(1, 2, 1, group="g")) == [1]
    assert rows(queue.rank(0, 2, 1, group="g")) == [0]
    assert queue.account()["consumed"] == 2
    queue.clear(done)
    with pytest.raises(StaleSampleError, match="dp_group_id 'g', batch_index 0 were cleared.*came too late"):
        queue.rank(0, 2, 1, group="g")


def test_the_names_of_1024_cleared_batches_are_remembered() -> None:
    """A slow rank gets an error and not new rows, as long as its batch is one of the last 1024 of the task."""
    queue = Driver()
    for number in range(1030):
        queue.put(2)
        drawn = queue.rank(0, 2, 1, group=number)
        assert drawn is not None
        queue.clear(queue.locate())
    queue.put(2)
    for number in (1029, 6):
        with pytest.raises(StaleSampleError, match="came too late"):
            queue.rank(1, 2, 1, group=number)
    assert rows(queue.rank(1, 2, 1, group=5)) == [1]


def test_ranks_without_a_group_name_are_counted_each_for_itself() -> None:
    """The i-th draw of each rank belongs to batch i, whatever the skew."""
    queue = Driver()
    queue.put(6)
    assert [rows(queue.rank(0, 2, 1)) for _ in range(3)] == [[0], [2], [4]]
    assert [rows(queue.rank(1, 2, 1)) for _ in range(3)] == [[1], [3], [5]]
    assert queue.account()["consumed"] == 6


DISAGREE: dict[str, dict[str, Any]] = {
    "dp_size": {"size": 3},
    "batch_size": {"count": 2},
    "inner sampler": {"params": {"sampler": "GRPOSampler"}},
    "get_n_samples": {"get_n_samples": True},
}


@pytest.mark.parametrize("what", DISAGREE)
@pytest.mark.parametrize("group", ["g", None])
def test_ranks_that_disagree_are_refused_and_nothing_changes(what: str, group: str | None) -> None:
    """The first rank fixes the terms; another one that asks otherwise gets an error that names both values."""
    queue = Driver()
    queue.put(12)
    assert queue.rank(0, 2, 1, group=group) is not None
    before = queue.snapshot()
    options: dict[str, Any] = {"rank": 1, "size": 2, "count": 1} | DISAGREE[what]
    with pytest.raises(InvalidArgument, match=f"disagree on {what}: rank 1 asks with"):
        queue.rank(group=group, **options)
    assert queue.snapshot() == before
    assert rows(queue.rank(1, 2, 1, group=group)) == [1]


def test_samplers_with_state_do_not_look_like_ranks_that_disagree() -> None:
    """What a sampler remembers between calls is its own affair."""

    class Counting(BaseSampler):
        calls = 0

        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            self.calls += 1
            return ready_indices[:batch_size]

    queue = Driver(sampler=Counting())
    queue.put(4)
    assert rows(queue.rank(0, 2, 1, group="g")) == [0]
    queue.rank(0, 2, 1, group="h")
    assert rows(queue.rank(1, 2, 1, group="g")) == [1]


@pytest.mark.parametrize("sampler", [GRPOSampler(2), GRPOSampler(), SequentialSampler()])
def test_over_groups_each_rank_gets_whole_groups(sampler: BaseSampler) -> None:
    """With a group sampler, or whole groups on top of another, slices end where groups end."""
    queue = Driver(num_n_samples=2)
    queue.register("t", sampler)
    queue.put(8, group_ids=["a", "b", "a", "c", "b", "d", "d", "c"])
    slices = [rows(queue.rank(rank, 2, 4, group="g", get_n_samples=True)) for rank in (1, 0)]
    assert slices == [[3, 7, 5, 6], [0, 2, 1, 4]]


def test_groups_sealed_smaller_are_split_by_groups_and_not_by_rows() -> None:
    """A rank gets its number of groups, though they have fewer rows."""
    queue = Driver(num_n_samples=3, sampler=GRPOSampler())
    queue.put(5, group_ids=["a", "b", "a", "b", "b"])
    queue.put(3)  # ordinals 5..7: no block of three
    queue.put(1)
    queue.seal("a")
    assert [rows(queue.rank(rank, 2, 3, group="g")) for rank in (0, 1)] == [[0, 2], [1, 3, 4]]
    assert queue.rank(0, 2, 3, group="h") is None


def test_a_registered_dp_sampler_gives_defaults_that_a_request_may_override() -> None:
    """The rank of `sampler_params` goes before that of the sampler."""
    queue = Driver(num_n_samples=2)
    queue.register("t", DPSampler(dp_rank=1, dp_size=2, inner=GRPOSampler(2)))
    queue.put(8)
    assert rows(queue.draw(2)) == [2, 3]
    assert rows(queue.draw(2, sampler_params={"dp_rank": 0})) == [0, 1]
    assert rows(queue.draw(2)) == [6, 7]


def test_a_cancelled_rank_gets_its_slice_when_it_asks_again() -> None:
    """Also the draw that completed the batch is undone: the rows are reserved again, and for that rank only."""
    for group in ("g", None):
        queue = Driver()
        queue.put(4)
        assert queue.rank(0, 2, 1, group=group) is not None
        assert queue.rank(1, 2, 1, group=group) is not None
        assert queue.account()["consumed"] == 2
        queue.cancel()
        assert (queue.account()["reserved"], queue.account()["consumed"]) == (2, 0)
        again = queue.rank(1, 2, 1, group=group)
        assert rows(again) == [1]
        assert again is not None
        assert again.extra_info == {}
        assert queue.account()["consumed"] == 2


def test_cancelling_an_older_batch_after_a_newer_one_keeps_both() -> None:
    """Without group names a rank is served first what never reached it, then goes on."""
    queue = Driver()
    queue.put(8)
    assert rows(queue.rank(0, 2, 1)) == [0]
    older = queue.ticket
    assert rows(queue.rank(0, 2, 1)) == [2]
    queue.cancel(older)
    assert [rows(queue.rank(0, 2, 1)) for _ in range(2)] == [[0], [4]]
    assert [rows(queue.rank(1, 2, 1)) for _ in range(3)] == [[1], [3], [5]]
    assert queue.account()["consumed"] == 6


def test_a_slice_that_a_peer_received_stays_delivered_when_the_first_draw_is_cancelled() -> None:
    """One delivery of a rank is enough."""
    queue = Driver()
    queue.put(2)
    assert queue.rank(0, 2, 1, group="g") is not None
    first = queue.ticket
    assert queue.rank(0, 2, 1, group="g") is not None
    assert queue.rank(1, 2, 1, group="g") is not None
    queue.cancel(first)
    assert queue.account()["consumed"] == 2


class Shows(BaseSampler):
    """Hands out `batch_size` rows and consumes the first half of them."""

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        return ready_indices[:batch_size], ready_indices[: batch_size // 2]


def test_rows_that_are_only_shown_are_back_when_the_batch_is_complete() -> None:
    """A sampler that returns pairs composes with ranks; shown rows are reserved until then, and wake who waits."""
    queue = Driver()
    queue.register("t", Shows())
    queue.put(4)
    assert rows(queue.rank(0, 2, 2, group="g")) == [0, 1]
    assert queue.draw(1, sampler_params={"sampler": "SequentialSampler"}) is None
    waiting = queue.ticket
    assert rows(queue.rank(1, 2, 2, group="g")) == [2, 3]
    last = queue.ticket
    assert rows(queue.answers[waiting]) == [2]
    queue.cancel(last)
    assert queue.account() | {"reserved": 2, "consumed": 1, "pending": 1} == queue.account()
    assert rows(queue.rank(1, 2, 2, group="g")) == [2, 3]
    assert queue.account() | {"reserved": 0, "consumed": 3, "pending": 1} == queue.account()


def test_rows_consumed_beyond_those_handed_out_are_reserved_and_consumed_with_them() -> None:
    """A sampler may throw rows away: no rank gets them, and they are gone when the batch is complete."""

    class Discards(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[1 : batch_size + 1], ready_indices[: batch_size + 1]

    queue = Driver()
    queue.register("t", Discards())
    queue.put(6)
    assert rows(queue.rank(0, 2, 1, group="g")) == [1]
    assert queue.account()["reserved"] == 3
    assert rows(queue.rank(1, 2, 1, group="g")) == [2]
    assert queue.account()["consumed"] == 3


@pytest.mark.parametrize("group", ["g", None])
def test_a_late_rank_whose_rows_were_cleared_gets_an_error_and_not_new_rows(group: str | None) -> None:
    """All or some rows of the slice are gone: the other rows go back, and counted ranks stay in step."""
    for cleared in ((2, 3), (3,), (0, 1, 2, 3)):
        queue = Driver()
        queue.put(4)
        queue.put(4)
        assert rows(queue.rank(0, 2, 2, group=group)) == [0, 1]
        queue.clear_rows(*cleared)
        assert queue.account()["reserved"] == 0
        with pytest.raises(StaleSampleError, match="rank 1 of task 't' came too late"):
            queue.rank(1, 2, 2, group=group)
        first, second = (rows(queue.rank(rank, 2, 2, group=group and "next")) for rank in (0, 1))
        expected = [2, 4, 5, 6] if cleared == (3,) else [4, 5, 6, 7]
        assert first + second == expected
        assert queue.account()["reserved"] == 0


def test_a_slice_that_was_read_and_then_cleared_is_stale_for_its_rank_only() -> None:
    """The other ranks still get theirs, and the batch completes."""
    queue = Driver()
    queue.put(4)
    assert queue.rank(0, 2, 2, group="g") is not None
    queue.clear_rows(0)
    with pytest.raises(StaleSampleError):
        queue.rank(0, 2, 2, group="g")
    assert rows(queue.rank(1, 2, 2, group="g")) == [2, 3]
    assert queue.account() | {"reserved": 0, "consumed": 3, "dropped": {"cleared": 1}} == queue.account()


@pytest.mark.parametrize("group", ["g", None])
def test_a_reset_forgets_who_has_which_slice(group: str | None) -> None:
    """After a reset the ranks start again, together, and late cancels change nothing."""
    queue = Driver()
    queue.put(4)
    assert queue.rank(0, 2, 1, group=group) is not None
    first = queue.ticket
    queue.reset("t")
    assert queue.account()["reserved"] == 0
    assert rows(queue.rank(1, 2, 1, group=group)) == [1]
    queue.cancel(first)
    assert rows(queue.rank(0, 2, 1, group=group)) == [0]
    assert queue.account()["consumed"] == 2


def test_a_partition_made_anew_counts_its_ranks_from_the_start() -> None:
    """Clearing a partition forgets the counts of its ranks."""
    queue = Driver()
    queue.put(4)
    assert queue.rank(0, 2, 1) is not None
    first = queue.ticket
    queue.clear()
    queue.put(4)
    assert not queue.cancel(first)
    assert [rows(queue.rank(rank, 2, 1)) for rank in (1, 0)] == [[1], [0]]


def test_a_rank_waits_until_its_slice_has_the_fields_it_wants() -> None:
    """Ranks may ask for different fields; the slice is fixed by the first."""
    queue = Driver()
    done = queue.put(2)
    assert rows(queue.rank(0, 2, 1, group="g")) == [0]
    assert queue.rank(1, 2, 1, group="g", fields=["x", "y"]) is None
    queue.put(fields=["y"], to=done)
    assert rows(queue.answers[queue.ticket - 1]) == [1]


def test_reserved_rows_are_explained() -> None:
    """The explanation names the group, who has its slice and who is waited for."""
    queue = Driver()
    queue.put(4)
    assert queue.rank(2, 4, 1, group="g") is not None
    assert "4 are reserved by dp_group_id 'g' (served ranks [2], waits for ranks [0, 1, 3])" in queue.explain()


def test_what_the_ledger_remembers_does_not_grow_with_the_steps_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches with and without a name leave no trace once they are cleared, and so many others that none is told of."""
    for module in (assignments, state):
        monkeypatch.setattr(module, "REMEMBERED", 64)
    queue = Driver()

    def steps(start: int, count: int) -> int:
        for number in range(start, start + count):
            queue.put(2)
            for rank in (0, 1):
                assert queue.rank(rank, 2, 1, group=number) is not None
                assert queue.rank(rank, 2, 1, task="u") is not None
            queue.clear(queue.locate())
        return _held(queue)

    assert steps(0, 220) + 10 > steps(220, 220)


def _held(queue: Driver) -> int:
    """Number of entries in the containers below the ledger, those of answered draws apart."""
    seen: set[int] = set()
    serving = vars(queue.ledger.serving) | {"undoable": None}
    todo: list[Any] = [vars(queue.ledger) | {"serving": serving}]
    total = 0
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict):
            todo += thing.values()
        elif hasattr(thing, "__dict__") and type(thing).__module__.startswith("transfer_queue"):
            todo.append(vars(thing))
        if isinstance(thing, dict | list | tuple | set) or type(thing).__name__ == "deque":
            total += len(thing)
            if not isinstance(thing, dict):
                todo += list(thing)
    return total


def test_a_rank_that_waits_is_answered_when_another_rank_fixes_the_batch() -> None:
    """Its slice may be there although too few rows of all have its fields; if the terms differ it is told at once."""
    queue = Driver()
    done = queue.put(2, ["x"])
    queue.put(1, ["y"], indexes=done.indexes[1:], generations=done.generations[1:])
    assert queue.rank(1, 2, 1, group="g", fields=["x", "y"]) is None
    assert queue.rank(1, 2, 2, group="g") is None
    assert rows(queue.rank(0, 2, 1, group="g")) == [0]
    assert rows(queue.answers[queue.ticket - 2]) == [1]
    assert isinstance(queue.answers[queue.ticket - 1], InvalidArgument)
