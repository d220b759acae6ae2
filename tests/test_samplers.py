"""Every way to use a sampler: directly on lists, and as the controller uses it; built-in ones, your own, by name.

No Ray, no sockets: the ledger behind the controller is driven as it is.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.unit.ledger.driver import Driver, rows
from transfer_queue import BaseSampler, DPSampler, GRPOSampler, SequentialSampler
from transfer_queue.errors import (
    GetMetaTimeout,
    InsufficientSamples,
    InvalidArgument,
    SamplerError,
    UnknownName,
    WrongType,
)
from transfer_queue.samplers import ReadyView, as_sampler, create_sampler, register_sampler_class
from transfer_queue.samplers import registry as sampler_table


@pytest.fixture
def sampler_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names registered by a test are gone after it."""
    monkeypatch.setattr(sampler_table, "_CLASSES", dict(sampler_table._CLASSES))


class Newest(BaseSampler):
    """The last rows first."""

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        return ready_indices[::-1][:batch_size]


# ---------------------------------------------------------------- used directly, on lists


def test_sequential_takes_the_first_ready_rows() -> None:
    """In the order given; fewer if there are fewer."""
    sampler = SequentialSampler()
    assert sampler.sample([3, 1, 7, 5], 3) == [3, 1, 7]
    assert sampler([3, 1], 3) == [3, 1]
    assert sampler.sample([], 3) == []


def test_grpo_takes_complete_groups_of_neighbours() -> None:
    """Indices 0..3 are a prompt, 4..7 the next; a prompt that lacks a response is passed over."""
    sampler = GRPOSampler(num_n_samples=4)
    assert list(sampler.sample([0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11], 8)) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert list(sampler.sample([1, 2, 3, 4, 5, 6, 7], 4)) == [4, 5, 6, 7]
    with pytest.raises(ValueError, match="Insufficient ready indices: 1 complete groups of 4, 2 wanted"):
        sampler.sample([1, 2, 3, 4, 5, 6, 7], 8)


def test_grpo_takes_groups_by_id_where_there_are_ids() -> None:
    """Interleaved responses come out adjacent."""
    sampler = GRPOSampler(2)
    groups = {0: "a", 1: "b", 2: "a", 3: "b"}
    assert list(sampler.sample([0, 1, 2, 3], 4, group_ids=groups)) == [0, 2, 1, 3]
    with pytest.raises(InsufficientSamples):
        sampler.sample([0, 1, 3], 4, group_ids=groups)


def test_grpo_needs_whole_groups() -> None:
    """A batch size that is not a multiple of the group, and wrong group sizes, are refused."""
    with pytest.raises(ValueError, match=r"batch_size \(6\) must be divisible by num_n_samples \(4\)"):
        GRPOSampler(4).sample(list(range(8)), 6)
    for wrong in (0, -1):
        with pytest.raises(InvalidArgument, match="must be positive"):
            GRPOSampler(wrong)
    for odd in (2.5, "4", True):
        with pytest.raises(WrongType, match="must be an int"):
            GRPOSampler(odd)  # type: ignore[arg-type]


def test_dp_gives_each_rank_its_slice() -> None:
    """The same ready rows give the same slices; `sample` may name another rank than the constructor."""
    sampler = DPSampler(dp_rank=1, dp_size=2)
    ready = list(range(10, 20))
    assert sampler.sample(ready, 3) == [13, 14, 15]
    assert sampler.sample(ready, 3, dp_rank=0) == [10, 11, 12]
    assert sampler.sample(ready, 3, dp_rank=2, dp_size=3) == [16, 17, 18]
    assert sampler.sample(ready, 6) == []


def test_dp_over_groups_gives_whole_groups() -> None:
    """The inner sampler chooses for all ranks at once."""
    slices = [DPSampler(rank, 2, inner=GRPOSampler(2)).sample([0, 2, 3, 4, 5, 6, 7], 2) for rank in (0, 1)]
    assert [list(part) for part in slices] == [[2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"dp_rank": 2, "dp_size": 2}, InvalidArgument, r"\[0, dp_size=2\), not 2"),
        ({"dp_rank": -1, "dp_size": 2}, InvalidArgument, "not -1"),
        ({"dp_rank": 0, "dp_size": 0}, InvalidArgument, "positive"),
        ({"dp_rank": "0", "dp_size": 2}, WrongType, "must be an int"),
        ({"dp_rank": 0, "dp_size": 2, "world_size": 3}, InvalidArgument, "must be divisible by dp_size"),
        ({"dp_rank": 0, "dp_size": 2, "world_rank": 4, "world_size": 4}, InvalidArgument, "world_rank"),
        ({"inner": DPSampler()}, InvalidArgument, "cannot be the inner sampler"),
        ({"inner": "GRPOSampler"}, WrongType, "inner must be a sampler"),
    ],
)
def test_dp_refuses_ranks_that_cannot_be(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    """When it is made, with the values."""
    with pytest.raises(error, match=text):
        DPSampler(**arguments)


def test_the_default_filter_asks_for_all_fields_and_no_consumption() -> None:
    """On tensors indexed by global index; a field that nobody knows means that nothing is ready."""
    production = torch.tensor([[1, 1], [1, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.int8)
    consumption = torch.tensor([0, 0, 1, 0, 0], dtype=torch.int8)
    mapping = {"prompts": 0, "responses": 1}
    sampler = SequentialSampler()

    def ready(fields: list[str], indices: list[int]) -> list[int]:
        return sampler.filter_ready_indices(indices, production, consumption, fields, mapping)

    assert ready(["prompts", "responses"], [4, 2, 1, 0]) == [4, 0]
    assert ready(["responses"], [0, 1, 2, 3, 4]) == [0, 3, 4]
    assert ready(["rewards"], [0, 1]) == []
    assert ready(["prompts"], []) == []


@pytest.mark.parametrize(
    ("sampler", "shown"),
    [
        (SequentialSampler(), "SequentialSampler()"),
        (GRPOSampler(4), "GRPOSampler(num_n_samples=4)"),
        (DPSampler(1, 2, inner=GRPOSampler(2)), "DPSampler(dp_rank=1, dp_size=2, world_rank=None"),
    ],
)
def test_samplers_are_picklable_and_say_what_they_are(sampler: BaseSampler, shown: str) -> None:
    """A copy looks the same."""
    assert repr(sampler).startswith(shown)
    assert repr(pickle.loads(pickle.dumps(sampler))) == repr(sampler)


def test_a_sampler_without_sample_cannot_be_made() -> None:
    """`sample` is the one method that has to be written."""
    with pytest.raises(TypeError, match="abstract"):
        BaseSampler()  # type: ignore[abstract]


# ---------------------------------------------------------------- given to the controller


@pytest.mark.parametrize("given", [GRPOSampler(2), lambda: GRPOSampler(2), GRPOSampler, "GRPOSampler"])
def test_the_default_sampler_is_an_instance_callable_class_or_name(given: Any) -> None:
    """Without its own number a group sampler takes the controller's."""
    queue = Driver(num_n_samples=2, sampler=given)
    queue.put(5)
    assert rows(queue.draw(4)) == [0, 1, 2, 3]
    with pytest.raises(InvalidArgument, match="must be divisible by"):
        queue.draw(3)


def test_the_request_goes_before_the_task_and_the_task_before_the_default() -> None:
    """Each task has its sampler; one request may name another; the last resort is sequential."""
    queue = Driver(num_n_samples=2, sampler=Newest())
    queue.register("groups", "GRPOSampler")
    queue.put(4)
    assert rows(queue.draw(1)) == [3]
    with pytest.raises(InvalidArgument, match="must be divisible"):
        queue.draw(1, task="groups")
    assert rows(queue.draw(1, task="groups", sampler_params={"sampler": "SequentialSampler"})) == [0]
    queue.register(None, SequentialSampler)
    assert rows(queue.draw(1)) == [0]
    assert rows(queue.draw(1, task="other")) == [0]
    assert queue.ledger.reports.audit()["samplers"] == {
        "": "SequentialSampler()",
        "groups": "GRPOSampler(num_n_samples=None)",
    }


@pytest.mark.parametrize("given", [3, lambda: "sequential", int])
def test_what_is_no_sampler_is_refused(given: Any) -> None:
    """With what it is instead; the samplers stay as they were."""
    queue = Driver()
    before = queue.snapshot()
    with pytest.raises(WrongType, match=r"not a sampler|a sampler is an instance, class, name"):
        queue.register("t", given)
    assert queue.snapshot() == before


def test_names_are_registered_once_and_unknown_ones_list_the_known(sampler_names: None) -> None:
    """The nearest name is suggested; arguments that the class does not take are named."""
    register_sampler_class("newest", Newest)
    register_sampler_class("newest", Newest)
    with pytest.raises(InvalidArgument, match="'newest' is taken by .*Newest"):
        register_sampler_class("newest", SequentialSampler)
    with pytest.raises(WrongType, match="not a subclass"):
        register_sampler_class("list", list)  # type: ignore[arg-type]
    assert isinstance(create_sampler("newest"), Newest)
    assert repr(create_sampler("GRPOSampler", num_n_samples=3)) == "GRPOSampler(num_n_samples=3)"
    with pytest.raises(UnknownName, match=r"unknown sampler 'newst' \(known: .*did you mean 'newest'\?\)"):
        as_sampler("newst")
    with pytest.raises(InvalidArgument, match=r"takes no argument \['n'\] \(it takes: \['num_n_samples'\]\)"):
        create_sampler("GRPOSampler", n=3)
    queue = Driver()
    queue.put(3)
    assert rows(queue.draw(2, sampler_params={"sampler": "newest"})) == [2, 1]


def test_a_sampler_named_by_requests_keeps_its_state_between_them(sampler_names: None) -> None:
    """One instance per task and name."""

    class Alternating(BaseSampler):
        def __init__(self) -> None:
            self.calls = 0

        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            self.calls += 1
            return ready_indices[:batch_size] if self.calls % 2 else ready_indices[-batch_size:]

    register_sampler_class("alternating", Alternating)
    queue = Driver()
    queue.put(6)
    params = {"sampler": "alternating"}
    assert [rows(queue.draw(1, sampler_params=params))[0] for _ in range(4)] == [0, 5, 1, 4]


# ---------------------------------------------------------------- your own


def test_a_sampler_with_sample_only_gets_a_plain_list_of_ready_rows() -> None:
    """And is asked only when there are enough."""
    seen: list[Any] = []

    class Records(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            seen.append(ready_indices)
            return ready_indices[:batch_size]

    queue = Driver(sampler=Records())
    queue.put(1)
    assert queue.draw(2) is None
    assert seen == []
    queue.put(2)
    assert seen == [[0, 1, 2]]
    assert type(seen[0]) is list


def test_a_lazy_sampler_gets_a_view_that_reads_like_a_list() -> None:
    """Slices, single positions, iteration and length are those of the list of ready rows."""
    seen: list[Any] = []

    class Lazy(BaseSampler):
        lazy = True

        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            assert isinstance(ready_indices, ReadyView)
            seen.append(
                (
                    len(ready_indices),
                    list(ready_indices),
                    ready_indices[1:3].tolist(),
                    ready_indices[-2:].tolist(),
                    ready_indices[::-2].tolist(),
                    ready_indices[:-1].tolist(),
                    (ready_indices[0], ready_indices[-1], 2 in ready_indices),
                )
            )
            with pytest.raises(IndexError, match="position 4 of 4"):
                ready_indices[4]
            return ready_indices[:batch_size]

    queue = Driver(sampler=Lazy())
    queue.put(5)
    queue.clear_rows(1)
    assert rows(queue.draw(2)) == [0, 2]
    assert seen == [(4, [0, 2, 3, 4], [2, 3], [3, 4], [4, 2], [0, 2, 3], (0, 4, True))]


def test_a_sampler_with_its_own_filter_gets_status_tensors() -> None:
    """The whole partition, in allocation order; reserved rows look consumed; the tensors are copies."""
    seen: dict[str, Any] = {}

    class Even(BaseSampler):
        def filter_ready_indices(
            self,
            all_indices: list[int],
            production_status: torch.Tensor,
            consumption_status: torch.Tensor,
            data_fields: list[str],
            field_mapping: dict[str, int],
            **kwargs: Any,
        ) -> list[int]:
            ready = super().filter_ready_indices(
                all_indices, production_status, consumption_status, data_fields, field_mapping
            )
            seen.update(all=all_indices, fields=data_fields, mapping=field_mapping, kwargs=kwargs)
            seen["consumed"] = consumption_status[all_indices].tolist()
            production_status.zero_()
            consumption_status.fill_(1)
            return [row for row in ready if row % 2 == 0]

        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[:batch_size]

    queue = Driver()
    queue.put(10, ["x", "y"])
    assert rows(queue.rank(0, 2, 1, group="g")) == [0]
    queue.register("t", Even())
    assert rows(queue.draw(3, ["y"], sampler_params={"own": 1})) == [2, 4, 6]
    assert (seen["all"], seen["fields"], seen["mapping"]) == (list(range(10)), ["y"], {"x": 0, "y": 1})
    assert seen["consumed"] == [1, 1] + [0] * 8
    assert seen["kwargs"] | {"own": 1, "partition_id": "p", "task_name": "t"} == seen["kwargs"]
    assert queue.draw(2, ["y"]) is None
    assert rows(queue.draw(1, ["y"])) == [8]
    assert queue.account()["consumed"] == 4


def test_a_filter_whose_mask_is_all_false_ends_in_an_explained_timeout() -> None:
    """The draw waits, as nothing is let pass, and its error tells the sampler."""

    class MyCustomSampler(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[:batch_size]

        def filter_ready_indices(
            self,
            all_indices: Any,
            production_status: Any,
            consumption_status: Any,
            data_fields: Any,
            field_mapping: Any,
            **kwargs: Any,
        ) -> list[int]:
            ready_mask = torch.zeros(len(all_indices), dtype=torch.bool)
            return [all_indices[i] for i in range(len(all_indices)) if ready_mask[i]]

    queue = Driver(sampler=MyCustomSampler())
    queue.put(4)
    assert queue.draw(2, timeout_s=3.0) is None
    queue.later(3.0)
    error = queue.answers[queue.ticket]
    assert isinstance(error, GetMetaTimeout)
    assert "4 of 2 samples ready in partition 'p' for task 't'; sampler MyCustomSampler()" in str(error)


def test_a_pair_separates_what_is_handed_out_from_what_is_consumed() -> None:
    """Rows that are only shown come again."""

    class Sliding(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[:batch_size], ready_indices[:1]

    queue = Driver(sampler=Sliding())
    queue.put(4)
    assert [rows(queue.draw(3)) for _ in range(2)] == [[0, 1, 2], [1, 2, 3]]
    assert queue.account()["consumed"] == 2
    assert queue.draw(3) is None
    queue.cancel(queue.ticket - 1)
    assert rows(queue.answers[queue.ticket]) == [1, 2, 3]


@pytest.mark.parametrize(
    ("returned", "text"),
    [
        (lambda ready: [ready[0], ready[0]], r"returned rows more than once: \[0\]"),
        (lambda ready: [ready[0], 3], r"not ready for this draw in partition 'p': \[3\]"),
        (lambda ready: [4], r"not ready for this draw in partition 'p': \[4\]"),
        (lambda ready: [-1, 10**9], r"not ready for this draw in partition 'p': \[-1, 1000000000\]"),
        (lambda ready: ([0], [0, 4]), r"not ready for this draw in partition 'p': \[4\]"),
        (lambda ready: [[0], [1]], "not a flat sequence of indices"),
        (lambda ready: [[0], [1, 2]], "not a flat sequence of indices"),
        (lambda ready: [0.5], "not a flat sequence of indices"),
        (lambda ready: 7, "not a flat sequence of indices"),
        (lambda ready: "ab", "not a flat sequence of indices"),
        (
            lambda ready: ready.missing,
            r"raised AttributeError: 'list' object has no attribute 'missing'(.|\n)*Traceback",
        ),
    ],
)
def test_a_result_that_no_draw_may_have_fails_the_request_alone(returned: Callable[[Any], Any], text: str) -> None:
    """Repeated rows, rows that are consumed, of another partition or nowhere, and exceptions; nothing is taken."""

    class Wrong(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return returned(ready_indices)

    queue = Driver()
    queue.put(4)
    queue.put(1, partition_id="q")
    assert rows(queue.draw(1, task="wrong", sampler_params={"sampler": "SequentialSampler"})) == [0]
    queue.cancel()
    queue.clear_rows(3)
    queue.register("wrong", Wrong())
    before = queue.snapshot()
    with pytest.raises(SamplerError, match=text) as caught:
        queue.draw(1, task="wrong")
    assert "Wrong()" in str(caught.value)
    assert queue.snapshot() == before
    assert rows(queue.draw(3)) == [0, 1, 2]


@pytest.mark.parametrize("form", [list, tuple, torch.tensor, lambda chosen: torch.tensor(chosen).numpy()])
def test_a_result_may_be_any_flat_sequence(form: Callable[[Any], Any]) -> None:
    """Lists, tuples (of two as well), tensors and arrays."""

    class Formed(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return form(ready_indices[:batch_size])

    queue = Driver(sampler=Formed())
    queue.put(5)
    assert rows(queue.draw(2)) == [0, 1]
    assert rows(queue.draw(3)) == [2, 3, 4]


@pytest.mark.parametrize(
    "answer", [[], ([], []), ValueError("Insufficient ready indices: 2"), InsufficientSamples("no")]
)
def test_an_empty_result_or_the_error_of_too_few_means_not_yet(answer: Any) -> None:
    """The draw waits, and the sampler is asked again when there is more."""

    class Picky(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            if len(ready_indices) >= 4:
                return ready_indices[:batch_size]
            if isinstance(answer, Exception):
                raise answer
            return answer

    queue = Driver(sampler=Picky())
    queue.put(3)
    assert queue.draw(2) is None
    queue.put(1)
    assert rows(queue.answers[queue.ticket - 1]) == [0, 1]


def test_a_sampler_that_accepts_part_may_hand_out_less() -> None:
    """It is asked with any number of ready rows."""

    class Rest(BaseSampler):
        accepts_partial = True

        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[:batch_size]

    queue = Driver(sampler=Rest())
    queue.put(3)
    assert rows(queue.draw(8)) == [0, 1, 2]


def test_samplers_are_told_where_they_draw_and_what_the_request_brought() -> None:
    """Partition, step, task, group ids, tags and lengths by index, and every entry of `sampler_params`."""
    seen: dict[str, Any] = {}

    class Curious(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            tags, groups, lengths = kwargs["tags"], kwargs["group_ids"], kwargs["seqlens"]
            seen.update(kwargs, tags=dict(tags), group_ids=dict(groups), seqlens=dict(lengths))
            seen["known"] = (0 in tags, 5 in tags)
            with pytest.raises(KeyError):
                tags[10**9]
            return ready_indices[:batch_size]

    queue = Driver(num_n_samples=2, sampler=Curious(), global_batch_size=2)
    queue.put(2, global_step=0, tags=[{"seq_len": 7}, None], group_ids=["g", "g"])
    queue.put(2, partition_id="q", tags=[{"other": 1}] * 2, group_ids=["h", "h"])
    assert rows(queue.draw(1, global_step=0, sampler_params={"alpha": 0.5})) == [0]
    assert seen["partition_id"] == "step_0"
    assert seen["global_step"] == 0
    assert (seen["task_name"], seen["num_n_samples"], seen["alpha"]) == ("t", 2, 0.5)
    assert seen["tags"] == {0: {"seq_len": 7}}
    assert seen["group_ids"] == {0: "g", 1: "g"}
    assert seen["seqlens"] == {0: 7}
    assert seen["known"] == (True, False)


def test_a_sampler_with_few_keywords_gets_only_those() -> None:
    """`**kwargs` is not needed."""

    class Plain(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, task_name: str = "") -> Any:  # type: ignore[override]
            assert task_name == "t"
            return ready_indices[:batch_size]

    queue = Driver(sampler=Plain())
    queue.put(1)
    assert rows(queue.draw(1, sampler_params={"unknown": 1})) == [0]


def test_parameters_that_collide_with_the_arguments_of_a_sampler_are_refused() -> None:
    """The error is that of the request; the next one is served."""
    queue = Driver()
    queue.put(1)
    with pytest.raises(SamplerError, match="multiple values for argument 'batch_size'"):
        queue.draw(1, sampler_params={"batch_size": 2})
    assert rows(queue.draw(1)) == [0]


def test_a_sampler_may_refuse_requests_that_can_never_be_served() -> None:
    """Its `check_request` is asked before anything waits; its bugs are told as such."""

    class Triples(Newest):
        def check_request(self, batch_size: int, **kwargs: Any) -> None:
            if batch_size % 3:
                raise InvalidArgument(f"batch_size ({batch_size}) must be divisible by three")
            if kwargs.get("broken"):
                raise KeyError("broken")

    queue = Driver(sampler=Triples())
    with pytest.raises(InvalidArgument, match="divisible by three"):
        queue.draw(2)
    with pytest.raises(SamplerError, match="Triples.* raised KeyError: 'broken'"):
        queue.draw(3, sampler_params={"broken": True})
    assert queue.draw(3) is None


# ---------------------------------------------------------------- whole groups and ranks, with your own


class EvenHeads(BaseSampler):
    """Lets pass rows of which the first digit is even."""

    def filter_ready_indices(
        self, all_indices: list[int], *args: Any, partition_id: str = "", **kwargs: Any
    ) -> list[int]:
        assert partition_id == "p"
        return [row for row in super().filter_ready_indices(all_indices, *args) if row // 4 % 2 == 0]

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        return ready_indices[:batch_size]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [(Newest(), [6, 7, 4, 5]), (EvenHeads(), [0, 1, 2, 3]), (SequentialSampler(), [0, 1, 2, 3])],
)
def test_whole_groups_on_top_of_any_sampler(sampler: BaseSampler, expected: list[int]) -> None:
    """It chooses among groups by their first rows, and gets no group that lacks a row."""
    queue = Driver(num_n_samples=2, sampler=sampler)
    queue.put(9)
    assert rows(queue.draw(4, get_n_samples=True)) == expected


@pytest.mark.parametrize("declared", [True, False])
def test_a_row_that_leads_no_complete_group_is_no_choice(declared: bool) -> None:
    """Otherwise groups would straddle two prompts."""

    class Second(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return [ready_indices[0] + 1]

    queue = Driver(num_n_samples=2, sampler=Second())
    queue.put(4, group_ids=["a", "a", "b", "b"] if declared else None)
    before = queue.snapshot()
    with pytest.raises(SamplerError, match=r"not ready for this draw in partition 'p': \[1\]"):
        queue.draw(2, get_n_samples=True, timeout_s=0.0)
    assert queue.snapshot()["production"] == before["production"]
    assert queue.account()["consumed"] == 0


def test_pairs_over_whole_groups_consume_whole_groups() -> None:
    """A sampler that shows two groups and consumes one."""

    class ShowTwo(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[:batch_size], ready_indices[:1]

    queue = Driver(num_n_samples=2, sampler=ShowTwo())
    queue.put(6)
    assert [rows(queue.draw(4, get_n_samples=True)) for _ in range(2)] == [[0, 1, 2, 3], [2, 3, 4, 5]]


def test_the_group_size_may_come_with_the_request() -> None:
    """`num_n_samples` in `sampler_params` goes before the controller's number."""
    queue = Driver(num_n_samples=2, sampler=GRPOSampler())
    queue.put(6)
    assert rows(queue.draw(3, sampler_params={"num_n_samples": 3})) == [0, 1, 2]
    with pytest.raises(InvalidArgument, match=r"\(3\) must be divisible by num_n_samples \(2\)"):
        queue.draw(3)


def test_ranks_split_what_any_sampler_chooses() -> None:
    """In its order, in contiguous slices."""
    queue = Driver(sampler=Newest())
    queue.put(6)
    assert [rows(queue.rank(rank, 3, 2, group="g")) for rank in (2, 0, 1)] == [[1, 0], [5, 4], [3, 2]]


def test_a_selection_that_cannot_be_split_evenly_fails() -> None:
    """No rank gets a row, none is reserved."""

    class Three(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            return ready_indices[:3]

    queue = Driver(sampler=Three())
    queue.put(4)
    with pytest.raises(SamplerError, match="returned 3 rows, which cannot be split over 2 ranks"):
        queue.rank(0, 2, 2, group="g")
    assert queue.account()["reserved"] == 0


def test_ranks_of_different_jobs_share_nothing_but_rows() -> None:
    """Different `dp_group_id`s, tasks and partitions each have their own batches."""
    queue = Driver()
    queue.put(4)
    queue.put(2, partition_id="q")
    assert rows(queue.rank(0, 2, 1, group="a")) == [0]
    assert rows(queue.rank(0, 2, 1, group="b")) == [2]
    assert rows(queue.rank(0, 2, 1, group="a", task="u")) == [0]
    assert rows(queue.rank(0, 2, 1, group="a", partition_id="q")) == [4]


def test_a_process_without_such_samplers_never_loads_torch() -> None:
    """Only a filter of your own needs tensors."""
    code = (
        "import sys\n"
        "from tests.unit.ledger.driver import Driver\n"
        "from transfer_queue import DPSampler, GRPOSampler\n"
        "queue = Driver(num_n_samples=2, sampler=DPSampler(inner=GRPOSampler()))\n"
        "queue.put(4)\n"
        "assert queue.draw(2) is not None and queue.draw(2, task='u', get_n_samples=True) is not None\n"
        "loaded = {'torch', 'tensordict', 'ray', 'zmq'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
