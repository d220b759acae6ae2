"""Samplers that return nothing, or something else than rows (checklist 29)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch

from transfer_queue import BaseSampler, TransferQueueClient
from transfer_queue.errors import GetMetaTimeout, InsufficientSamples, SamplerError
from transfer_queue.runtime.embedded import EmbeddedRuntime

Registers: TypeAlias = Callable[[str, Any], Any]

ANSWERS: dict[str, tuple[Any, str]] = {
    "None": (None, "returned None"),
    "a pair with None": (([0], None), "returned None"),
    "an int": (3, "returned 3"),
    "True": (True, "returned True"),
    "a dict": ({"sampled": [0]}, r"returned \{'sampled': \[0\]\}"),
    "a set": ({0}, r"returned \{0\}"),
    "a generator": (iter([0]), "returned <list_iterator"),
    "three lists": (([0], [0], [0]), r"returned \(\[0\], \[0\], \[0\]\)"),
    "text": ("0", "returned '0'"),
}


class Pairs(BaseSampler):
    """Speaks the dialect of pairs."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer

    def sample(self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        return self.answer


class Native(Pairs):
    """Speaks that of this library."""

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:  # type: ignore[override]
        if self.answer is InsufficientSamples:
            raise InsufficientSamples("later")
        return self.answer


class Unnamed(Pairs):
    """Does not say what it is."""

    def __repr__(self) -> str:
        return "something"


class Filtering(BaseSampler):
    """Passes nothing on, where it should pass a list."""

    def filter_ready_indices(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        return ready_indices[:batch_size]


@pytest.fixture
def task(partition: str) -> str:
    return f"task of {partition}"


@pytest.fixture
def registers(queue: EmbeddedRuntime) -> Registers:
    """Gives a task a sampler, as the controller actor does."""
    return lambda task, sampler: queue._controller.service.inspect(
        lambda ledger: ledger.register_sampler(task, sampler)
    )


@pytest.mark.parametrize("kind", [Pairs, Native])
@pytest.mark.parametrize("what", ANSWERS)
def test_29_an_answer_that_is_none_is_an_error_at_once(
    registers: Registers, client: TransferQueueClient, partition: str, task: str, kind: type[Pairs], what: str
) -> None:
    """It names the class, what it returned and what is expected; nothing is consumed, and another sampler is served."""
    answer, text = ANSWERS[what]
    registers(task, kind(answer))
    client.put({"x": torch.arange(4)}, partition_id=partition)
    for params in ({}, {"dp_rank": 0, "batch_index": 0}) if kind is Pairs else ({},):
        with pytest.raises(SamplerError, match=text) as caught:
            client.get_meta(["x"], 2, partition, task_name=task, sampling_config=params, timeout=30)
        assert f"of class {kind.__name__}" in str(caught.value)
        assert "a flat sequence of indices or" in str(caught.value)
        assert ("(sampled, consumed)" in str(caught.value)) == (kind is Pairs)
    assert client.check_consumption_status(task, partition) is False
    registers(task, "SequentialSampler")
    assert client.get_meta(["x"], 4, partition, task_name=task).global_indexes == [0, 1, 2, 3]


def test_29_the_class_is_named_whatever_it_calls_itself(
    registers: Registers, client: TransferQueueClient, partition: str, task: str
) -> None:
    registers(task, Unnamed())
    client.put({"x": torch.arange(4)}, partition_id=partition)
    with pytest.raises(SamplerError, match="sampler something of class Unnamed returned None"):
        client.get_meta(["x"], 2, partition, task_name=task)


def test_29_a_filter_that_returns_nothing_is_an_error(
    registers: Registers, client: TransferQueueClient, partition: str, task: str
) -> None:
    registers(task, Filtering())
    client.put({"x": torch.arange(4)}, partition_id=partition)
    with pytest.raises(SamplerError, match=r"Filtering\(\) of class Filtering returned None"):
        client.get_meta(["x"], 2, partition, task_name=task)


@pytest.mark.parametrize("sampler", [Pairs(([], [])), Native([]), Native(([], [])), Native(InsufficientSamples)])
def test_29_not_enough_yet_is_no_error(
    registers: Registers, client: TransferQueueClient, partition: str, task: str, sampler: BaseSampler
) -> None:
    """An empty answer, and the exception for it: the draw waits."""
    registers(task, sampler)
    client.put({"x": torch.arange(4)}, partition_id=partition)
    with pytest.raises(GetMetaTimeout):
        client.get_meta(["x"], 2, partition, task_name=task, timeout=0.02)
