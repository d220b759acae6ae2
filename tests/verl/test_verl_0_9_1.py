"""Modules of verl 0.9.1 that use the queue, one by one; `environment` says how to get verl.

Data and threads are those of verl's trainers; `test_trainers` has the trainers themselves.
"""

from __future__ import annotations

import asyncio
import importlib
import random
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.request import urlopen
from uuid import uuid4

import pytest
import torch
from omegaconf import OmegaConf

import transfer_queue as tq
from tests.verl import environment

pytestmark = environment.NEEDS_VERL

GROUP = 2  # trajectories of a prompt


def test_every_module_that_names_the_queue_imports() -> None:
    """Also those that name the module in front of it; all have this library, not verl's mock of a missing one."""
    root = Path(str(files("verl")))
    named = [
        path.relative_to(root.parent).with_suffix("")
        for path in root.rglob("*.py")
        if any(
            name in path.read_text() for name in ("import transfer_queue", "from transfer_queue", "utils.transferqueue")
        )
    ]
    modules = [importlib.import_module(".".join(path.parts)) for path in named]
    assert len(modules) >= 11
    found = [module for module in modules if hasattr(module, "tq")]
    assert {module.tq for module in found} == {tq}
    assert all(module.KVBatchMeta is tq.KVBatchMeta for module in modules if hasattr(module, "KVBatchMeta"))


def trajectories(uid: str, number: int, rewards: list[float]) -> tuple[list[str], Any, list[dict[str, Any]]]:
    """Keys, columns and tags of one prompt's trajectories; the responses have `number % 5 + 1` tokens."""
    from verl.utils.tensordict_utils import list_of_dict_to_tensordict

    response = torch.full((number % 5 + 1,), number)
    prompt = torch.arange(number % 3 + 2)
    rows = [
        {
            "uid": uid,
            "prompts": prompt,
            "responses": response,
            "input_ids": torch.cat([prompt, response]),
            "response_mask": torch.ones_like(response),
            "rm_scores": torch.nn.functional.pad(torch.tensor([reward]), (len(response) - 1, 0)),
            "raw_prompt": [{"role": "user", "content": str(number)}],
            "extra_fields": {"reward_extra_info": {"acc": reward}, "turn_scores": []},
            "multi_modal_inputs": {},
            "num_turns": 2,
        }
        for reward in rewards
    ]
    tag = {"status": "success", "seq_len": len(prompt) + len(response), "global_steps": 1}
    keys = [f"{uid}_{session}_0" for session in range(len(rewards))]
    return keys, list_of_dict_to_tensordict(rows), [tag] * len(rows)


def register(prompts: dict[str, int], global_steps: int) -> None:
    """Say that these prompts, by id, are to be answered, as verl's trainers do before they hand them out."""
    tags = [{"is_prompt": True, "status": "pending", "global_steps": global_steps} for _ in prompts]
    tq.kv_batch_put(keys=list(prompts), partition_id="train", tags=tags)


async def answer(uid: str, number: int, rewards: list[float], status: str = "finished") -> None:
    """One prompt's way through an agent loop: each trajectory is put alone, the prompt's status comes last."""
    await tq.async_kv_put(key=uid, partition_id="train", tag={"status": "running"})
    keys = [f"{uid}_{session}_0" for session in range(len(rewards))]
    for place, key in enumerate(keys):
        await asyncio.sleep(random.random() / 100)
        _, columns, tags = trajectories(uid, number, rewards[place : place + 1])
        await tq.async_kv_batch_put(keys=[key], fields=columns, tags=tags, partition_id="train")
    await tq.async_kv_put(key=uid, partition_id="train", tag={"status": status})


def feed(answers: list[Any], threads: int = 4) -> list[threading.Thread]:
    """Run these coroutines in some threads, each with a loop of its own that lives for its share only."""

    async def share(part: list[Any]) -> None:
        await asyncio.gather(*part)

    started = [threading.Thread(target=asyncio.run, args=(share(answers[place::threads]),)) for place in range(threads)]
    for thread in started:
        thread.start()
    return started


def buffer(name: str, **more: Any) -> Any:
    from verl.trainer.ppo.v1 import replay_buffer

    settings = {
        "trainer_mode": "sync" if name == "ReplayBuffer" else "colocate_async",
        "trainer_config": OmegaConf.create(),
        "max_off_policy_threshold": 8,
        "max_off_policy_strategy": "drop",
        "sampler_kwargs": OmegaConf.create(),
        "poll_interval": 0.005,
    }
    return getattr(replay_buffer, name)(**{**settings, **more})


def read(batch: Any) -> dict[str, int]:
    """Fetch a sampled batch as trainers do, and give the number that each of its prompts answers to."""
    data = tq.kv_batch_get(
        keys=batch.keys, partition_id=batch.partition_id, select_fields=["uid", "prompts", "responses"]
    )
    uids = data.pop("uid").tolist()
    assert [key.split("_")[0] for key in batch.keys] == uids
    lengths = data["responses"].offsets().diff()
    numbers = data["responses"].to_padded_tensor(padding=-1)[:, 0].tolist()
    assert lengths.tolist() == [number % 5 + 1 for number in numbers]
    assert [tag["seq_len"] for tag in batch.tags] == (lengths + data["prompts"].offsets().diff()).tolist()
    return dict(zip(uids, numbers, strict=True))


def test_replay_buffer_fed_by_threads(queue: Any) -> None:
    """Each of 200 prompts is sampled once, with its whole group, while four threads with loops of their own put."""
    prompts = {str(uuid4()): number for number in range(200)}
    register(prompts, global_steps=1)
    threads = feed([answer(uid, number, [0.0, 1.0]) for uid, number in prompts.items()])
    sampled: dict[str, int] = {}
    replay = buffer("ReplayBuffer")
    for _ in range(20):
        batch, metrics = replay.sample(global_steps=1, partition_id="train", batch_size=10)
        assert len(batch) == 10 * GROUP
        assert metrics == {}
        got = read(batch)
        assert len(got) == 10 and not got.keys() & sampled.keys()
        sampled.update(got)
        tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
    for thread in threads:
        thread.join()
    assert sampled == prompts
    assert tq.kv_list() == {"train": {}}


def test_replay_buffer_async_evicts_and_refills(queue: Any) -> None:
    """Stale, failed and, by their rewards, useless groups go and are replaced while other threads put."""
    prompts = {str(uuid4()): number for number in range(40)}
    uids = list(prompts)
    register({uid: prompts[uid] for uid in uids[:5]}, global_steps=1)  # too old at step 4 with a bound of 3
    register({uid: prompts[uid] for uid in uids[5:]}, global_steps=3)
    useless, failed = set(uids[5:12]), set(uids[12:15])
    refilled: list[int] = []
    late: dict[str, int] = {}

    def refill(count: int) -> None:
        more = {str(uuid4()): 100 + number for number in range(len(late), len(late) + count)}
        late.update(more)
        refilled.append(count)
        register(more, global_steps=4)
        for thread in feed([answer(uid, number, [0.0, 1.0]) for uid, number in more.items()]):
            thread.join()

    answers = [
        answer(uid, number, [1.0, 1.0] if uid in useless else [0.0, 1.0], "failure" if uid in failed else "finished")
        for uid, number in prompts.items()
    ]
    threads = feed(answers)
    replay = buffer("ReplayBufferAsync", max_off_policy_threshold=3, refill_fn=refill, filter_groups_metric="reward")
    sampled: dict[str, int] = {}
    evicted = {"off_policy": 0, "filter_groups": 0, "rollout_failure": 0}
    for _ in range(4):
        batch, metrics = replay.sample(global_steps=4, partition_id="train", batch_size=10)
        assert len(batch) == 10 * GROUP
        sampled.update(read(batch))
        tq.kv_clear(keys=batch.keys, partition_id=batch.partition_id)
        for reason in evicted:
            evicted[reason] += metrics.get(f"training/{reason}/evicted_samples", 0)
    for thread in threads:
        thread.join()
    assert evicted == {"off_policy": 5, "filter_groups": 7, "rollout_failure": 3}
    assert sum(refilled) == 15
    assert sampled == {uid: number for uid, number in (prompts | late).items() if uid not in {*uids[:15]}}
    assert tq.kv_list() == {"train": {}}


def test_replay_buffer_waits_for_those_that_would_become_stale(queue: Any) -> None:
    """With the strategy `wait` nothing is sampled before the oldest prompt in flight has finished."""
    old, new = {str(uuid4()): 1}, {str(uuid4()): number for number in range(2, 6)}
    register(old, global_steps=1)
    register(new, global_steps=2)
    replay = buffer("ReplayBufferAsync", max_off_policy_threshold=2, max_off_policy_strategy="wait")
    for thread in feed([answer(uid, number, [0.0, 1.0]) for uid, number in new.items()]):
        thread.join()
    assert replay.get_sampleable_count(2, "train") == 4
    (uid,) = old
    finisher = threading.Timer(0.3, lambda: asyncio.run(answer(uid, 1, [0.0, 1.0])))
    finisher.start()
    began = time.monotonic()
    batch, _ = replay.sample(global_steps=2, partition_id="train", batch_size=5)
    assert time.monotonic() - began > 0.3
    finisher.join()
    assert read(batch) == old | new


def test_in_flight_prompts_survive_a_checkpoint_of_a_live_queue(queue: Any, tmp_path: Path) -> None:
    """Saved while threads put, loaded into the same queue later: what was finished is whole, the rest is reissued."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer, _count_tq_prompt_groups
    from verl.utils import tensordict_utils as tu

    class Agents:
        def generate_sequences(self, batch: Any) -> None:
            self.batch = batch

    class Reissuing(PPOTrainer):
        trainer_mode, global_steps = "colocate_async", 2

        def __init__(self) -> None:
            self.agent_loop_manager = Agents()

        def on_sample_end(self) -> None: ...
        def on_step_end(self) -> None: ...

    prompts = {str(uuid4()): number for number in range(60)}
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1} for _ in prompts]
    rows = tu.get_tensordict(
        {"uid": list(prompts), "index": list(prompts.values()), "raw_prompt": [[{"content": uid}] for uid in prompts]}
    )
    tq.kv_batch_put(keys=list(prompts), partition_id="train", tags=tags, fields=rows)
    threads = feed([answer(uid, number, [0.0, 1.0]) for uid, number in list(prompts.items())[:50]])
    while len(_with_status("finished")) < 5:
        time.sleep(0.002)
    tq.save_checkpoint(str(tmp_path / "transfer_queue"), metadata={"global_steps": 1})
    for thread in threads:
        thread.join()
    assert len(_with_status("finished")) == 50
    tq.kv_clear(keys=list(tq.kv_list("train")["train"])[:30], partition_id="train")

    tq.load_checkpoint(str(tmp_path / "transfer_queue"))
    assert _count_tq_prompt_groups() == 60
    listed = tq.kv_list("train")["train"]
    finished = _with_status("finished")
    assert len(finished) >= 5
    for uid in finished:  # a status never comes without what was put before it
        assert [key for key in listed if key.startswith(f"{uid}_")] == [f"{uid}_0_0", f"{uid}_1_0"]
    trainer = Reissuing()
    in_flight = [uid for uid in prompts if uid not in finished]
    assert trainer._reissue_inflight_prompts() == len(in_flight) >= 10
    batch = trainer.agent_loop_manager.batch
    assert [batch[place]["uid"] for place in range(len(batch))] == in_flight
    assert _with_status("pending") == in_flight
    assert len(tq.kv_list("train")["train"]) == 60 + GROUP * len(finished)
    for thread in feed([answer(uid, prompts[uid], [0.0, 1.0]) for uid in in_flight]):
        thread.join()
    replayed, _ = buffer("ReplayBufferAsync").sample(global_steps=2, partition_id="train", batch_size=60)
    assert read(replayed) == prompts


def _with_status(status: str) -> list[str]:
    """The prompts of the partition `train` that have this status, in the order in which they were put."""
    tags = tq.kv_list("train")["train"]
    return [key for key, tag in tags.items() if tag.get("is_prompt") and tag["status"] == status]


@pytest.mark.parametrize("is_async", [False, True])
def test_bridge_between_metadata_and_data(queue: Any, is_async: bool) -> None:
    """`tqbridge`: keys in, data to the function, its columns into the queue, keys with the same tags out."""
    from verl.utils import tensordict_utils as tu
    from verl.utils.transferqueue_utils import tqbridge

    keys, columns, tags = trajectories("a", 3, [0.0, 1.0, 2.0])
    meta = tq.kv_batch_put(keys=keys, partition_id="train", fields=columns, tags=tags)
    meta.fields, meta.extra_info = ["responses", "raw_prompt"], {"temperature": 0.5}
    seen: list[Any] = []

    def compute(data: Any) -> Any:
        seen.append(data)
        return tu.get_tensordict({"doubled": data["responses"] * 2}, non_tensor_dict={"metrics": {"loss": 1.0}})

    async def compute_later(data: Any) -> Any:
        return compute(data)

    function = tqbridge()(compute_later if is_async else compute)
    result = asyncio.run(function(meta)) if is_async else function(meta)
    (data,) = seen
    assert set(data.keys()) == {"responses", "raw_prompt", "temperature"}
    assert tu.get(data, "temperature") == 0.5
    assert isinstance(result, tq.KVBatchMeta)
    assert (result.keys, result.tags, result.extra_info) == (keys, tags, {"metrics": {"loss": 1.0}})
    assert {"responses", "raw_prompt", "doubled"} <= set(result.fields)
    got = tq.kv_batch_get(keys=keys[::-1], partition_id="train", select_fields=["doubled"])
    assert [row.tolist() for row in got["doubled"].unbind()] == [[6, 6, 6, 6]] * 3


def test_worker_group_with_silent_ranks(queue: Any, standins: Any, ray_session: Any) -> None:
    """Two ranks read the same rows and one reports: the dispatch and collection of verl's worker groups."""
    group = standins.worker_group(2, 2)
    keys, columns, tags = trajectories("a", 7, [0.0, 1.0, 2.0, 3.0])
    batch = tq.kv_batch_put(keys=keys, partition_id="train", fields=columns, tags=tags)
    batch.extra_info["temperature"] = 1.0
    output = group.compute_log_prob(batch)
    assert (output.keys, output.extra_info) == (keys, {"metrics": [{"mfu": 0.5}]})
    got = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["log_probs", "input_ids", "absent"])
    assert torch.equal(got["log_probs"].values(), got["input_ids"].values() * -0.01)
    assert torch.equal(got["log_probs"].offsets(), got["input_ids"].offsets())
    future = group.infer_batch(batch)  # one that does not block
    ray_session.get(future.futures)
    assert tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["values"])["values"].is_nested
    for worker in group.workers:
        ray_session.kill(worker)
    for placed in group.resource_pool.pgs:
        ray_session.util.remove_placement_group(placed)


def test_padding_to_a_divisible_batch(queue: Any) -> None:
    from verl.trainer.ppo.padding_utils import upsample_batch_to_divisible_size

    keys, columns, tags = trajectories("a", 4, [0.0, 1.0, 2.0])
    batch = tq.kv_batch_put(keys=keys, partition_id="train", fields=columns, tags=tags)
    padded = upsample_batch_to_divisible_size(batch, 8, eos_token_id=1)
    assert len(padded) == 8
    assert padded.keys[:3] == keys
    assert [tag.get("is_padding", False) for tag in padded.tags] == [False] * 3 + [True] * 5
    data = tq.kv_batch_get(keys=padded.keys, partition_id="train", select_fields=["input_ids", "rm_scores", "uid"])
    assert data["input_ids"].offsets().diff().tolist() == [8] * 3 + [128] * 5
    assert data["rm_scores"].sum(dim=1).tolist() == [0, 1, 2, 0, 0, 0, 0, 0]


def test_rollouts_kept_on_disk_are_put_again(queue: Any, tmp_path: Path) -> None:
    """`RolloutTqSkip` writes a sampled batch with `torch.save` and gives its trajectories to new prompts."""
    from verl.utils.skip.rollout_skip import RolloutTqSkip

    skip = object.__new__(RolloutTqSkip)
    skip.parameter_sync_step = 1
    skip._get_step_dump_dir = lambda step: tmp_path / str(step)
    prompts = {str(uuid4()): number for number in (3, 8)}
    register(prompts, global_steps=1)
    for thread in feed([answer(uid, number, [0.0, 1.0]) for uid, number in prompts.items()]):
        thread.join()
    batch, _ = buffer("ReplayBuffer").sample(global_steps=1, partition_id="train", batch_size=2)
    skip.prepare_data(step=1, batch=batch, global_steps=1)
    before = sorted(read(batch).values())
    tq.kv_clear(keys=batch.keys, partition_id="train")
    skip.action = None
    skip.load_dump_data(step=1, new_prompt_uids=["x", "y"], n=GROUP, global_steps=5)
    again, _ = buffer("ReplayBuffer").sample(global_steps=5, partition_id="train", batch_size=2)
    assert sorted(again.keys) == ["x_0_0", "x_1_0", "y_0_0", "y_1_0"]
    assert {tag["global_steps"] for tag in again.tags} == {5}
    data = tq.kv_batch_get(keys=again.keys, partition_id="train")
    assert sorted({int(row[0]) for row in data["responses"].unbind()}) == before
    assert set(data.keys()) >= {"raw_prompt", "multi_modal_inputs", "extra_fields", "rm_scores"}


def test_metrics_endpoint_is_registered(ray_session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from verl.utils.tracking import RLInsightLogger

    registered: list[Any] = []
    monkeypatch.setattr(RLInsightLogger, "register_metrics", lambda *given: registered.append(given))
    section = {"metrics": {"enabled": True, "port": 0}, "layout": "jagged"}
    tq.init(OmegaConf.create(section))
    try:
        RLInsightLogger.register_transfer_queue_metrics({"transfer_queue": section})
        (((endpoint,), name, _),) = registered
        assert name == "transfer_queue"
        with urlopen(f"http://{endpoint}/metrics", timeout=10) as page:
            assert b"tq_controller_request_total" in page.read()
    finally:
        tq.close()
