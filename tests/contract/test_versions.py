"""The version window as its users meet it: by every route, blocking and awaitable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.contract.conftest import AwaitableFace
from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.errors import GetMetaTimeout, InvalidArgument, StaleSampleError, WrongType
from transfer_queue.runtime.embedded import EmbeddedRuntime

CONF = {
    "runtime": "embedded",
    "limits": {"max_staleness": 1, "producer_samples": 100},
    "controller": {"global_batch_size": 4, "num_n_samples": 2},
}


@pytest.fixture(params=["in_process", "unix", "tcp"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., TransferQueueClient]]:
    """Makes clients of a queue whose samples may lag behind the policy by one version."""
    runtime = EmbeddedRuntime(settings(merged(CONF)))
    opened: list[Any] = [runtime]

    def make(name: str) -> TransferQueueClient:
        transport = "tcp" if request.param == "tcp" else "auto"
        connector = runtime if request.param == "in_process" else None
        opened.append(TransferQueueClient(name, runtime.info, transport=transport, connector=connector))
        return opened[-1]

    yield make
    for each in reversed(opened):
        each.close()


@pytest.fixture(params=["blocking", "awaitable"])
def queue(request: pytest.FixtureRequest, connect: Callable[..., TransferQueueClient]) -> Any:
    client = connect("rollout")
    return client if request.param == "blocking" else AwaitableFace(client)


def test_what_is_too_old_is_not_handed_out(queue: Any) -> None:
    """It is dropped and counted, and a draw in vain says so."""
    tags = [{"source": "math"}, {"source": "code"}] * 2
    old = queue.put({"x": torch.arange(4)}, partition_id="p", policy_version=0, tags=tags)
    queue.put({"x": torch.arange(4, 6)}, partition_id="p", policy_version=[1, 2])
    assert queue.set_policy_version(1) == 0
    assert queue.set_policy_version(2) == 4
    assert queue.get_data(queue.get_meta(["x"], 2, "p", task_name="t"))["x"].tolist() == [4, 5]
    with pytest.raises(StaleSampleError):
        queue.get_data(old)
    found = queue.audit("p")["partitions"]["p"]
    assert found["dropped"] == {"stale": 4}
    assert found["stale"] == {"by_producer": {"rollout": 4}, "by_source": {"math": 2, "code": 2}}
    with pytest.raises(GetMetaTimeout, match="4 were dropped as stale"):
        queue.get_meta(["x"], 1, "p", task_name="t", timeout=0.0)
    with pytest.raises(InvalidArgument, match="has version 2, which only rises"):
        queue.set_policy_version(1)


def test_a_lease_is_kept_to_its_end(queue: Any) -> None:
    """Its holder reads, writes and releases; then the samples are gone for all."""
    queue.put({"x": torch.arange(2)}, partition_id="p", policy_version=0)
    meta = queue.get_meta(["x"], 2, "p", task_name="t", lease=30.0)
    assert queue.set_policy_version(2) == 0
    assert queue.get_data(meta)["x"].tolist() == [0, 1]
    queue.put({"reward": torch.ones(2)}, metadata=meta)
    assert queue.release(meta) == 2
    assert queue.audit("p")["partitions"]["p"]["tasks"]["t"]["dropped"] == {"stale": 2}


def test_the_version_may_come_later(queue: Any) -> None:
    """With metadata, alone or with fields, as a number, a list or an array; it does not change."""
    meta = queue.put({"x": torch.arange(3)}, partition_id="p")
    queue.put(metadata=meta, policy_version=np.array([0, 1, 1]))
    queue.put({"y": torch.arange(3)}, metadata=meta, policy_version=[0, 1, 1])
    with pytest.raises(InvalidArgument, match="sample 8 has policy version 0, which does not change"):
        queue.put({"z": torch.arange(3)}, metadata=meta, policy_version=1)
    for wrong, error in ((-1, InvalidArgument), (True, WrongType), ("1", WrongType), ([1, 2], InvalidArgument)):
        with pytest.raises(error, match="policy_version"):
            queue.put({"z": torch.arange(3)}, metadata=meta, policy_version=wrong)
    assert "z" not in meta.field_names
    assert queue.set_policy_version(2) == 1


def test_admission_says_how_many_more(queue: Any) -> None:
    """(version + max_staleness + 1) × 8 samples of a step, less those that carry a version; or what a limit leaves."""
    assert queue.admission() == {
        "policy_version": 0,
        "samples": 16,
        "bytes": None,
        "bounded_by": "limits.max_staleness",
    }
    queue.put({"x": torch.arange(10)}, partition_id="p", policy_version=0)
    assert queue.admission("p")["samples"] == 6
    queue.set_policy_version(1)
    queue.put({"x": torch.arange(80)}, partition_id="q")
    assert queue.admission(0) == {
        "policy_version": 1,
        "samples": 10,
        "bytes": None,
        "bounded_by": "limits.producer_samples",
    }
