"""Samplers of users: how they are called, and what goes wrong harms nobody else (checklist 28, 29)."""

from __future__ import annotations

from typing import Any

import pytest

import transfer_queue as tq
from tests.dropin.sampling import Keeps, ask
from tests.unit.ledger.driver import Driver, rows
from transfer_queue import GRPOGroupNSampler, RankAwareSampler, SeqlenBalancedSampler
from transfer_queue.errors import GetMetaTimeout, SamplerError
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.pairs import SequentialSampler

# ---------------------------------------------------------------- 28: samplers of users


def test_28_the_call_is_by_position_and_by_the_names_that_the_signature_takes() -> None:
    """The names of the request win over those in `sampling_config`, of which every other entry goes in."""
    seen: dict[str, Any] = {}

    class All(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            seen.update(kwargs, ready=ready_indexes, size=batch_size, args=args)
            return ready_indexes[:batch_size], ready_indexes[:batch_size]

    queue = Driver(sampler=All())
    queue.put(3, tags=[{"a": 1}, None, {"b": [2]}])
    config = {"partition_id": "wrong", "task_name": "wrong", "partition": 3, "dp_size": 2, "alpha": 0.5, "dp_rank": 7}
    assert rows(queue.draw(1, sampler_params=config)) == [0]
    partition = seen.pop("partition")
    assert seen == {"ready": [0, 1, 2], "size": 1, "args": (), "partition_id": "p", "task_name": "t"} | {
        "dp_size": 2,
        "alpha": 0.5,
        "dp_rank": 7,
    }
    assert type(seen["ready"]) is list
    assert partition.get_custom_meta([0, 1, 2, 900]) == {0: {"a": 1}, 2: {"b": [2]}}


def test_28_a_sampler_without_kwargs_gets_what_it_names() -> None:
    """And nothing else, whatever the request brings."""

    class Few(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, task_name: str, alpha: float = 0.0) -> Any:  # type: ignore[override]
            assert (task_name, alpha) == ("t", 0.5)
            return ready_indexes[:batch_size], ready_indexes[:batch_size]

    queue = Driver(sampler=Few)
    queue.put(1)
    assert rows(queue.draw(1, sampler_params={"alpha": 0.5, "beta": 1, "dp_rank": 0})) == [0]


def test_28_dp_rank_alone_means_plain_fresh_draws_of_a_sampler_that_keeps_nothing() -> None:
    """As NeMo-RL asks; with the native sequential sampler of the same name too."""
    for sampler in (SequentialSampler(), tq.SequentialSampler()):
        queue = Driver(sampler=sampler)
        queue.put(4)
        assert [rows(queue.draw(2, sampler_params={"dp_rank": 0})) for _ in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("count", [1, 3, 4])
def test_28_a_sampler_chooses_the_size(count: int) -> None:
    """More or fewer than asked for; nothing is not enough."""

    class Sized(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, size: int = 0, **kwargs: Any) -> Any:  # type: ignore[override]
            return ready_indexes[:size], ready_indexes[:size]

    queue = Driver(sampler=Sized())
    queue.put(4)
    with pytest.raises(GetMetaTimeout):
        queue.draw(2, timeout_s=0.0)
    assert len(rows(queue.draw(1, sampler_params={"size": count}))) == count
    assert queue.account()["consumed"] == count


def test_28_what_is_consumed_may_differ_from_what_is_handed_out() -> None:
    """Rows that are only shown come again."""

    class Sliding(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return ready_indexes[:batch_size], ready_indexes[:1]

    queue = Driver(sampler=Sliding())
    queue.put(4)
    assert [rows(queue.draw(3)) for _ in range(2)] == [[0, 1, 2], [1, 2, 3]]
    assert queue.account()["consumed"] == 2


def test_28_a_sampler_that_changes_its_mind_is_followed() -> None:
    """It answers a rank with new rows although it has kept some: those are drawn, and may be given again."""

    class Moves(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, *, dp_rank: int, **kwargs: Any) -> Any:  # type: ignore[override]
            chosen = ready_indexes[:batch_size]
            self._states["p"] = {"t": {dp_rank: {None: chosen}}}
            return chosen, chosen

    queue = Driver(sampler=Moves)
    queue.put(4)
    params = {"dp_rank": 0}
    assert [rows(queue.draw(2, sampler_params=params)) for _ in range(2)] == [[0, 1], [2, 3]]
    assert queue.account()["consumed"] == 4


# ---------------------------------------------------------------- 29: what goes wrong harms nobody else

WRONG: dict[str, tuple[Any, str]] = {
    "unknown": (lambda ready: ([900], [900]), r"not ready for this draw in partition 'p': \[900\]"),
    "consumed": (lambda ready: (ready[:1], [900]), r"not ready for this draw in partition 'p': \[900\]"),
    "negative": (lambda ready: ([-1], [-1]), r"\[-1\]"),
    "twice": (lambda ready: ([0, 0], [0]), r"more than once: \[0\]"),
    "float": (lambda ready: ([0.0], [0.0]), r"returned \[0.0\], not a flat sequence"),
    "bool": (lambda ready: ([True, 2], [2]), r"returned \[True, 2\], not a flat sequence"),
    "text": (lambda ready: (["0"], ["0"]), r"returned \['0'\], not a flat sequence"),
    "nested": (lambda ready: ([[0]], [[0]]), r"returned \[\[0\]\], not a flat sequence"),
    "raises": (lambda ready: {}["lost"], r"Wrong\(\) raised KeyError: 'lost'(.|\n)*Traceback"),
}


@pytest.mark.parametrize("how", WRONG)
@pytest.mark.parametrize("params", [{}, {"dp_rank": 0, "batch_index": 0}])
def test_29_a_wrong_answer_fails_the_request_alone(how: str, params: dict[str, Any]) -> None:
    """With its text and the values; rows, tasks and what the sampler kept are as before, and others are served."""
    returned, text = WRONG[how]

    class Wrong(BaseSampler):
        def sample(  # type: ignore[override]
            self, ready_indexes: list[int], batch_size: int, *args: Any, dp_rank: int | None = None, **kwargs: Any
        ) -> Any:
            if dp_rank is not None:
                self._states.setdefault("p", {}).setdefault("wrong", {}).setdefault(dp_rank, {})[0] = ready_indexes[:1]
            return returned(ready_indexes)

    sampler = Wrong()
    queue = Driver()
    queue.register("wrong", sampler)
    queue.put(4)
    with pytest.raises(GetMetaTimeout):
        queue.draw(9, task="wrong", timeout_s=0.0, sampler_params=params)
    before = queue.snapshot()
    with pytest.raises(SamplerError, match=text):
        queue.draw(1, task="wrong", sampler_params=params)
    assert queue.snapshot() == before
    assert sampler._states == {}
    assert rows(queue.draw(4)) == [0, 1, 2, 3]


def test_29_a_replay_cannot_consume_other_rows() -> None:
    """The batch is the one that it gave before, the mark is not."""

    class Greedy(Keeps):
        def sample(self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            batch, _ = super().sample(ready_indexes, batch_size, *args, **kwargs)
            return batch, [*batch, *ready_indexes[-1:]] if 0 not in ready_indexes else batch

    queue = Driver(sampler=Greedy())
    queue.put(4)
    assert ask(queue, 0) == [0, 1]
    with pytest.raises(SamplerError, match=r"not in the batch it returned: \[3\]"):
        ask(queue, 0)
    assert queue.account()["consumed"] == 2


def test_29_a_cache_that_is_given_away_twice_is_refused() -> None:
    """Rows that another rank has are no choice, wherever the sampler remembers them."""

    class Everyone(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            return [0, 1], [0, 1]

    queue = Driver(sampler=Everyone())
    queue.put(4)
    assert ask(queue, 0) == [0, 1]
    with pytest.raises(SamplerError, match=r"not ready for this draw in partition 'p': \[0, 1\]"):
        ask(queue, 1)


def test_29_what_a_journal_cannot_hold_is_refused() -> None:
    """Nothing is drawn, and nothing is kept."""

    class Odd(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            self._states["p"] = {"t": {0: {0: object()}}}
            return ready_indexes[:batch_size], ready_indexes[:batch_size]

    queue = Driver(sampler=Odd())
    queue.put(2)
    with pytest.raises(SamplerError, match="_states of sampler Odd"):
        ask(queue, 0)
    assert queue.account()["consumed"] == 0
    assert queue.ledger._drawing.samplers._default._states == {}


@pytest.mark.parametrize(
    ("sampler", "params", "text"),
    [
        (GRPOGroupNSampler(2), {}, "must be a multiple of n_samples_per_prompt"),
        (RankAwareSampler(), {}, "needs dp_rank"),
        (RankAwareSampler(), {"dp_rank": -1, "batch_index": 0}, "at least 0, not -1"),
        (RankAwareSampler(), {"dp_rank": "0", "batch_index": 0}, "dp_rank must be an int"),
        (SeqlenBalancedSampler(3, 2), {"dp_rank": 0}, "must be a multiple"),
    ],
)
def test_29_a_request_that_can_never_be_served_raises_at_once(
    sampler: BaseSampler, params: dict[str, Any], text: str
) -> None:
    """Before anything is ready."""
    queue = Driver(sampler=sampler)
    with pytest.raises((ValueError, TypeError), match=text):
        queue.draw(5, sampler_params=params)


def test_29_a_parked_draw_whose_sampler_raises_fails_alone() -> None:
    """The put that woke it succeeds, and the next draw in line is served."""

    class Picky(BaseSampler):
        def sample(self, ready_indexes: list[int], batch_size: int, *, bad: bool = False, **kwargs: Any) -> Any:  # type: ignore[override]
            if bad:
                raise RuntimeError("not today")
            return ready_indexes[:batch_size], ready_indexes[:batch_size]

    queue = Driver(sampler=Picky())
    for bad in (True, False):
        assert queue.draw(1, sampler_params={"bad": bad}) is None
    queue.put(1)
    failed, served = queue.answers[1], queue.answers[2]
    assert isinstance(failed, SamplerError) and "not today" in str(failed)
    assert rows(served) == [0]


def test_29_a_sampler_that_cannot_clear_its_cache_fails_the_clear() -> None:
    """Nothing is cleared then."""

    class Stuck(SequentialSampler):
        def clear_cache(self, partition_id: str) -> None:
            raise OSError("disk full")

    queue = Driver(sampler=Stuck())
    queue.put(2)
    with pytest.raises(SamplerError, match="raised OSError: disk full"):
        queue.clear("p")
    assert len(queue.locate().indexes) == 2
