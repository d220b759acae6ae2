"""The workers that rate and train: each method reads the fields it names, computes, and returns the fields it adds.

Legend: B rows of a worker's share of a batch, R response tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from recipe.grpo_tiny.actors import Connect, prepare_process
from recipe.grpo_tiny.evaluation import Evaluation, evaluate
from recipe.grpo_tiny.loss import group_advantages
from recipe.grpo_tiny.model import tiny_model, weights_of
from recipe.grpo_tiny.stages import answer_log_probs
from recipe.grpo_tiny.trainer import GlooSum, Trainer
from recipe.verl_style.bridge import METRICS, BatchWorker, on_batch
from recipe.verl_style.config import NUM_ACTORS, Settings
from recipe.verl_style.protocol import DataProto
from recipe.verl_style.rollout import TASK
from recipe.verl_style.weights import publish

if TYPE_CHECKING:
    from transfer_queue import KVBatchMeta

TRAIN_FIELDS = [
    "prompts",
    "responses",
    "response_mask",
    "temperature",
    "rollout_log_probs",
    "old_log_probs",
    "ref_log_probs",
    "advantages",
]


class RewardWorker(BatchWorker):
    def __init__(self, connect: Connect, settings: Settings, rank: int) -> None:
        prepare_process()
        super().__init__(connect(f"reward-{rank}"))

    @on_batch("responses", "reward_model")
    def compute_reward(self, data: DataProto) -> DataProto:
        targets = torch.tensor([each["ground_truth"] for each in data.non_tensor_batch["reward_model"]])
        scores = TASK.score(data.batch["responses"], targets)
        measured = {"reward": float(scores.rewards.mean()), "exact": float(scores.exact.float().mean())}
        return DataProto({"rewards": scores.rewards}, meta_info={METRICS: measured})

    @on_batch("rewards", "uid")
    def compute_advantage(self, data: DataProto) -> DataProto:
        """Compare each reward with those of the same prompt; the share of a worker holds whole groups."""
        _, groups = np.unique(data.non_tensor_batch["uid"].astype(str), return_inverse=True)
        advantages, _ = group_advantages(data.batch["rewards"], torch.from_numpy(groups))
        return DataProto({"advantages": advantages})


class ActorWorker(BatchWorker):
    """One data-parallel rank of the policy, with the frozen reference beside it. `join` must be called once on all."""

    def __init__(self, connect: Connect, settings: Settings, rank: int) -> None:
        prepare_process()
        super().__init__(connect(f"actor-{rank}"))
        self._settings = settings
        self._rank = rank
        self._model, self._reference = tiny_model(settings.seed), tiny_model(settings.seed)
        self._sum = GlooSum(rank, NUM_ACTORS, settings.timeout_s)
        self._trainer = Trainer(self._model, lr=settings.lr, kl=settings.kl, all_reduce=self._sum)
        self._version = 0

    def join(self, meeting_file: Path) -> None:
        """Connect the ranks: waits until all of them name the same file."""
        self._sum.join(meeting_file)

    @on_batch("prompts", "responses", "temperature", "rollout_log_probs")
    def compute_log_prob(self, data: DataProto) -> DataProto:
        """The policy before this step's updates; `gap` is what it differs by from the one that gave the answers."""
        old = answer_log_probs(self._model, data.batch)
        gap = float((old.values() - data.batch["rollout_log_probs"].values()).abs().max())
        return DataProto({"old_log_probs": old}, meta_info={METRICS: {"gap": gap}})

    @on_batch("prompts", "responses", "temperature")
    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        return DataProto({"ref_log_probs": answer_log_probs(self._reference, data.batch)})

    def update_actor(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Step once per mini-batch, together with the other ranks. The metadata is cut; rows are read as needed."""
        updates = [
            self._trainer.step(self.read(piece, TRAIN_FIELDS).batch)
            for piece in batch.chunk(self._settings.mini_batches)
        ]
        self._version = batch.extra_info["global_steps"] + 1
        last = updates[-1]
        batch.extra_info[METRICS] = {"kl": last.kl, "weights_sum": last.weights_sum, "rows": len(batch)}
        return batch

    def publish_weights(self) -> None:
        """Rank 0 does it for all: they are equal."""
        if self._rank == 0:
            publish(self.client, weights_of(self._model, self._version))

    def evaluate(self) -> Evaluation:
        return evaluate(self._model, TASK)

    def close(self) -> None:
        """Leave the ranks; one that still waits for this one fails at once."""
        self._sum.close()
