"""Samples that are cleared twice, and what took their place (checklist 21, 30)."""

from __future__ import annotations

import asyncio
import logging
import pickle

import pytest
import torch

from transfer_queue import BatchMeta, TransferQueueClient
from transfer_queue.errors import StaleSampleError


def test_21_samples_that_are_cleared_already_are_no_error(client: TransferQueueClient, partition: str) -> None:
    """Twice with one meta, with a copy of it, and from a coroutine."""
    meta = client.put({"x": torch.arange(4)}, partition_id=partition)
    assert client.clear_samples(meta) == 4
    assert client.clear_samples(meta) == 0
    assert client.clear_samples(pickle.loads(pickle.dumps(meta))) == 0
    assert asyncio.run(client.async_clear_samples(meta)) == 0
    client.clear_partition(partition)
    assert client.clear_samples(meta) == 0
    assert client.clear_samples(BatchMeta()) == 0


def test_21_what_is_there_goes_and_what_is_not_is_left_out(
    client: TransferQueueClient, partition: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The number of those that were removed comes back; that others were gone is worth a line for debugging only."""
    meta = client.put({"x": torch.arange(4)}, partition_id=partition, keys=list("abcd"))
    client.kv_clear(["b", "c"], partition)
    with caplog.at_level(logging.DEBUG, "transfer_queue"):
        assert client.clear_samples(meta) == 2
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("DEBUG", "2 of 4 samples to clear were gone already")
    ]
    assert client.kv_list(partition) == {partition: {}}


def test_21_what_took_the_place_of_cleared_samples_stays(client: TransferQueueClient, partition: str) -> None:
    """Also in another partition; all else that an old handle could do to it is refused."""
    old = client.put({"x": torch.arange(3)}, partition_id=partition)
    client.clear_samples(old)
    new = client.put({"x": torch.arange(3) + 10}, partition_id=f"{partition}_next", keys=list("abc"))
    assert new.global_indexes == old.global_indexes  # the slots are the same, their lives are not
    assert client.clear_samples(old) == 0
    assert client.clear_samples(BatchMeta.concat([old, new])) == 3
    new = client.put({"x": torch.arange(3) + 20}, partition_id=f"{partition}_next", keys=list("abc"))
    assert client.clear_samples(old) == 0
    with pytest.raises(StaleSampleError):
        client.get_data(old)
    with pytest.raises(StaleSampleError):
        client.put({"y": torch.zeros(3)}, metadata=old)
    old.update_custom_meta([{"n": 1}] * 3)
    with pytest.raises(StaleSampleError):
        client.set_custom_meta(old)
    assert client.get_data(new)["x"].tolist() == [20, 21, 22]
    assert client.kv_list(f"{partition}_next") == {f"{partition}_next": {"a": {}, "b": {}, "c": {}}}
    client.clear_partition(f"{partition}_next")


def test_21_clearing_again_gives_no_room_twice(client: TransferQueueClient, partition: str) -> None:
    """The account of the partition counts each sample once."""
    meta = client.put({"x": torch.arange(4)}, partition_id=partition)
    client.get_meta(["x"], 2, partition, task_name="t")
    for _ in range(3):
        client.clear_samples(meta[1:])
    found = client.audit(partition)["partitions"][partition]
    assert found["tasks"]["t"]["dropped"] == {"cleared": 2}
    assert found["live"] == 1
