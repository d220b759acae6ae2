"""NeMo-RL: one adapter over the queue; the driver owns it, workers attach, draws are polled for.

The tests imitate its calls (names of arguments, processes, data); they do not run it. Under Ray it
patches `.options` of both actor classes before the start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict

import transfer_queue as tq
from tests.dropin.columns import jagged, rows_of
from tests.dropin.processes import in_processes, working
from transfer_queue import BatchMeta

COLUMNS = ["input_ids", "input_lengths", "logprobs", "message_log", "sample_mask"]
POLL_S = 0.005
STEP = "step_3"


class Adapter:
    """What the framework calls instead of the queue."""

    def __init__(self, conf: Any = None) -> None:
        self.conf = tq.init(conf=conf) if conf is not None else tq.init()

    def register_partition(self, pid: str) -> None:
        """Make the partition and its columns known by one row, and clear that."""
        zeros = TensorDict({name: torch.zeros(1) for name in COLUMNS}, batch_size=1)
        tq.kv_batch_put(keys=["warmup"], partition_id=pid, fields=zeros, tags=[{}])
        tq.kv_clear(keys=["warmup"], partition_id=pid)

    def put(self, pid: str, keys: list[str], td: TensorDict | None, tags: list[dict[str, Any]]) -> None:
        tq.kv_batch_put(keys=keys, partition_id=pid, fields=td, tags=tags)

    def draw(self, pid: str, task: str, count: int, sampling: dict[str, Any]) -> BatchMeta:
        """An unserved draw is an empty meta."""
        return tq.get_client().get_meta(
            data_fields=COLUMNS,
            batch_size=count,
            partition_id=pid,
            task_name=task,
            mode="fetch",
            sampling_config=sampling,
        )

    def keys_of(self, meta: BatchMeta, pid: str) -> list[str]:
        return tq.get_client().kv_retrieve_keys(global_indexes=meta.global_indexes, partition_id=pid)

    def get(self, keys: list[str], pid: str, fields: list[str]) -> TensorDict:
        return tq.kv_batch_get(keys=keys, partition_id=pid, select_fields=fields)

    def is_consumed(self, task: str, pid: str) -> bool:
        return tq.get_client().check_consumption_status(task_name=task, partition_id=pid)

    def clear_all(self, pid: str) -> None:
        keys = list(tq.kv_list(partition_id=pid).get(pid, {}))
        if keys:
            tq.kv_clear(keys=keys, partition_id=pid)


@pytest.fixture(params=["as_put", "jagged", "dense"])
def adapter(request: pytest.FixtureRequest) -> Iterator[Adapter]:
    """On the packaged configuration with what the framework changes in it."""
    tq.close()
    conf = OmegaConf.load(str(files("transfer_queue") / "config.yaml"))
    conf.controller.polling_mode = True
    conf.backend.SimpleStorage.total_storage_size = 1000
    conf.backend.SimpleStorage.num_data_storage_units = 2
    conf.backend.SimpleStorage.capacity_bytes = 1 << 24
    conf.runtime, conf.layout = "embedded", request.param
    yield Adapter(conf)
    tq.close()


def lengths(rows: range) -> list[int]:
    return [2 + row % 5 for row in rows]


def rollouts(rows: range) -> tuple[list[str], TensorDict, list[dict[str, Any]]]:
    """Types that differ from those of the warm-up: the partition has forgotten them."""
    logs = [[{"role": "user", "content": str(row)}] for row in rows]
    td = TensorDict(
        {
            "input_ids": jagged(*lengths(rows), dtype=torch.int64),
            "input_lengths": torch.tensor(lengths(rows), dtype=torch.int32),
            "logprobs": torch.full((len(rows), 3), 0.5, dtype=torch.bfloat16),
            "sample_mask": torch.ones(len(rows)),
        },
        batch_size=len(rows),
    )
    td["message_log"] = NonTensorStack(*np.array([None, *logs], dtype=object)[1:])
    return [f"sample_{row}" for row in rows], td, [{"input_lengths": length} for length in lengths(rows)]


def _policy_worker(conf: Any, rank: int, draws: int) -> list[str]:
    """One rank: polls, reads with named columns, writes what it computed."""
    adapter = Adapter(conf)
    drawn = []
    while len(drawn) < 4 * draws:
        meta = adapter.draw(STEP, "logprob", 4, {"dp_rank": rank})
        if not meta.size:
            time.sleep(POLL_S)
            continue
        keys = adapter.keys_of(meta, STEP)
        assert len(keys) == 4
        data = adapter.get(keys, STEP, COLUMNS)
        told = [meta.custom_meta[row]["input_lengths"] for row in range(meta.size)]
        assert data["input_lengths"].tolist() == told and data["input_lengths"].shape == (4,)
        assert [len(row) for row in rows_of(data["input_ids"])] == told
        assert all(row.dtype == torch.bfloat16 for row in rows_of(data["logprobs"]))
        assert data["sample_mask"].tolist() == [1.0] * 4
        assert [log[0]["content"] for log in data["message_log"].tolist()] == [key.split("_")[1] for key in keys]
        prev = TensorDict({"prev_logprobs": torch.full((4,), float(rank))}, batch_size=4)
        adapter.put(STEP, keys, prev, [{"rank": rank}] * 4)
        drawn += keys
    tq.close()
    return drawn


def test_a_step_with_polling_workers(adapter: Adapter) -> None:
    """Ranks poll before anything is there; each sample goes to one of them; then all is cleared."""
    adapter.register_partition(STEP)
    assert tq.kv_list(partition_id=STEP) == {STEP: {}}
    with working(_policy_worker, [(adapter.conf, rank, 2) for rank in range(2)]) as results:
        for start in range(0, 16, 8):
            adapter.put(STEP, *rollouts(range(start, start + 8)))
        drawn = results()
    keys = [f"sample_{row}" for row in range(16)]
    assert sorted(drawn[0] + drawn[1]) == sorted(keys)
    assert adapter.is_consumed("logprob", STEP) and not adapter.is_consumed("train", STEP)
    data = adapter.get(keys, STEP, ["prev_logprobs"])
    assert data["prev_logprobs"].tolist() == [0.0 if key in drawn[0] else 1.0 for key in keys]
    tags = tq.kv_list(partition_id=STEP)[STEP]
    assert all(tag == {"input_lengths": 2 + row % 5, "rank": int(f"sample_{row}" in drawn[1])}
               for row, tag in enumerate(tags.values()))  # fmt: skip
    adapter.clear_all(STEP)
    adapter.clear_all(STEP)
    adapter.clear_all("never there")
    assert tq.kv_list(partition_id=STEP) == {STEP: {}} and tq.kv_list(partition_id="never there") == {}


def test_an_asynchronous_controller(adapter: Adapter) -> None:
    """Blocking calls go to threads, many at once: producers per sample, consumers that poll, no sample twice."""
    adapter.register_partition(STEP)

    async def produce(row: int) -> None:
        await asyncio.to_thread(adapter.put, STEP, *rollouts(range(row, row + 1)))

    async def consume() -> list[str]:
        while not (meta := await asyncio.to_thread(adapter.draw, STEP, "train", 2, {})).size:
            await asyncio.sleep(POLL_S)
        return await asyncio.to_thread(adapter.keys_of, meta, STEP)

    async def run() -> list[list[str]]:
        consumers = [asyncio.create_task(consume()) for _ in range(8)]
        await asyncio.gather(*(produce(row) for row in range(16)))
        return await asyncio.gather(*consumers)

    keys = [key for pair in asyncio.run(run()) for key in pair]
    assert sorted(keys) == sorted(f"sample_{row}" for row in range(16))
    assert adapter.is_consumed("train", STEP)


def test_a_column_of_the_warm_up_may_become_any_other(adapter: Adapter) -> None:
    """Registered with float32, written as int64 and as objects; a put of tags alone makes no column."""
    adapter.register_partition(STEP)
    adapter.put(STEP, ["a"], TensorDict({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, batch_size=1), [{}])
    adapter.put(STEP, ["b"], TensorDict({"message_log": NonTensorStack("text")}, batch_size=1), [{}])
    adapter.put(STEP, ["c"], None, [{"input_lengths": 1}])
    assert rows_of(adapter.get(["a"], STEP, ["input_ids"])["input_ids"])[0].dtype == torch.int64
    assert adapter.get(["b"], STEP, ["message_log"])["message_log"].tolist() == ["text"]
    assert tq.kv_list(partition_id=STEP)[STEP]["c"] == {"input_lengths": 1}
    begin = time.monotonic()
    meta = tq.get_client().get_meta(["input_ids"], 2, STEP, task_name="t", sampling_config={})
    assert meta.size == 0 and time.monotonic() - begin < 1.0


def test_attached_workers_close_for_themselves(adapter: Adapter) -> None:
    """What a worker closes, the driver still has."""
    assert in_processes(_reads_partitions_and_closes, [(adapter.conf,)] * 2) == [[STEP]] * 2
    assert tq.get_client().get_partition_list() == [STEP]


def _reads_partitions_and_closes(conf: Any) -> list[str]:
    adapter = Adapter(conf)
    adapter.register_partition(STEP)
    found = tq.get_client().get_partition_list()
    tq.close()
    return found


def test_patched_actors_in_ray(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options of both classes are wrapped first; the driver owns the queue, an actor attaches by its name alone."""
    from transfer_queue.storage.simple_storage import SimpleStorageUnit

    from transfer_queue.controller import TransferQueueController

    tq.close()
    seen: list[Any] = []
    for actor in (TransferQueueController, SimpleStorageUnit):

        def patched(*args: Any, _original: Any = actor.options, _of: Any = actor, **options: Any) -> Any:
            seen.append(_of)
            return _original(*args, **{**options, "max_concurrency": options.get("max_concurrency", 8)})

        monkeypatch.setattr(actor, "options", patched)

    @ray_session.remote(num_cpus=0)
    class Worker:
        def step(self) -> tuple[list[str], list[float]]:
            conf = tq.init()
            assert conf.controller.polling_mode is True
            meta = tq.get_client().get_meta(["x"], 2, STEP, mode="fetch", task_name="train", sampling_config={})
            keys = tq.get_client().kv_retrieve_keys(global_indexes=meta.global_indexes, partition_id=STEP)
            values = tq.kv_batch_get(keys=keys, partition_id=STEP, select_fields=["x"])["x"].tolist()
            tq.close()
            return keys, values

    conf = OmegaConf.load(str(files("transfer_queue") / "config.yaml"))
    conf.runtime, conf.controller.polling_mode = "ray", True
    conf.backend.SimpleStorage.num_data_storage_units = 1
    conf.backend.SimpleStorage.capacity_bytes = 1 << 24
    try:
        Adapter(conf)
        assert seen == [TransferQueueController, SimpleStorageUnit]
        td = TensorDict({"x": torch.arange(2.0)}, batch_size=2)
        tq.kv_batch_put(keys=["a", "b"], partition_id=STEP, fields=td, tags=[{}, {}])
        assert ray_session.get(Worker.remote().step.remote(), timeout=60) == (["a", "b"], [0.0, 1.0])
        assert tq.get_client().check_consumption_status(task_name="train", partition_id=STEP)
    finally:
        tq.close()
