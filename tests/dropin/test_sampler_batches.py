"""Batches that samplers keep for ranks: when a draw is served, and with which rows (checklist 24, 25, 26)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from tests.dropin.sampling import KEEPERS, Keeps, ask
from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.ledger.driver import Driver, draw_request, put_request, rows
from transfer_queue import RankAwareSampler, SeqlenBalancedSampler
from transfer_queue.errors import InvalidArgument
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.pairs import SequentialSampler

# ---------------------------------------------------------------- 24, 25: when a draw is served


def test_24_with_too_few_a_sampler_is_asked_only_for_what_it_keeps() -> None:
    """`has_cached_result` is asked with the names of the request; then the batch comes again though nothing is left."""
    asked: list[Any] = []

    class Watched(Keeps):
        def has_cached_result(self, partition_id: str, task_name: str, sampling_config: Any) -> bool:
            found = super().has_cached_result(partition_id, task_name, sampling_config)
            asked.append((partition_id, task_name, sampling_config["dp_rank"], found))
            return found

    queue = Driver(sampler=Watched())
    assert ask(queue, 0) is None
    queue.put(1)
    assert ask(queue, 0) is None
    assert asked == [("p", "t", 0, False)]
    queue.put(1)
    assert ask(queue, 0) == [0, 1]
    assert ask(queue, 0) == [0, 1]
    assert asked[-1] == ("p", "t", 0, True)
    assert ask(queue, 1) is None


def test_25_rows_come_once_per_task_and_in_order() -> None:
    """Never a short batch; what was put again after a clear comes after what was there."""
    queue = Driver(sampler=SequentialSampler())
    first = queue.put(4)
    queue.put(2)
    queue.clear(first)
    queue.put(3)
    order = rows(queue.locate())
    assert [rows(queue.draw(2)), rows(queue.draw(2))] == [order[:2], order[2:4]]
    assert queue.draw(2) is None
    assert rows(queue.draw(5, task="other")) == order
    assert queue.account()["consumed"] == 4


# ---------------------------------------------------------------- 26: the same rows for peers, never a cleared one


def _queue(kind: type[BaseSampler]) -> Driver:
    queue = Driver(sampler=kind)  # each of the two ledgers of a driver makes its own
    queue.put(4)
    return queue


@pytest.mark.parametrize("kind", [*KEEPERS, Keeps])
def test_26_peers_get_the_same_rows_also_late_ones(kind: type[BaseSampler]) -> None:
    """A second batch index gives other rows; the consumption counts once; a parked peer is no different."""
    queue = _queue(kind)
    assert ask(queue, 0) == ask(queue, 0) == [0, 1]
    assert ask(queue, 0, 1) == [2, 3]
    queue.put(4)
    assert ask(queue, 0, 2) == [4, 5]
    assert [ask(queue, 0, index) for index in (0, 1, 2, 0)] == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert queue.account()["consumed"] == 6
    assert queue.draw(2, sampler_params={"dp_rank": 0, "batch_index": 9}, timeout_s=0.0) is not None


@pytest.mark.parametrize("kind", [*KEEPERS, Keeps])
def test_26_a_cleared_row_never_comes_again(kind: type[BaseSampler]) -> None:
    """Though its index does: rows cleared in part or as a whole, key by key or with the partition."""
    queue = _queue(kind)
    assert ask(queue, 0) == [0, 1]
    queue.clear_rows(1)
    assert ask(queue, 0, count=2) == [2, 3]
    queue.clear_rows(0, 2, 3)
    assert ask(queue, 0) is None
    before = {(index, queue.ledger._rows.table.generation[index]) for index in range(4)}
    queue.put(4)
    again = queue.draw(2, sampler_params={"dp_rank": 0, "batch_index": 0}, timeout_s=0.0)
    assert again is not None
    assert not {(row, life - 1) for row, life in zip(rows(again), again.generations.tolist(), strict=True)} & before
    queue.clear("p")
    assert queue.ledger._drawing.samplers._default._states == {}
    queue.put(1)
    assert ask(queue, 0) is None


def test_26_what_samplers_keep_does_not_grow_when_rows_are_cleared() -> None:
    """Batch after batch in one partition that is never cleared as a whole."""
    queue = Driver(sampler=RankAwareSampler)
    for index in range(50):
        queue.put(2)
        drawn = queue.draw(2, sampler_params={"dp_rank": 0, "batch_index": index})
        queue.clear(drawn)
    assert queue.ledger._drawing.samplers._default._states == {}
    assert not queue.ledger._drawing.assignments.of_partition("p")


@pytest.mark.parametrize("kind", [*KEEPERS, Keeps])
def test_26_reset_consumption_forgets_what_is_kept(kind: type[BaseSampler]) -> None:
    """Rows are ready again, and go to whoever asks first."""
    queue = _queue(kind)
    assert [ask(queue, 0, index) for index in (0, 1)] == [[0, 1], [2, 3]]
    queue.reset("t")
    assert [ask(queue, 0, index) for index in (1, 0)] == [[0, 1], [2, 3]]


def test_26_an_answer_that_is_lost_is_kept_for_its_rank() -> None:
    """Nobody else gets those rows, and they are not consumed until the rank has them."""
    queue = _queue(RankAwareSampler)
    assert ask(queue, 0) == [0, 1]
    assert queue.cancel()
    assert (queue.account()["consumed"], queue.account()["reserved"]) == (0, 2)
    assert ask(queue, 1) == [2, 3]
    assert ask(queue, 0) == [0, 1]
    assert queue.account()["consumed"] == 4


def test_26_a_lease_covers_a_kept_batch() -> None:
    """Given back, it stays reserved for its rank; peers share the lease."""
    queue = _queue(RankAwareSampler)
    params = {"dp_rank": 0, "batch_index": 0}
    one, two = (queue.lease(2, sampler_params=params) for _ in range(2))
    assert one is not None and two is not None and one.lease_token == two.lease_token
    queue.release(one)
    assert ask(queue, 1) == [2, 3]
    three = queue.lease(2, sampler_params=params)
    assert three is not None and rows(three) == [0, 1]
    assert queue.ack(three) == 2
    assert queue.account()["consumed"] == 4


@pytest.mark.parametrize("kind", [*KEEPERS, Keeps])
def test_26_what_is_kept_comes_back_after_a_restart(kind: type[BaseSampler]) -> None:
    """From the state as a whole, and (as after every call of a driver) from the records alone."""
    queue = _queue(kind)
    assert ask(queue, 0) == [0, 1]
    before = copy.deepcopy(queue.ledger._drawing.samplers._default._states)
    queue.restart()
    assert queue.ledger._drawing.samplers._default._states == before
    assert queue.shadow._drawing.samplers._default._states == before
    assert ask(queue, 0) == [0, 1]
    queue.clear_rows(0)
    queue.put(1)
    assert ask(queue, 0) is not None


def test_26_a_sampler_given_as_an_object_gets_its_batches_when_it_is_given_again() -> None:
    """What it kept is not lost with it, and follows what is cleared meanwhile."""
    queue = Driver()
    queue.put(6)
    queue.register("t", Keeps())
    assert [ask(queue, 0, index) for index in (0, 1)] == [[0, 1], [2, 3]]
    queue.restart()
    with pytest.raises(InvalidArgument, match="register it again"):
        ask(queue, 0)
    queue.clear_rows(2)
    again = Keeps()
    queue.register("t", again)
    assert again._states == {"p": {"t": {0: {0: [0, 1]}}}}
    assert [ask(queue, 0, index) for index in (0, 1)] == [[0, 1], [4, 5]]


def test_26_a_sampler_named_by_requests_keeps_its_batches_over_a_restart() -> None:
    """It is made again with the state that it had."""
    queue = Driver()
    queue.put(4)
    params = {"sampler": "RankAwareSampler", "dp_rank": 0, "batch_index": 0}
    assert rows(queue.draw(2, sampler_params=params)) == [0, 1]
    queue.restart()
    assert rows(queue.draw(2, sampler_params=params)) == [0, 1]


def test_26_a_sampler_says_itself_what_comes_back() -> None:
    """With `save_checkpoint` and `load_checkpoint` of its own, after each draw."""

    class Counts(BaseSampler):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def sample(self, ready_indexes: list[int], batch_size: int, **kwargs: Any) -> Any:  # type: ignore[override]
            self.calls += 1
            return ready_indexes[:batch_size], ready_indexes[:batch_size]

        def save_checkpoint(self) -> dict[str, Any]:
            return {"calls": self.calls}

        def load_checkpoint(self, state: dict[str, Any]) -> None:
            self.calls = state["calls"]

    queue = Driver(sampler=Counts)
    queue.put(4)
    queue.draw(1)
    queue.draw(1)
    assert queue.shadow._drawing.samplers._default.calls == 2
    queue.restart()
    assert queue.ledger._drawing.samplers._default.calls == 2


def test_26_an_object_that_served_another_queue_begins_anew() -> None:
    """Its batches were of rows that this queue never had."""
    sampler = RankAwareSampler()
    for _ in range(2):
        queue = Driver(sampler=sampler)
        assert ask(queue, 0) is None
        queue.put(4)
        assert ask(queue, 0) == [0, 1]


@pytest.mark.parametrize("snapshot", [False, True])
def test_26_what_is_kept_comes_back_from_a_journal(tmp_path: Path, snapshot: bool) -> None:
    """As records, and as a snapshot: a share that no rank has yet, and one that its rank has."""

    def balanced() -> BaseSampler:
        return SeqlenBalancedSampler(1, 2)

    life = Life(tmp_path / "journal", sampler=balanced)
    announce(life)
    life.ask(put_request(4, ("x",), UNIT + 1))
    params = {"dp_rank": 0, "batch_index": 0}
    first = life.ask(draw_request(2, ("x",), "t", sampler_params=params))
    if snapshot:
        keeper = life.service._answers.keeper
        assert keeper is not None
        keeper.snapshot().join()
    life.service.close()
    again = Life(tmp_path / "journal", sampler=balanced)
    assert rows(again.ask(draw_request(2, ("x",), "t", sampler_params=params))) == rows(first)
    late = again.ask(draw_request(2, ("x",), "t", sampler_params=params | {"dp_rank": 1}))
    assert sorted(rows(late) + rows(first)) == [0, 1, 2, 3]
    again.service.close()
