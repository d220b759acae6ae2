"""Order of partitions and rows over reused slots, and what a put returns (checklist 14, 19, 25, 31)."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import transfer_queue as tq
from tests.dropin.columns import batch
from tests.integration.starting import TIMEOUT_S, program, wait_until
from transfer_queue import BatchMeta, TransferQueueClient


def test_14_partitions_are_listed_in_the_order_in_which_they_came(client: TransferQueueClient, partition: str) -> None:
    """One that was cleared and made anew comes last, in every function that lists them."""
    names = [f"{partition}_{name}" for name in "cab"]
    for name in names:
        client.put(batch(1), partition_id=name, keys=["k"])
    client.put(batch(1), partition_id=names[0], keys=["k2"])
    client.clear_partition(names[1])
    client.kv_put("k", names[1], tag={})
    expected = [names[0], names[2], names[1]]
    assert client.get_partition_list() == expected == asyncio.run(client.async_get_partition_list())
    listing: Any = client.kv_list()
    assert list(listing) == expected
    for name in names:
        client.clear_partition(name)
    client.clear_partition(names[0])  # unknown by now
    assert client.get_partition_list() == []


def test_25_rows_of_one_put_have_consecutive_indexes_after_many_clears(
    client: TransferQueueClient, partition: str
) -> None:
    """Ascending within the put; what is drawn comes in the order of the puts, not of the indexes."""
    random = np.random.default_rng(0)
    metas: list[BatchMeta] = []
    for turn in range(200):
        count = int(random.integers(1, 9))
        meta = client.put({"turn": torch.full((count,), turn)}, partition_id=partition)
        first = meta.global_indexes[0]
        assert meta.global_indexes == list(range(first, first + count))
        metas.append(meta)
        if len(metas) > 5:
            client.clear_samples(metas.pop(int(random.integers(len(metas)))))
    drawn = client.get_meta(["turn"], sum(map(len, metas)), partition, task_name="t")
    turns = client.get_data(drawn)["turn"].tolist()
    assert turns == sorted(turns) and drawn.global_indexes != sorted(drawn.global_indexes)
    assert drawn.global_indexes == [index for meta in metas for index in meta.global_indexes]


def test_19_what_a_put_by_key_returns(client: TransferQueueClient, partition: str) -> None:
    """Keys as they were given, and an `extra_info` that is empty and the caller's own."""
    client.kv_batch_put(["a", "b"], partition, batch(2), [{"n": 1}, {}])
    meta = client.kv_batch_put(["b", "a"], partition, batch(2, y=torch.zeros(2)), [{"m": 2}, {"m": 3}])
    assert (meta.keys, meta.tags, meta.partition_id) == (["b", "a"], [{"m": 2}, {"n": 1, "m": 3}], partition)
    assert (meta.fields, meta.extra_info) == (["x", "y"], {})
    meta.extra_info["mine"] = 1
    meta.tags[0]["m"] = 9
    assert client.kv_put("b", partition, tag={"k": 1}).extra_info == {}
    assert client.kv_list(partition) == {partition: {"a": {"n": 1, "m": 3}, "b": {"m": 2, "k": 1}}}


def test_31_metas_of_several_partitions_are_read_and_cleared_as_one(
    client: TransferQueueClient, partition: str
) -> None:
    """In the order of the meta."""
    other = f"{partition}_other"
    metas = [
        client.put({"x": torch.arange(2) + start}, partition_id=name) for start, name in ((0, partition), (5, other))
    ]
    joined = BatchMeta.concat(metas[::-1])
    assert client.get_data(joined)["x"].tolist() == [5, 6, 0, 1]
    joined.reorder([2, 0, 3, 1])
    assert client.get_data(joined)["x"].tolist() == [0, 5, 1, 6]
    assert [len(part) for part in joined.chunk_by_partition()] == [2, 2]
    assert client.clear_samples(joined) == 4
    client.clear_partition(other)


def test_01_one_client_has_every_method_in_both_forms() -> None:
    """`x` and `async_x`, under either name of the class."""
    assert TransferQueueClient is tq.AsyncTransferQueueClient
    names = [name.removeprefix("async_") for name in dir(TransferQueueClient) if name.startswith("async_")]
    assert {"put", "get_meta", "get_data", "clear_samples", "clear_partition", "kv_put", "kv_list"} <= set(names)
    for name in names:
        assert callable(getattr(TransferQueueClient, name))


@pytest.mark.parametrize("runtime", ["embedded", "processes"])
def test_08_a_program_that_never_closes_ends_and_leaves_nothing(runtime: str) -> None:
    code = f"""
        import torch
        import transfer_queue as tq
        conf = tq.init({{"runtime": "{runtime}"}})
        tq.kv_put("a", "p", {{"x": torch.ones(2)}})
        infos = [conf.controller.zmq_info, *conf.backend.SimpleStorage.zmq_info.values()]
        print(*[info.folder for info in infos])
        """
    with program(code) as process:
        output, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors
    folders = [Path(name) for name in output.split()]
    assert len(folders) == 2
    wait_until(lambda: not any(folder.exists() for folder in folders))
