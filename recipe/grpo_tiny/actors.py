"""The workers of the job, and the pipeline that drives them through a step.

Every worker waits in the queue for what the stage before it writes, so the stages of a step overlap in chunks. The
calls that start a step carry its number and nothing else: rows travel through the queue only. The weights go from
trainer 0 to the rollout worker as one object with a version.

A worker is an ordinary class. `runtimes` decides whether it lives in a Ray actor or in a thread.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from recipe.grpo_tiny import stages
from recipe.grpo_tiny.config import DP_SIZE, Settings
from recipe.grpo_tiny.evaluation import Evaluation, evaluate
from recipe.grpo_tiny.model import Weights, save, tiny_model, weights_of
from recipe.grpo_tiny.stages import RewardFunction, Stage, TaskPort, Traffic
from recipe.grpo_tiny.task import TASKS
from recipe.grpo_tiny.trainer import GlooSum, Trainer, TrainReport

if TYPE_CHECKING:
    from recipe.grpo_tiny.runtimes import Runtime
    from transfer_queue import TransferQueueClient

Connect: TypeAlias = Callable[[str], "TransferQueueClient"]  # a client of the queue, by the name of who uses it


def prepare_process() -> None:
    """One thread per process for tensors: several processes share two cores."""
    torch.set_num_threads(1)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)  # says once per process what is no news


class RolloutActor:
    def __init__(self, connect: Connect, settings: Settings) -> None:
        prepare_process()
        self._settings = settings
        self._rollout = stages.Rollout(tiny_model(settings.seed), settings.seed)
        port = TaskPort(connect("rollout"), "rollout", timeout_s=settings.timeout_s, whole_groups=True)
        self._stage = Stage(port, stages.PROMPT_FIELDS, self._rollout)

    def step(self, step: int, weights: Weights) -> None:
        """Answer all prompts of the step with these weights."""
        self._rollout.load(weights)
        for _ in range(self._settings.chunks_per_step):
            self._stage.run(step, self._settings.rows_per_chunk)

    def traffic(self) -> list[Traffic]:
        return [self._stage.port.traffic]


class RewardActor:
    """Two stages: rewards of single answers, then advantages of whole groups."""

    def __init__(self, connect: Connect, settings: Settings, reward: RewardFunction) -> None:
        prepare_process()
        self._settings = settings
        client, task = connect("reward"), TASKS[settings.task]
        self._stages = [
            Stage(
                TaskPort(client, "reward", timeout_s=settings.timeout_s),
                stages.REWARD_FIELDS,
                lambda rows: reward(rows, task),
            ),
            Stage(
                TaskPort(client, "advantage", timeout_s=settings.timeout_s),
                stages.ADVANTAGE_FIELDS,
                stages.advantage_rows,
            ),
        ]

    def step(self, step: int) -> None:
        for _ in range(self._settings.chunks_per_step):
            for stage in self._stages:
                stage.run(step, self._settings.rows_per_chunk)

    def traffic(self) -> list[Traffic]:
        return [stage.port.traffic for stage in self._stages]


class ReferenceActor:
    def __init__(self, connect: Connect, settings: Settings) -> None:
        prepare_process()
        self._settings = settings
        port = TaskPort(connect("reference"), "reference", timeout_s=settings.timeout_s)
        self._stage = Stage(port, stages.REFERENCE_FIELDS, stages.Reference(tiny_model(settings.seed)))

    def step(self, step: int) -> None:
        for _ in range(self._settings.chunks_per_step):
            self._stage.run(step, self._settings.rows_per_chunk)

    def traffic(self) -> list[Traffic]:
        return [self._stage.port.traffic]


class TrainerActor:
    """One data-parallel rank. `join` must be called once on all ranks, before the first step."""

    def __init__(self, connect: Connect, settings: Settings, rank: int) -> None:
        prepare_process()
        self._settings = settings
        self._rank = rank
        self._task = TASKS[settings.task]
        self._model = tiny_model(settings.seed)
        self._sum = GlooSum(rank, DP_SIZE, settings.timeout_s)
        self._trainer = Trainer(self._model, lr=settings.lr, kl=settings.kl, all_reduce=self._sum)
        self._port = TaskPort(connect(f"trainer-{rank}"), "train", timeout_s=settings.timeout_s)
        self._version = 0

    def join(self, meeting_file: Path) -> None:
        """Connect the ranks: waits until all of them name the same file."""
        self._sum.join(meeting_file)

    def step(self, step: int) -> TrainReport:
        """Train on this rank's share of the step's rows, together with the other ranks."""
        share = {"dp_rank": self._rank, "dp_size": DP_SIZE, "dp_group_id": f"step_{step}"}
        _, rows = self._port.draw(step, stages.TRAIN_FIELDS, self._settings.rows_per_step // DP_SIZE, share)
        started = time.perf_counter()
        update = self._trainer.step(rows)
        self._version += 1
        self._port.traffic.computing_s += time.perf_counter() - started
        return TrainReport(
            groups=rows["group_id"].numpy(),
            sessions=rows["session_id"].numpy(),
            targets=self._task.targets_of(rows["prompts"]).numpy(),
            versions=rows["policy_version"].numpy(),
            reward_sum=float(rows["rewards"].sum()),
            num_exact=int(rows["exact"].sum()),
            update=update,
        )

    def weights(self) -> Weights:
        return weights_of(self._model, self._version)

    def evaluate_and_save(self, folder: Path) -> Evaluation:
        save(self._model, folder)
        return evaluate(self._model, self._task)

    def traffic(self) -> list[Traffic]:
        return [self._port.traffic]

    def close(self) -> None:
        """Leave the ranks; one that still waits for this one fails at once."""
        self._sum.close()


@dataclass
class Pipeline:
    """All workers of the job, started on a runtime."""

    runtime: Runtime
    settings: Settings
    reward: RewardFunction = stages.score_rows

    def start(self, meeting_file: Path) -> None:
        """Start the workers and wait until all are ready."""
        spawn, call, settings = self.runtime.spawn, self.runtime.call, self.settings
        self._rollout = spawn(RolloutActor, settings)
        self._reward = spawn(RewardActor, settings, self.reward)
        self._reference = spawn(ReferenceActor, settings)
        self._trainers = [spawn(TrainerActor, settings, rank) for rank in range(DP_SIZE)]
        self._stages = [self._rollout, self._reward, self._reference]
        self.runtime.gather(
            [call(worker, "traffic") for worker in self._stages]
            + [call(trainer, "join", meeting_file) for trainer in self._trainers]
        )
        self._weights = call(self._trainers[0], "weights")

    def run_step(self, step: int) -> list[TrainReport]:
        """Take the inserted rows of the step through all stages; return what each trainer did."""
        call = self.runtime.call
        running = [call(self._rollout, "step", step, self._weights)]
        running += [call(worker, "step", step) for worker in (self._reward, self._reference)]
        running += [call(trainer, "step", step) for trainer in self._trainers]
        results: list[Any] = self.runtime.gather(running)
        self._weights = call(self._trainers[0], "weights")
        return results[-DP_SIZE:]

    def finish(self, model_folder: Path) -> tuple[Evaluation, list[Traffic]]:
        """Save and evaluate the trained policy; return the bill of every task, the trainers' as one each."""
        call = self.runtime.call
        workers = [*self._stages, *self._trainers]
        evaluation, *bills = self.runtime.gather(
            [call(self._trainers[0], "evaluate_and_save", model_folder)]
            + [call(worker, "traffic") for worker in workers]
        )
        return evaluation, [bill for worker_bills in bills for bill in worker_bills]
