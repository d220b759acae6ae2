"""The driver: it moves metadata from stage to stage, and never holds a row.

`train_in_step` and `train_behind` differ in where a batch comes from: generated now, or taken from what rollout workers
generated ahead. What happens to it is the same.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from recipe.verl_style.bridge import METRICS, WorkerGroup
from recipe.verl_style.checks import Tally, staleness_of
from recipe.verl_style.config import NUM_ACTORS, Settings
from recipe.verl_style.protocol import from_data_proto
from recipe.verl_style.replay import ReplayBuffer
from recipe.verl_style.report import RunLog, StepMetrics
from recipe.verl_style.rollout import PARTITION, RolloutReport, RolloutWorker, prompt_batch
from recipe.verl_style.weights import publish_end
from recipe.verl_style.workers import ActorWorker, RewardWorker
from transfer_queue.errors import GetMetaTimeout

if TYPE_CHECKING:
    from recipe.grpo_tiny.evaluation import Evaluation
    from recipe.grpo_tiny.runtimes import Runtime
    from transfer_queue import KVBatchMeta


class PPOTrainer:
    """Drives the worker groups. The runtime is started; `start` comes first, then one of the two `train` methods."""

    def __init__(self, runtime: Runtime, settings: Settings) -> None:
        self._runtime = runtime
        self._settings = settings
        self._client = runtime.client
        self.log = RunLog(settings.steps)
        self.tally = Tally(settings.group_size, settings.max_staleness if settings.mode == "async" else 0)

    def start(self, meeting_file: Path) -> None:
        """Start the workers, wait until all are ready, and publish the first weights."""
        settings = self._settings
        self._rollout = WorkerGroup(self._runtime, RolloutWorker, settings.rollout_workers, settings)
        self._reward = WorkerGroup(self._runtime, RewardWorker, 1, settings)
        self._actor = WorkerGroup(self._runtime, ActorWorker, NUM_ACTORS, settings)
        self._actor.call("join", meeting_file)
        self._actor.call("publish_weights")
        self._stages = (
            ("reward", self._reward, "compute_reward"),
            ("old log-probs", self._actor, "compute_log_prob"),
            ("reference", self._actor, "compute_ref_log_prob"),
            ("advantage", self._reward, "compute_advantage"),
            ("update", self._actor, "update_actor"),
        )

    def train_in_step(self) -> int:
        """Generate, then train, step by step; returns how many samples were generated."""
        for step in range(self._settings.steps):
            started = time.perf_counter()
            with self.log.timed("generate"):
                batch = self._rollout.dispatch("generate_sequences", self._insert(step))
            self._train_on(step, batch, started)
        return self._settings.steps * self._settings.rows_per_step

    def train_behind(self) -> int:
        """Train on what the rollout workers generate meanwhile; returns how many samples that were."""
        running = self._rollout.start("run_ahead")
        buffer = ReplayBuffer(self._client, PARTITION, self._settings.timeout_s)
        for step in range(self._settings.steps):
            started = time.perf_counter()
            with self.log.timed("wait"):
                batch = self._sample(buffer, running)
            self._train_on(step, batch, started)
        publish_end(self._client)
        self.log.rollout = sum(self._runtime.gather(running), RolloutReport())
        return self.log.rollout.rows

    def evaluate(self) -> Evaluation:
        evaluation: Evaluation = self._actor.call("evaluate")[0]
        return evaluation

    def _insert(self, step: int) -> KVBatchMeta:
        keys, prompts = prompt_batch(self._settings, step, self._settings.prompts)
        rows, _ = from_data_proto(prompts)
        return self._client.kv_batch_put(keys, PARTITION, rows, [{"status": "pending"}] * len(keys))

    def _sample(self, buffer: ReplayBuffer, running: Sequence[Any]) -> KVBatchMeta:
        try:
            return buffer.sample(self._settings.rows_per_step)
        except GetMetaTimeout:
            self._runtime.raise_failed(running)  # why nothing came
            raise

    def _train_on(self, step: int, batch: KVBatchMeta, started: float) -> None:
        """Take the generated batch through all stages, remove it, and publish the new policy."""
        metrics: dict[str, Sequence[float]] = {}
        batch.extra_info = {"global_steps": step}
        for name, group, method in self._stages:
            with self.log.timed(name):
                batch = group.dispatch(method, batch)
            metrics |= batch.extra_info.pop(METRICS)
        self.tally.check_step(step, batch, metrics)
        with self.log.timed("publish"):
            self._client.kv_clear(batch.keys, PARTITION)
            self._client.set_policy_version(step + 1)  # before the weights: who waits for them asks then what it may do
            self._actor.call("publish_weights")
        means = {name: float(np.mean(metrics[name])) for name in ("reward", "exact", "kl")}
        lags = staleness_of(step, batch)
        self.log.add(StepMetrics(step, **means, staleness=lags, step_s=time.perf_counter() - started))
