"""The replay buffer against the queue that it follows."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from recipe.verl_style.replay import ReplayBuffer
from transfer_queue import TransferQueueClient
from transfer_queue.errors import GetMetaTimeout

PARTITION = "train"


def put(client: TransferQueueClient, keys: Sequence[str], version: int = 0, status: str = "finished") -> None:
    tags = [{"status": status, "version": version}] * len(keys)
    rows = {"responses": torch.arange(len(keys))}
    client.put(rows, partition_id=PARTITION, keys=keys, tags=tags, policy_version=version)


def buffer_of(client: TransferQueueClient, timeout_s: float = 10.0) -> ReplayBuffer:
    return ReplayBuffer(client, PARTITION, timeout_s)


def test_each_sample_comes_once_and_oldest_first(client: TransferQueueClient) -> None:
    """Also when fields are added to samples in use; samples that are not finished do not count."""
    buffer = buffer_of(client)
    put(client, ["a0", "a1"])
    put(client, ["x0", "x1"], status="running")
    put(client, ["b0", "b1"])
    batch = buffer.sample(2)
    assert (batch.keys, batch.partition_id) == (["a0", "a1"], PARTITION)
    assert batch.tags[0] == {"status": "finished", "version": 0}
    client.kv_put("a0", PARTITION, {"rewards": torch.tensor(1.0)}, tag={"seen": True})
    assert buffer.sample(2).keys == ["b0", "b1"]
    put(client, ["c0"])
    client.kv_put("x0", PARTITION, tag={"status": "finished"})
    assert buffer.sample(2).keys == ["c0", "x0"]


def test_sampling_waits_for_the_next_put(client: TransferQueueClient) -> None:
    buffer = buffer_of(client)
    put(client, ["a0"])
    with ThreadPoolExecutor(1) as threads:
        sampled = threads.submit(buffer.sample, 2)
        put(client, ["b0"])
        assert sampled.result(timeout=10).keys == ["a0", "b0"]
    assert len(buffer) == 0


def test_what_became_too_old_is_forgotten(client: TransferQueueClient) -> None:
    """The queue drops it when the policy moves on; what came later takes its place."""
    buffer = buffer_of(client)
    put(client, ["old0", "old1", "old2"], version=0)
    put(client, ["new0", "new1"], version=1)
    assert buffer.sample(1).keys == ["old0"]
    client.kv_clear(["old0"], PARTITION)
    assert client.set_policy_version(2) == 2
    assert buffer.sample(2).keys == ["new0", "new1"]
    assert repr(buffer) == "<ReplayBuffer of 'train': 0 samples wait, 2 are in use>"


def test_waiting_in_vain_says_what_is_missing(client: TransferQueueClient) -> None:
    buffer = buffer_of(client, timeout_s=0.05)
    put(client, ["a0"])
    with pytest.raises(GetMetaTimeout, match="train"):
        buffer.sample(2)
    assert len(buffer) == 1
