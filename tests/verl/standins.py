"""Stand-ins for the parts of verl that need accelerators: a language model, its servers and the training engines.

All else that runs is verl's: trainers, replay buffers, agent loops and their workers, worker groups with their
dispatch, and the rewards. This module imports verl.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ray
import torch
from tensordict import TensorDict
from verl import DataProto
from verl.experimental.reward_loop import RewardLoopManager
from verl.single_controller.base import Worker
from verl.single_controller.base.decorator import Dispatch, make_nd_compute_dataproto_dispatch_fn, register
from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils import tensordict_utils as tu
from verl.workers.rollout.replica import TokenOutput

import transfer_queue as tq

RANKS = 2
ROLES = ("actor", "ref", "train")


class LanguageModel:
    """Answers `a + b = ?` with as many tokens as the last digit of `a` says, and one more.

    While the file `folder/hold` exists, prompts whose `a` is at least the number in it are not answered; while
    `folder/fail` exists, every second request with the `a` in it ends with an error, the first one included.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: Counter[int] = Counter()

    async def generate(self, *, prompt_ids: list[int], **_: Any) -> TokenOutput:
        first = prompt_ids[2] - 3  # the words before it are the role and a colon
        self.asked[first] += 1
        failing = first == self._number("fail") and self.asked[first] % 2 == 1
        while first >= self._number("hold"):
            await asyncio.sleep(0.05)
        if failing:
            raise RuntimeError(f"no answer for {first}")
        length = first % 10 + 1
        return TokenOutput(
            token_ids=[3 + (first + place) % 100 for place in range(length)],
            log_probs=[-0.5] * length,
            num_preempted=0,
            extra_fields={"min_global_steps": 0, "max_global_steps": 0},
        )

    def _number(self, name: str) -> float:
        try:
            return int((self.folder / name).read_text())
        except FileNotFoundError:
            return float("inf")


class Engine(Worker):
    """One rank of actor, reference and critic: what a model would compute is a function of the tokens."""

    def __init__(self, ranks_per_replica: int = 1) -> None:
        super().__init__()
        for role in ROLES:  # of the ranks that work on the same rows, the first one reports
            self._register_dispatch_collect_info(
                role, dp_rank=self.rank // ranks_per_replica, is_collect=self.rank % ranks_per_replica == 0
            )

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def compute_log_prob(self, data: TensorDict) -> TensorDict:
        return _per_token(data, log_probs=-0.01, entropy=0.02)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="ref"))
    def compute_ref_log_prob(self, data: TensorDict) -> TensorDict:
        return _per_token(data, log_probs=-0.03)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def infer_batch(self, data: TensorDict) -> TensorDict:
        return _per_token(data, values=0.04)

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="train"), blocking=False)
    def train_mini_batch(self, data: TensorDict) -> TensorDict:
        return _trained(data, "values", "returns")

    @register(dispatch_mode=make_nd_compute_dataproto_dispatch_fn(mesh_name="actor"))
    def update_actor(self, data: TensorDict) -> TensorDict:
        return _trained(data, "old_log_probs", "advantages")

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def save_checkpoint(self, local_path: str, *_: Any, **__: Any) -> None:
        Path(local_path).mkdir(parents=True, exist_ok=True)

    @register(dispatch_mode=Dispatch.ONE_TO_ALL)
    def load_checkpoint(self, *, local_path: str, **_: Any) -> None:
        assert Path(local_path).is_dir()


def _per_token(data: TensorDict, **factors: float) -> TensorDict:
    """A column per name, as ragged as `input_ids`: each token's number times the factor."""
    ids = data["input_ids"]
    columns = {
        name: torch.nested.nested_tensor_from_jagged(ids.values() * factor, offsets=ids.offsets())
        for name, factor in factors.items()
    }
    return tu.get_tensordict(columns, non_tensor_dict={"metrics": {"mfu": 0.5}})


def _trained(data: TensorDict, *needed: str) -> TensorDict:
    """Metrics of a step, after a look at the columns: one entry per token of the response in each row."""
    lengths = data["responses"].offsets().diff()
    for name in (*needed, "response_mask"):
        assert torch.equal(data[name].offsets().diff(), lengths), name
    assert tu.get(data, key="temperature") == 1.0  # from the batch's `extra_info`
    return tu.get_tensordict({}, non_tensor_dict={"metrics": {"mfu": [0.5], "rows": [float(len(data))]}})


def worker_group(ranks: int, *args: Any) -> RayWorkerGroup:
    return RayWorkerGroup(
        resource_pool=RayResourcePool(process_on_nodes=[ranks], use_gpu=False, max_colocate_count=1),
        ray_cls_with_init=RayClassWithInitArgs(ray.remote(Engine), *args),
        device_name="cpu",
    )


class RewardModel:
    """The manager of a reward model on the GPUs of the actor, which the trainer asks once it has sampled."""

    reward_loop_worker_handles = None
    reward_loop_workers = ()

    def compute_rm_score(self, data: DataProto) -> DataProto:
        """Score the number of tokens of the response, at its last token."""
        lengths = data.batch["attention_mask"][:, data.batch["prompts"].shape[1] :].sum(dim=1)
        scores = torch.zeros(data.batch["responses"].shape)
        scores[torch.arange(len(lengths)), lengths - 1] = lengths.float()
        questions = [messages[-1]["content"] for messages in data.non_tensor_batch["raw_prompt"]]
        return DataProto(
            batch=TensorDict({"rm_scores": scores}, batch_size=len(lengths)),
            non_tensor_batch={"question": np.array(questions, dtype=object)},
            meta_info={"reward_extra_keys": ["question"]},
        )


class Servers:
    """The manager of the model's servers, and that of their weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_client(self, client_cls: type | None = None) -> LanguageModel:
        return LanguageModel(self.folder)

    def update_weights(self, global_steps: int | None = None) -> None: ...
    def sleep_replicas(self) -> None: ...
    def abort_replicas(self) -> None: ...
    def resume_generation_replicas(self) -> None: ...


class Standing(PPOTrainer):
    """A trainer whose set-up makes the stand-ins; beside that it only writes down what it saw.

    drawn: per step, the numbers in the data set of the prompts, one for each trajectory. metrics: per step. reissued:
    the number of prompts started again after a checkpoint was loaded. validated: the metrics of the last validation.
    """

    def _setup(self) -> None:
        self.drawn: list[list[int]] = []
        self.metrics: list[dict[str, Any]] = []
        self.reissued = 0
        self.validated: dict[str, Any] = {}
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        self.teacher_model_manager = self.distillation_config = None
        self.ref_in_actor = False
        self.actor_rollout_wg = self.ref_policy_wg = self.critic_wg = worker_group(RANKS)
        self.resource_pool_manager = SimpleNamespace(get_n_gpus=lambda: RANKS)
        if self.trainer_mode == "sync":
            self.reward_loop_manager = RewardModel()
        else:
            self.reward_loop_manager = RewardLoopManager(config=self.config, rm_resource_pool=None)
        self.llm_server_manager = self.checkpoint_manager = Servers(Path(self.config.trainer.default_local_dir).parent)
        self._load_checkpoint()

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, float]) -> tq.KVBatchMeta:
        batch = super().step(metrics, timing_raw)
        keys = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding")]
        self.drawn.append(numbers(keys))
        self.metrics.append(metrics)  # the caller adds more
        return batch

    def _reissue_inflight_prompts(self, partition_id: str = "train") -> int:
        self.reissued = super()._reissue_inflight_prompts(partition_id)
        return self.reissued

    def _validate(self) -> dict[str, Any]:
        self.validated = super()._validate()
        return self.validated

    def end(self, agents: Any) -> None:
        """End the processes that were started for this trainer."""
        workers = self.actor_rollout_wg.workers
        for actor in (*agents.agent_loop_workers, *workers, *self.reward_loop_manager.reward_loop_workers):
            ray.kill(actor)
        for group in self.actor_rollout_wg.resource_pool.pgs:
            ray.util.remove_placement_group(group)


def numbers(keys: list[str]) -> list[int]:
    """The numbers in the data set of the prompts with these keys, or to which the trajectories belong; ascending."""
    rows = tq.kv_batch_get(keys=keys, partition_id="train", select_fields=["index"])
    return sorted(rows.pop("index").tolist())


class SyncTrainer(Standing, PPOTrainerSync): ...


class AsyncTrainer(Standing, PPOTrainerColocateAsync): ...
