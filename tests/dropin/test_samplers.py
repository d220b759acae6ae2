"""Samplers that return (handed out, marked consumed): as given, told apart and called directly (checklist 4)."""

from __future__ import annotations

import json
import pickle
import random
from typing import Any

import pytest

import transfer_queue as tq
from tests.dropin.sampling import KEEPERS, Keeps
from transfer_queue import GRPOGroupNSampler, RankAwareSampler, SeqlenBalancedSampler
from transfer_queue.errors import InvalidArgument, UnknownName
from transfer_queue.samplers import BaseSampler, as_sampler
from transfer_queue.samplers.balancing import get_seqlen_balanced_partitions
from transfer_queue.samplers.description import describe, make
from transfer_queue.samplers.dialect import returns_pairs
from transfer_queue.samplers.pairs import SequentialSampler

# ---------------------------------------------------------------- 4: given in the configuration


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (GRPOGroupNSampler(2), GRPOGroupNSampler),
        (RankAwareSampler, RankAwareSampler),
        ("SeqlenBalancedSampler", SeqlenBalancedSampler),
        (lambda: SeqlenBalancedSampler(2, 4), SeqlenBalancedSampler),
        (SequentialSampler(), SequentialSampler),
    ],
)
def test_4_a_sampler_is_given_as_instance_class_name_or_callable(given: Any, expected: type[BaseSampler]) -> None:
    """Each becomes a sampler of that class."""
    assert type(as_sampler(given)) is expected


def test_4_an_unknown_name_is_a_value_error_that_contains_it() -> None:
    """It is a `LookupError` too."""
    with pytest.raises(ValueError, match="NoSuchSampler") as caught:
        as_sampler("NoSuchSampler")
    assert isinstance(caught.value, LookupError) and isinstance(caught.value, UnknownName)
    with pytest.raises(ValueError, match="NoSuchSampler"):
        tq.init({"runtime": "embedded", "controller": {"sampler": "NoSuchSampler"}})


@pytest.mark.parametrize(
    "given",
    [
        "RankAwareSampler",
        RankAwareSampler,
        SeqlenBalancedSampler(2, 4),
        tq.DPSampler(1, 2, inner=GRPOGroupNSampler(3)),
        lambda: GRPOGroupNSampler(2),
        Keeps(),
    ],
)
def test_4_a_sampler_reaches_another_process_without_pickle(given: Any) -> None:
    """As plain values: its class by its name, and what it holds."""
    made = as_sampler(make(json.loads(json.dumps(describe(given)))))
    assert type(made) is type(as_sampler(given)) and repr(made) == repr(as_sampler(given))


def test_4_what_a_sampler_keeps_travels_with_it() -> None:
    """Dicts with any keys, tuples and lists."""
    sampler = RankAwareSampler()
    where = {"task_name": "t", "partition_id": "p"}
    sampler.sample([0, 1], 2, dp_rank=0, batch_index=3, **where)
    made = as_sampler(make(json.loads(json.dumps(describe(sampler)))))
    assert made._states == sampler._states == {"p": {"t": {0: {3: ([0, 1], [0, 1])}}}}


def test_4_what_another_process_cannot_make_is_refused() -> None:
    """A class within a function, and an instance that holds what JSON does not."""

    class Local(Keeps):
        pass

    with pytest.raises(InvalidArgument, match="of a class of a module"):
        describe(Local)
    odd = Keeps()
    odd.lock = object()  # type: ignore[attr-defined]
    with pytest.raises(InvalidArgument, match="holds <object object"):
        describe(odd)


# ---------------------------------------------------------------- which dialect


class _Signatures:
    def native(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> tuple[list[int], list[int]]: ...

    def pairs(self, ready_indexes: Any, batch_size: int) -> Any: ...

    def stars(self, ready: Any, n: int, *args: Any, **kwargs: Any) -> Any: ...

    def told(self, ready: Any, n: int, partition: Any) -> Any: ...

    def annotated(self, ready: Any, n: int) -> tuple[list[int], list[int]]: ...

    def either(self, ready: Any, n: int) -> list[int] | tuple[list[int], list[int]]: ...

    def plain(self, ready: Any, n: int, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        ("native", False),
        ("pairs", True),
        ("stars", True),
        ("told", True),
        ("annotated", True),
        ("either", False),
        ("plain", False),
    ],
)
def test_the_dialect_is_told_by_the_signature(name: str, pairs: bool) -> None:
    """The first argument's name decides; else `*args`, `partition`, or a pair as annotated result."""
    made = type("Made", (BaseSampler,), {"sample": getattr(_Signatures, name)})()
    assert returns_pairs(made) is pairs
    assert not returns_pairs(tq.SequentialSampler()) and not returns_pairs(tq.GRPOSampler())
    assert all(returns_pairs(known()) for known in [*KEEPERS, SequentialSampler, Keeps])


# ---------------------------------------------------------------- the classes, used directly


def test_sequential_returns_the_first_rows_twice() -> None:
    """Two lists, and the call is `sample`."""
    sampler = SequentialSampler()
    assert sampler.sample([3, 1, 7], 2) == sampler([3, 1, 7], 2) == ([3, 1], [3, 1])
    assert sampler(ready_indexes=[4], batch_size=2, dp_rank=0) == ([4], [4])


def test_group_n_scans_sorted_indexes_for_consecutive_runs() -> None:
    """The example of the contract, any order of indexes, and too few."""
    sampler = GRPOGroupNSampler(n_samples_per_prompt=3)
    ready = [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]
    assert sampler.sample(ready, 6) == ([3, 4, 5, 9, 10, 11], [3, 4, 5, 9, 10, 11])
    assert sampler.sample(ready[::-1], 3)[0] == [3, 4, 5]
    assert sampler.sample(ready, 9) == sampler.sample([], 3) == ([], [])
    with pytest.raises(ValueError, match="must be a multiple of n_samples_per_prompt"):
        sampler.sample(ready, 4)
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="must be positive"):
            GRPOGroupNSampler(wrong)


def test_rank_aware_gives_later_callers_the_same_list() -> None:
    """By the four names; another batch index or rank takes from what is ready."""
    sampler = RankAwareSampler()
    where = {"task_name": "t", "partition_id": "p"}
    first = sampler.sample([0, 1, 2, 3], 2, dp_rank=0, batch_index=0, **where)
    assert first == ([0, 1], [0, 1])
    assert sampler.sample([7], 2, dp_rank=0, batch_index=0, **where) == first
    assert sampler.sample([2, 3], 2, dp_rank=0, batch_index=1, **where)[0] == [2, 3]
    assert sampler.sample([5], 2, dp_rank=1, batch_index=0, **where) == ([], [])
    first[0].append(99)
    assert sampler.sample([], 2, dp_rank=0, batch_index=0, **where)[0] == [0, 1]
    with pytest.raises(ValueError, match="dp_rank must be at least 0"):
        sampler.sample([0, 1], 2, dp_rank=-1, batch_index=0, **where)
    with pytest.raises(ValueError, match="needs dp_rank"):
        sampler.sample([0, 1], 2, batch_index=0, **where)
    with pytest.raises(ValueError, match="needs batch_index"):
        sampler.sample([0, 1], 2, dp_rank=0, **where)


class _Tagged:
    """A partition that knows lengths."""

    def __init__(self, lengths: dict[int, int]) -> None:
        self.lengths = lengths

    def get_custom_meta(self, indexes: list[int]) -> dict[int, dict[str, Any]]:
        return {index: {"total_lengths": self.lengths[index]} for index in indexes if index in self.lengths}


def test_seqlen_balanced_deals_whole_groups_of_about_equal_length() -> None:
    """Equal counts; the sums differ by less than the longest group; without a partition the shares are contiguous."""
    lengths = {index: 10 * (index // 2) + 1 for index in range(16)}
    sampler = SeqlenBalancedSampler(n_samples_per_prompt=2, dp_size=2)
    where = {"task_name": "t", "partition_id": "p", "batch_index": 0, "partition": _Tagged(lengths)}
    shares = [sampler.sample(list(range(20)), 8, dp_rank=rank, **where)[0] for rank in (1, 0)]
    assert sorted(shares[0] + shares[1]) == list(range(16))
    assert all(len(share) == 8 and [i // 2 for i in share[::2]] == [i // 2 for i in share[1::2]] for share in shares)
    sums = [sum(lengths[index] for index in share) for share in shares]
    assert abs(sums[0] - sums[1]) <= 2
    plain = SeqlenBalancedSampler(2, 2)
    assert [plain.sample(list(range(8)), 4, dp_rank=rank)[0] for rank in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert plain.sample(list(range(8)), 4, dp_rank=2) == ([], [])
    assert plain.sample(list(range(8, 15)), 4, dp_rank=0, batch_index=1) == ([], [])
    with pytest.raises(ValueError, match="dp_size must be positive"):
        SeqlenBalancedSampler(dp_size=0)
    with pytest.raises(ValueError, match="must be a multiple"):
        plain.sample(list(range(8)), 3, dp_rank=0)


def test_balanced_partitions_cover_all_and_are_as_equal_as_they_can_be() -> None:
    """Known best answers, 200 random cases, and the two refusals."""
    assert get_seqlen_balanced_partitions([8, 7, 6, 5, 4], 2, False) in ([[0, 1], [2, 3, 4]], [[0, 2], [1, 3, 4]])
    assert get_seqlen_balanced_partitions([1, 2, 3, 4], 2, True) == [[0, 3], [1, 2]]
    rng = random.Random(5)
    for _ in range(200):
        k = rng.randint(1, 6)
        equal = rng.random() < 0.5
        lengths = [rng.randint(0, 100) for _ in range(k * rng.randint(1, 6) if equal else k + rng.randint(0, 20))]
        parts = get_seqlen_balanced_partitions(lengths, k, equal)
        assert sorted(at for part in parts for at in part) == list(range(len(lengths)))
        assert len(parts) == k and all(part and part == sorted(part) for part in parts)
        assert not equal or {len(part) for part in parts} == {len(lengths) // k}
        sums = [sum(lengths[at] for at in part) for part in parts]
        assert max(sums) - min(sums) <= max(lengths)
    with pytest.raises(AssertionError, match="at least k_partitions"):
        get_seqlen_balanced_partitions([1, 2], 3, False)
    with pytest.raises(AssertionError, match="equal size"):
        get_seqlen_balanced_partitions([1, 2, 3], 2, True)


def test_the_states_are_those_of_the_contract() -> None:
    """`_states[partition][task][dp_rank][batch_index]`; asked for, cleared, saved, loaded and pickled in one place."""
    sampler = Keeps()
    config = {"dp_rank": 1, "batch_index": 4}
    assert not sampler.has_cached_result("p", "t", config)
    sampler.sample([5, 6], 2, dp_rank=1, batch_index=4, task_name="t", partition_id="p")
    assert sampler.has_cached_result("p", "t", config)
    assert not sampler.has_cached_result("p", "t", {"batch_index": 4})
    assert not sampler.has_cached_result("p", "t", {"dp_rank": 1})
    assert not sampler.has_cached_result("q", "t", config)
    saved = sampler.save_checkpoint()
    assert saved == {"_states": {"p": {"t": {1: {4: [5, 6]}}}}}
    for other in (Keeps(), pickle.loads(pickle.dumps(sampler))):
        other.load_checkpoint(saved)
        assert other._states == sampler._states and other._states is not saved["_states"]
    sampler.clear_cache("p")
    sampler.clear_cache("p")
    assert sampler._states == {} and saved["_states"]
