"""Calls on metadata that become work on rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from recipe.grpo_tiny.runtimes import RUNTIMES, Runtime
from recipe.verl_style.bridge import METRICS, BatchWorker, WorkerGroup, on_batch
from recipe.verl_style.protocol import DataProto
from transfer_queue import KVBatchMeta
from transfer_queue.errors import KeyNotFound


class Doubler(BatchWorker):
    def __init__(self, connect: Any, fail_on: int, rank: int) -> None:
        super().__init__(connect(f"doubler-{rank}"))
        self._fail_on = fail_on
        self._rank = rank

    @on_batch("x")
    def double(self, data: DataProto) -> DataProto:
        """Twice as much."""
        assert data.batch.keys() == {"x"}
        if self._rank == self._fail_on:
            raise ZeroDivisionError(f"rank {self._rank}")
        measured = {"rows": len(data.batch["x"]), "step": data.meta_info["step"]}
        return DataProto({"doubled": 2 * data.batch["x"]}, meta_info={METRICS: measured})

    def rank(self) -> int:
        return self._rank


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    started = RUNTIMES["embedded"]()
    started.start({})
    yield started
    started.close()


def batch_of(runtime: Runtime, size: int) -> KVBatchMeta:
    rows = TensorDict({"x": torch.arange(size), "unread": torch.zeros(size)}, [size])
    batch = runtime.client.kv_batch_put([f"k{row}" for row in range(size)], "p", rows, [{"n": 1}] * size)
    batch.extra_info = {"step": 7}
    return batch


def test_a_batch_is_shared_out_and_put_together(runtime: Runtime) -> None:
    """In order, with the new fields, the tags, what the caller attached, and each worker's numbers."""
    group = WorkerGroup(runtime, Doubler, 2, -1)
    batch = batch_of(runtime, 5)
    done = group.dispatch("double", batch)
    assert done.keys == batch.keys
    assert done.fields == ["doubled", "unread", "x"]
    assert done.tags == [{"n": 1}] * 5
    assert done.extra_info == {"step": 7, METRICS: {"rows": [3, 2], "step": [7, 7]}}
    assert runtime.client.kv_batch_get_by_meta(done, "doubled")["doubled"].tolist() == [0, 2, 4, 6, 8]
    assert group.call("rank") == [0, 1]


def test_what_a_worker_raises_is_raised(runtime: Runtime) -> None:
    group = WorkerGroup(runtime, Doubler, 2, 1)
    with pytest.raises(ZeroDivisionError, match="rank 1"):
        group.dispatch("double", batch_of(runtime, 4))


def test_a_missing_row_is_not_made_anew(runtime: Runtime) -> None:
    """A put creates keys that are not there, so the read before it has to notice."""
    batch = batch_of(runtime, 4)
    runtime.client.kv_clear("k3", "p")
    with pytest.raises(KeyNotFound, match="k3"):
        WorkerGroup(runtime, Doubler, 2, -1).dispatch("double", batch)
    assert list(runtime.client.kv_list("p")["p"]) == ["k0", "k1", "k2"]


def test_a_failure_is_seen_without_waiting(runtime: Runtime) -> None:
    """Of the futures that have not ended nothing is said."""
    group = WorkerGroup(runtime, Doubler, 2, 1)
    runtime.raise_failed(group.start("rank"))
    futures = group.start("double", batch_of(runtime, 2))
    with pytest.raises(ZeroDivisionError):
        runtime.gather(futures)
    with pytest.raises(ZeroDivisionError):
        runtime.raise_failed(futures)


def test_a_bridged_method_keeps_its_name() -> None:
    assert (Doubler.double.__name__, Doubler.double.__doc__) == ("double", "Twice as much.")
