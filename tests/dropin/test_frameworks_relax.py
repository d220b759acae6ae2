"""Relax: components that attach by a stored configuration, ranks with samplers that keep their batches, streams.

The tests imitate its calls (names of arguments, processes, data), as far as they could be inferred; they do not run it.
`custom_meta=` and `is_last=` of a put are of its own version of the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from transfer_queue.sampler import GRPOGroupNSampler, RankAwareSampler

import transfer_queue as tq
from tests.dropin.columns import jagged
from tests.dropin.processes import in_processes, working
from transfer_queue import BatchMeta, StreamingDataLoader, StreamingDataset

GLOBAL_BATCH, RANKS, MICRO = 16, 2, 2
FIELDS = ["tokens", "total_lengths", "rewards", "metadata"]

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


def configuration(sampler: Any) -> dict[str, Any]:
    return {
        "runtime": "embedded",
        "layout": "jagged",
        "controller": {"sampler": sampler, "polling_mode": True, "token": "of the framework"},
        "backend": {"SimpleStorage": {"total_storage_size": 1000, "capacity_bytes": 1 << 25}},
    }


@pytest.fixture(params=["RankAwareSampler", "GRPOGroupNSampler"])
def conf(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The controller expects a global batch in each partition."""
    tq.close()
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", str(GLOBAL_BATCH))
    sampler = {"RankAwareSampler": RankAwareSampler(), "GRPOGroupNSampler": GRPOGroupNSampler(n_samples_per_prompt=4)}
    yield tq.init(conf=configuration(sampler[request.param]))
    tq.close()


def lengths(rows: range) -> list[int]:
    return [1 + row % 3 for row in rows]


def rollouts(rows: range) -> TensorDict:
    """Jagged tokens, scalars, dicts or None, and rows that are ragged in a strided nested tensor."""
    td = TensorDict({"tokens": jagged(*lengths(rows), dtype=torch.int64)}, batch_size=len(rows))
    td["total_lengths"] = torch.tensor(lengths(rows))
    td["rewards"] = torch.tensor([float(row) for row in rows])
    td["metadata"] = NonTensorStack(*[{"row": row} if row % 2 else None for row in rows])
    td["routed_experts"] = torch.nested.nested_tensor([torch.full((n, 2), n) for n in lengths(rows)])
    return td


async def generate(partition: str, is_last: bool = True) -> None:
    """The rollout component: four puts, the lengths as tags, the last one says so."""
    client = tq.get_client()
    for start in range(0, GLOBAL_BATCH, 4):
        rows = range(start, start + 4)
        last = is_last and start + 4 == GLOBAL_BATCH
        tags = [{"total_lengths": length} for length in lengths(rows)]
        await client.async_put(data=rollouts(rows), partition_id=partition, custom_meta=tags, is_last=last)


def _actor_rank(conf: Any, rank: int, partition: str) -> tuple[list[list[int]], list[float]]:
    """Draws its batches by index; peers of the rank ask for the same ones."""
    assert tq.init(conf).controller.token == "of the framework"
    client, seen, rewards = tq.get_client(), [], []
    for index in range(GLOBAL_BATCH // RANKS // 4):
        sampling = {
            "dp_rank": rank,
            "task_name": "actor_train",
            "batch_index": index,
            "partition_id": partition,
            "x": 1,
        }
        meta = BatchMeta()
        while not meta.size:
            meta = client.get_meta(
                data_fields=FIELDS,
                batch_size=4,
                partition_id=partition,
                task_name="actor_train",
                sampling_config=sampling,
            )
        data = client.get_data(meta)
        assert data["tokens"].offsets().diff().tolist() == data["total_lengths"].tolist()
        assert [tag["total_lengths"] for tag in meta.custom_meta] == data["total_lengths"].tolist()
        seen.append(meta.global_indexes)
        rewards += data["rewards"].tolist()
    tq.close()
    return seen, rewards


def test_ranks_draw_while_rows_come(conf: Any) -> None:
    """Every process of a rank gets the rank's rows; ranks share nothing; then the step is drained and reset."""
    partition = "train_0"
    calls = [(conf, rank, partition) for rank in range(RANKS) for _ in range(2)]
    with working(_actor_rank, calls) as results:
        asyncio.run(generate(partition))
        found = results()
    assert found[0] == found[1] and found[2] == found[3]
    assert sorted(found[0][1] + found[2][1]) == [float(row) for row in range(GLOBAL_BATCH)]
    client = tq.get_client()

    async def ready() -> tuple[bool, bool, bool]:
        consumed = await client.async_check_consumption_status("actor_train", partition)
        produced = await client.async_check_production_status(FIELDS, partition)
        return consumed, produced, await client.async_check_consumption_status("ref", partition)

    assert asyncio.run(ready()) == (True, True, False)
    assert client.check_production_completed(partition) and client.check_stream_drained("actor_train", partition)
    assert client.reset_consumption(partition_id=partition, task_name="actor_train") is True
    assert not client.check_consumption_status("actor_train", partition)
    assert not client.check_stream_drained("actor_train", partition)
    assert asyncio.run(client.async_get_partition_list()) == [partition]
    asyncio.run(client.async_clear_partition(partition))
    assert asyncio.run(client.async_get_partition_list()) == []


def test_readiness_of_a_step_that_is_not_whole_yet(conf: Any) -> None:
    """A part of the global batch is neither produced nor consumed, whatever was drawn of it."""
    client = tq.get_client()
    sampling = {"dp_rank": 0, "task_name": "ref", "batch_index": 0, "partition_id": "train_9"}

    async def ready() -> tuple[bool, bool]:
        produced = await client.async_check_production_status(data_fields=FIELDS, partition_id="train_9")
        return produced, await client.async_check_consumption_status(task_name="ref", partition_id="train_9")

    asyncio.run(client.async_put(data=rollouts(range(4)), partition_id="train_9"))
    assert client.get_meta(FIELDS, 4, "train_9", task_name="ref", sampling_config=sampling).size == 4
    assert asyncio.run(ready()) == (False, False)
    asyncio.run(client.async_put(data=rollouts(range(4, GLOBAL_BATCH)), partition_id="train_9"))
    assert asyncio.run(ready()) == (True, False)
    rest = client.get_meta(FIELDS, 12, "train_9", task_name="ref", sampling_config={**sampling, "batch_index": 1})
    assert rest.size == 12 and asyncio.run(ready()) == (True, True)


def test_lengths_that_are_told_afterwards(conf: Any) -> None:
    """`update_custom_meta` and `async_set_custom_meta` of what a put returned; draws show them."""
    client = tq.get_client()

    async def produce() -> BatchMeta:
        meta = await client.async_put(data=rollouts(range(4)), partition_id="train_1")
        meta.update_custom_meta([{"total_lengths": length} for length in lengths(range(4))])
        await client.async_set_custom_meta(meta)
        return meta

    put = asyncio.run(produce())
    sampling = {"dp_rank": 0, "task_name": "ref", "batch_index": 0, "partition_id": "train_1"}
    drawn = client.get_meta(FIELDS, 4, "train_1", task_name="ref", sampling_config=sampling)
    assert drawn.custom_meta == put.custom_meta == [{"total_lengths": length} for length in lengths(range(4))]
    experts = client.get_data(drawn.select_fields(FIELDS), fields=["routed_experts"])["routed_experts"]
    assert experts._offsets.diff().tolist() == lengths(range(4)) and experts._values.shape[1] == 2


def _streaming_rank(conf: Any, rank: int, partition: str) -> tuple[list[float], int]:
    """A rank that trains on a stream: micro-batches of data and meta that agree."""
    dataset = StreamingDataset(
        config=conf,
        batch_size=4,
        micro_batch_size=MICRO,
        data_fields=FIELDS,
        partition_id=partition,
        task_name="actor_train",
        dp_rank=rank,
        should_check_consumption_status=True,
    )
    rewards: list[float] = []
    with closing(StreamingDataLoader(dataset)) as loader:
        for data, meta in loader:
            assert meta.size == len(data["total_lengths"].tolist()) == MICRO
            assert [len(part) for part in meta.chunk(2)] == [1, 1]
            assert data["tokens"].offsets().diff().tolist() == data["total_lengths"].tolist()
            rewards += data["rewards"].tolist()
        batches = len(loader.get_buffer())
    return rewards, batches


def test_ranks_that_stream(conf: Any) -> None:
    """They begin before the rows come, end with them, and see each row once."""
    partition = "train_2"
    with working(_streaming_rank, [(conf, rank, partition) for rank in range(RANKS)]) as results:
        asyncio.run(generate(partition))
        found = results()
    assert sorted(found[0][0] + found[1][0]) == [float(row) for row in range(GLOBAL_BATCH)]
    assert found[0][1] + found[1][1] == GLOBAL_BATCH // 4


def test_a_component_attaches_by_the_stored_configuration(conf: Any) -> None:
    """Its own conf is ignored where a queue runs, and its end ends nobody else."""
    asyncio.run(generate("train_3", is_last=False))
    assert in_processes(_looks_for_room, [(conf, "train_3")]) == [(GLOBAL_BATCH, False)]
    assert tq.get_client().get_partition_list() == ["train_3"]


def _looks_for_room(conf: Any, partition: str) -> tuple[int, bool]:
    """Back-pressure: how many rows are there, is the step complete?"""
    tq.init(conf)
    client = tq.get_client()
    rows, _ = client.get_production_status(FIELDS, partition)
    found = len(rows), client.check_production_completed(partition)
    tq.close()
    return found
