"""verl main: one driver, agent loops with many coroutines, training ranks over a private loop.

The tests imitate the calls of its V1 trainer (names of arguments, processes, data), in one synchronous step and in its
asynchronous mode with a checkpoint; they do not run verl.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorData, NonTensorStack, TensorDict

import transfer_queue as tq
from tests.dropin.processes import in_processes, working
from transfer_queue import BatchMeta, KVBatchMeta

CONFIG = """
trainer: {total_epochs: 1}
transfer_queue:
  enable: true
  runtime: embedded
  layout: jagged
  metrics: {enabled: false}
  backend:
    storage_backend: SimpleStorage
    SimpleStorage:
      total_storage_size: 100000
      num_data_storage_units: 8
      capacity_bytes: 8388608
      arena_bytes: 1048576
"""
PROMPTS, SESSIONS = 12, 2
STATUS = {"pending", "running", "finished", "failure", "success"}


@pytest.fixture
def config() -> Iterator[Any]:
    """The larger configuration of a trainer, which has a section for the queue."""
    tq.close()
    config = OmegaConf.create(CONFIG)
    OmegaConf.set_struct(config, True)
    try:
        yield config
    finally:
        tq.close()


# ---------------------------------------------------------------- in agent loops


def response_length(uid: str, session: int) -> int:
    return 3 + int(uid.split("-")[1]) % 4 + session


async def _episode(uid: str, step: int) -> None:
    """One prompt: its status, one put per trajectory, its status again."""
    await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "running"})
    if uid == "uid-0":
        await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "failure"})
        return
    for session in range(SESSIONS):
        length = response_length(uid, session)
        fields = TensorDict(
            {
                "prompts": torch.full((1, 4), session),
                "responses": torch.arange(length).unsqueeze(0),
                "rm_scores": torch.zeros(1, length),
                "uid": NonTensorStack(uid),
                "raw_prompt": NonTensorStack([{"role": "user", "content": uid}]),
                "extra_fields": NonTensorStack({"turns": session}),
            },
            batch_size=1,
        )
        tag = {"status": "success", "prompt_len": 4, "response_len": length, "seq_len": 4 + length}
        tag |= {"global_steps": step, "min_global_steps": step, "max_global_steps": step}
        keys = [f"{uid}_{session}_0"]
        await tq.async_kv_batch_put(keys=keys, fields=fields, tags=[tag], partition_id="train")
    await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "finished"})


def _agent_loop(conf: Any, uids: list[str], step: int) -> None:
    tq.init(conf)

    async def generate_sequences() -> None:
        await asyncio.gather(*(_episode(uid, step) for uid in uids))

    asyncio.run(generate_sequences())
    tq.close()


# ---------------------------------------------------------------- in training ranks


class PrivateLoop:
    """A loop in a thread, for calls that block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _training_rank(conf: Any, meta: BatchMeta, writes: bool) -> tuple[BatchMeta, list[int]]:
    """Every rank of a group reads the same rows, one writes; the silent ones return an empty meta."""
    tq.init(conf)
    client, loop = tq.get_client(), PrivateLoop()
    data = loop.run(client.async_get_data(meta))
    lengths = data["responses"].offsets().diff()
    assert data.to_padded_tensor()["responses"].shape == (len(lengths), int(lengths.max()))
    assert meta.extra_info["temperature"] == 1.0
    output = BatchMeta()
    if writes:
        log_probs = torch.nested.as_nested_tensor(
            [-row.float() for row in data["responses"].unbind()], layout=torch.jagged
        )
        output = loop.run(client.async_put(data=TensorDict({"old_log_probs": log_probs}, len(lengths)), metadata=meta))
        assert output is meta
    loop.close()
    tq.close()
    return output, lengths.tolist()


# ---------------------------------------------------------------- the driver


def issue(uids: list[str], step: int, partition: str = "train") -> None:
    """Prompts: keys that have a tag and no columns, but for one that comes with some."""
    td = TensorDict({"uid": NonTensorStack(*uids), "index": torch.arange(len(uids))}, batch_size=len(uids))
    tags = [{"is_prompt": True, "status": "pending", "global_steps": step} for _ in uids]
    tq.kv_batch_put(keys=list(td["uid"]), partition_id=partition, tags=tags)


def finished(listing: dict[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
    """(prompts that have ended, their trajectories); an unknown status is an error."""
    for key, tag in listing.items():
        assert tag["status"] in STATUS, (key, tag)
        assert tag.get("is_prompt", "_" in key), (key, tag)  # without its tag a prompt were taken for a trajectory
    prompts = [key for key, tag in listing.items() if tag.get("is_prompt") and tag["status"] in ("finished", "failure")]
    return prompts, [key for key in listing if key.split("_")[0] in prompts and not listing[key].get("is_prompt")]


def collect(count: int) -> KVBatchMeta:
    """The replay buffer: look again and again, clear prompts that have ended, take their trajectories."""
    taken: dict[str, dict[str, Any]] = {}
    deadline = time.monotonic() + 30
    while count:
        assert time.monotonic() < deadline
        listing = tq.kv_list().get("train", {})
        prompts, trajectories = finished(listing)
        for uid in prompts:
            if listing[uid]["status"] == "finished":
                assert sum(key.startswith(f"{uid}_") for key in trajectories) == SESSIONS
        if prompts:
            tq.kv_clear(partition_id="train", keys=prompts)
            taken |= {key: listing[key] for key in trajectories}
            count -= len(prompts)
        time.sleep(0.01)
    return KVBatchMeta(partition_id="train", keys=list(taken), tags=list(taken.values()))


def dispatched(conf: Any, batch: KVBatchMeta, ranks: int) -> BatchMeta:
    """To `ranks` data-parallel groups of two processes, of which one answers."""

    async def retrieve() -> BatchMeta:
        client = tq.get_client()
        return await client.async_kv_retrieve_meta(keys=batch.keys, partition_id=batch.partition_id, create=False)

    meta = asyncio.run(retrieve()).select_fields(["prompts", "responses", "uid"])
    meta.extra_info = {"temperature": 1.0, **batch.extra_info}
    chunks = meta.chunk(chunks=ranks)
    assert len(chunks) == ranks
    calls = [(conf, chunk, writes) for chunk in chunks for writes in (True, False)]
    answers = in_processes(_training_rank, calls)
    for (_, read), (_, read_too) in zip(answers[::2], answers[1::2], strict=True):
        assert read == read_too
    return BatchMeta.concat([output for output, _ in answers])


def test_a_synchronous_step(config: Any) -> None:
    """Prompts, agent loops in two processes, dispatch to four ranks, advantages, clear."""
    conf = tq.init(config.transfer_queue)
    assert conf.enable is True and len(conf.backend.SimpleStorage.zmq_info) == 8
    uids = [f"uid-{number}" for number in range(PROMPTS)]
    issue(uids, step=1)
    with working(_agent_loop, [(conf, uids[::2], 1), (conf, uids[1::2], 1)]) as results:
        batch = collect(PROMPTS)
        results()
    assert len(batch.keys) == (PROMPTS - 1) * SESSIONS
    assert batch.tags[0]["seq_len"] == 4 + batch.tags[0]["response_len"]
    batch.reorder(np.argsort([tag["seq_len"] for tag in batch.tags], kind="stable").tolist())
    batch.extra_info.update({"global_steps": 1})
    written = dispatched(conf, batch, ranks=2)

    async def keys_of(meta: BatchMeta) -> list[str]:
        client, rows = tq.get_client(), meta.global_indexes
        return await client.async_kv_retrieve_keys(global_indexes=rows, partition_id="train")

    assert asyncio.run(keys_of(written)) == batch.keys
    batch = use(batch)
    tq.kv_clear(partition_id="train", keys=batch.keys)
    assert tq.kv_list() == {"train": {}}
    tq.close()


def use(batch: KVBatchMeta) -> KVBatchMeta:
    """What the driver does with the columns, of which some may not exist."""
    fields = ["responses", "old_log_probs", "rm_scores", "ref_log_prob", "values", "uid", "raw_prompt"]
    td = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
    assert set(td.keys()) == set(fields) - {"ref_log_prob", "values"}
    lengths = [tag["response_len"] for tag in batch.tags]
    assert td["responses"].offsets().diff().tolist() == td["old_log_probs"].offsets().diff().tolist() == lengths
    uids = td.pop("uid").tolist()
    assert [f"{uid}_" for uid in uids] == [key[: len(uid) + 1] for uid, key in zip(uids, batch.keys, strict=True)]
    assert [prompt[0]["content"] for prompt in list(td["raw_prompt"])] == uids
    assert td[0]["responses"].tolist() == list(range(lengths[0]))
    td["token_level_scores"] = td.pop("rm_scores")
    scores = td["token_level_scores"].to_padded_tensor(0.0)
    added = TensorDict({"token_level_scores": td["token_level_scores"]}, batch_size=len(uids))
    added["returns"] = scores.sum(dim=1)
    added["note"] = NonTensorData(["note"] * len(uids), batch_size=[len(uids)])
    more = tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=added)
    assert more.keys == batch.keys and more.tags == batch.tags and more.extra_info == {}
    assert {"responses", "old_log_probs", "token_level_scores", "returns", "note"} <= set(more.fields)
    more.extra_info = batch.extra_info
    again = tq.kv_batch_get_by_meta(more, select_fields=["returns", "note"])
    assert again["returns"].tolist() == [0.0] * len(uids) and again["note"].tolist() == ["note"] * len(uids)
    return more


def test_an_asynchronous_run_that_is_resumed(config: Any, tmp_path: Path) -> None:
    """Checkpoint in the middle; after loading into the live queue, unfinished prompts are issued again."""
    conf = tq.init(config.transfer_queue)
    assert tq.get_metrics_endpoint() is None
    uids = [f"uid-{number}" for number in range(1, 5)]
    issue(uids, step=7)
    issue(["uid-90"], step=7, partition="val")
    in_processes(_agent_loop, [(conf, uids[:2], 7)])
    asyncio.run(tq.async_kv_put(key=uids[2], partition_id="train", tag={"status": "running"}))
    tq.save_checkpoint(tmp_path / "global_step_7", metadata={"global_steps": 7})
    before = tq.kv_list()
    tq.kv_clear(partition_id="train", keys=list(before["train"]))
    issue(["uid-50"], step=8)
    tq.load_checkpoint(tmp_path / "global_step_7")
    assert tq.kv_list() == before
    assert [list(keys) for keys in tq.kv_list().values()] == [list(keys) for keys in before.values()]
    unfinished = [key for key, tag in tq.kv_list("train")["train"].items() if tag["status"] in ("pending", "running")]
    assert unfinished == uids[2:]
    with working(_agent_loop, [(conf, unfinished, 8)]) as results:
        batch = collect(4)
        results()
    assert {key.split("_")[0]: tag["global_steps"] for key, tag in zip(batch.keys, batch.tags, strict=True)} == {
        **dict.fromkeys(uids[:2], 7),
        **dict.fromkeys(uids[2:], 8),
    }
    data = tq.kv_batch_get(keys=batch.keys, partition_id="train", select_fields=["responses"])
    assert data["responses"].offsets().diff().tolist() == [tag["response_len"] for tag in batch.tags]
    assert tq.kv_list("val")["val"] == {"uid-90": {"is_prompt": True, "status": "pending", "global_steps": 7}}


def test_columns_that_are_nowhere_are_named(config: Any) -> None:
    """`routed_experts` is looked for in the text of the error."""
    tq.init(config.transfer_queue)
    fields = TensorDict({"responses": torch.zeros(1, 2)}, batch_size=1)
    tq.kv_batch_put(keys=["a_0_0"], partition_id="train", fields=fields, tags=[{"status": "success"}])
    with pytest.raises(ValueError, match="routed_experts"):
        tq.kv_batch_get(keys=["a_0_0"], partition_id="train", select_fields=["routed_experts"])
