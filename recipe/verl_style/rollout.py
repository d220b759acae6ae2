"""The worker that answers prompts: those of a batch it is called with, or, running ahead of the training, its own.

What runs ahead is paced by the queue alone. `admission` says how many samples may still be started without any of them
being too old when its turn comes, and only a new version of the policy makes room, so a worker without room waits for
that. The queue reserves nothing for samples that are being generated: a worker starts only if all of them could.

Legend: B rows.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from tensordict import TensorDict

from recipe.grpo_tiny import stages
from recipe.grpo_tiny.actors import Connect, prepare_process
from recipe.grpo_tiny.model import Weights, tiny_model
from recipe.grpo_tiny.task import TASKS, Prompts, draw_prompts
from recipe.verl_style.bridge import BatchWorker
from recipe.verl_style.config import Settings
from recipe.verl_style.protocol import DataProto, from_data_proto
from recipe.verl_style.weights import WeightsFeed

if TYPE_CHECKING:
    from transfer_queue import KVBatchMeta

Tag: TypeAlias = dict[str, Any]

PARTITION = "train"
TASK = TASKS["digit_sum"]


@dataclass
class RolloutReport:
    """What a worker that runs ahead did, in rows and seconds."""

    rows: int = 0
    generating_s: float = 0.0
    waiting_s: float = 0.0  # for a version of the policy that makes room

    def __add__(self, other: RolloutReport) -> RolloutReport:
        waiting_s = self.waiting_s + other.waiting_s
        return RolloutReport(self.rows + other.rows, self.generating_s + other.generating_s, waiting_s)


def prompt_batch(settings: Settings, number: int, count: int) -> tuple[list[str], DataProto]:
    """Return keys and rows of the data set's batch of this number, `group_size` adjacent rows per prompt."""
    prompts = draw_prompts(TASK, seed=settings.seed, step=number, count=count)
    rows, _ = stages.prompt_rows(prompts, settings.group_size)
    keys = [f"{group}_{session}" for group in prompts.group_ids for session in range(settings.group_size)]
    return keys, DataProto(dict(rows.items()), _objects(prompts, settings.group_size))


def _objects(prompts: Prompts, group_size: int) -> dict[str, Any]:
    """What verl keeps beside the tensors: which prompt a row belongs to, and what its answer is scored against."""
    rows = [pair for pair in zip(prompts.group_ids, prompts.targets, strict=True) for _ in range(group_size)]
    return {
        "uid": np.array([f"prompt-{group}" for group, _ in rows], dtype=object),
        "reward_model": np.array([{"ground_truth": target} for _, target in rows], dtype=object),
    }


class RolloutWorker(BatchWorker):
    def __init__(self, connect: Connect, settings: Settings, rank: int) -> None:
        prepare_process()
        super().__init__(connect(f"rollout-{rank}"))
        self._settings = settings
        self._rank = rank
        self._rollout = stages.Rollout(tiny_model(settings.seed), settings.seed, settings.temperature)
        self._feed = WeightsFeed(self.client, settings.timeout_s)

    def generate_sequences(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Answer the prompts of the batch with the newest weights."""
        self._load(self._feed.newer())
        answers = self._rollout(self.read(batch, stages.PROMPT_FIELDS).batch)
        return self.write(batch, DataProto(dict(answers.items())), [self._tag] * len(batch))

    def run_ahead(self) -> RolloutReport:
        """Answer prompts until the last version of the policy is published."""
        report, settings = RolloutReport(), self._settings
        number = self._rank
        while self._wait_for_room(report):
            started = time.perf_counter()
            keys, prompts = prompt_batch(settings, number, settings.prompts_at_once)
            rows, _ = from_data_proto(prompts)
            self._put(keys, rows.update(self._rollout(prompts.batch)))
            report.generating_s += time.perf_counter() - started
            report.rows += len(keys)
            number += settings.rollout_workers
        return report

    def _put(self, keys: list[str], rows: TensorDict) -> None:
        """New rows, all at once, and of which policy they are: the queue drops those that are too old."""
        self.client.put(
            rows,
            partition_id=PARTITION,
            keys=keys,
            tags=[self._tag] * len(keys),
            policy_version=self._rollout.version,
        )

    @property
    def _tag(self) -> Tag:
        return {"status": "finished", "version": self._rollout.version}

    def _wait_for_room(self, report: RolloutReport) -> bool:
        """Wait until more samples may be started, with the newest weights; False: no more are wanted."""
        settings = self._settings
        needed = settings.rollout_workers * settings.prompts_at_once * settings.group_size
        self._load(self._feed.newer())
        while not self._feed.is_over and self.client.admission(PARTITION)["samples"] < needed:
            started = time.perf_counter()
            self._load(self._feed.next())
            report.waiting_s += time.perf_counter() - started
        return not self._feed.is_over

    def _load(self, weights: Weights | None) -> None:
        if weights is not None:
            self._rollout.load(weights)
