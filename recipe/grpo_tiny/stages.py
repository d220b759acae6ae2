"""The stages of a step: draw rows that have the fields a stage reads, compute, add the fields it writes.

Every stage but training is the same three lines around a function from columns to columns; those functions know
nothing of the queue. A `TaskPort` is one task's way to the queue and keeps its bill.

Legend: B rows of a draw, P prompt tokens, R response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from tensordict import TensorDict
from torch import Tensor

from recipe.grpo_tiny import generation, ragged
from recipe.grpo_tiny.loss import group_advantages
from recipe.grpo_tiny.model import Model, Weights, load_weights, response_log_probs
from recipe.grpo_tiny.task import Prompts, Task

if TYPE_CHECKING:
    from transfer_queue import BatchMeta, TransferQueueClient

Compute: TypeAlias = Callable[[TensorDict], TensorDict]
RewardFunction: TypeAlias = Callable[[TensorDict, Task], TensorDict]

TASK_NAMES = ("rollout", "reward", "reference", "advantage", "train")
GROUPED_TASKS = ("advantage", "train")  # drawn by GRPOSampler; training also splits its draw over ranks

PROMPT_FIELDS = ["prompts", "group_id", "session_id"]
REWARD_FIELDS = ["prompts", "responses"]
REFERENCE_FIELDS = ["prompts", "responses", "temperature"]
ADVANTAGE_FIELDS = ["rewards", "group_id"]
TRAIN_FIELDS = [
    *PROMPT_FIELDS,
    "responses",
    "response_mask",
    "rollout_log_probs",
    "ref_log_probs",
    "advantages",
    "temperature",
    "policy_version",
    "rewards",
    "exact",
]


@dataclass
class Traffic:
    """What a task moved and how it spent its time."""

    task: str
    rows: int = 0
    calls: int = 0
    bytes_put: int = 0
    bytes_got: int = 0
    waited_s: float = 0.0  # in get_meta, for rows to become ready
    moving_s: float = 0.0  # in get_data and put
    computing_s: float = 0.0


class TaskPort:
    """Draws for one task and writes back to what it drew."""

    def __init__(self, client: TransferQueueClient, task: str, *, timeout_s: float, whole_groups: bool = False) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._whole_groups = whole_groups
        self.traffic = Traffic(task)

    def draw(
        self, step: int, fields: list[str], batch_size: int, sampler_params: dict[str, Any] | None = None
    ) -> tuple[BatchMeta, TensorDict]:
        """Wait for `batch_size` rows of the step that have the fields; GetMetaTimeout after the port's timeout."""
        started = time.perf_counter()
        meta = self._client.get_meta(
            data_fields=fields,
            batch_size=batch_size,
            global_step=step,
            task_name=self.traffic.task,
            get_n_samples=self._whole_groups,
            sampler_params=sampler_params,
            timeout=self._timeout_s,
        )
        drawn = time.perf_counter()
        rows = self._client.get_data(meta)
        self.traffic.waited_s += drawn - started
        self._count(batch_size, got=_size_bytes(rows), since=drawn)
        return meta, rows

    def write(self, meta: BatchMeta, columns: TensorDict) -> None:
        """Add fields to drawn rows."""
        started = time.perf_counter()
        self._client.put(columns, metadata=meta, timeout=self._timeout_s)
        self._count(0, put=_size_bytes(columns), since=started)

    def insert(self, step: int, rows: TensorDict, group_ids: list[int], group_size: int) -> None:
        """Start the step with new rows."""
        started = time.perf_counter()
        self._client.put(rows, global_step=step, group_ids=group_ids, group_size=group_size, timeout=self._timeout_s)
        self._count(len(rows), put=_size_bytes(rows), since=started)

    def _count(self, rows: int, *, put: int = 0, got: int = 0, since: float) -> None:
        self.traffic.calls += 1
        self.traffic.rows += rows
        self.traffic.bytes_put += put
        self.traffic.bytes_got += got
        self.traffic.moving_s += time.perf_counter() - since


def _size_bytes(columns: TensorDict) -> int:
    return sum((c.values() if c.is_nested else c).nbytes for c in columns.values())


@dataclass
class Stage:
    """One stage as it runs: `run` handles one chunk of a step."""

    port: TaskPort
    fields: list[str]
    compute: Compute

    def run(self, step: int, batch_size: int) -> None:
        meta, rows = self.port.draw(step, self.fields, batch_size)
        started = time.perf_counter()
        columns = self.compute(rows)
        self.port.traffic.computing_s += time.perf_counter() - started
        self.port.write(meta, columns)


# ---------------------------------------------------------------- what the stages compute


def prompt_rows(prompts: Prompts, group_size: int) -> tuple[TensorDict, list[int]]:
    """Return the rows of a step, `group_size` adjacent ones per prompt, and the group of each."""
    tokens = [row for row in prompts.tokens for _ in range(group_size)]
    groups = [group for group in prompts.group_ids for _ in range(group_size)]
    lengths = torch.tensor([len(row) for row in tokens])
    columns = {
        "prompts": ragged.jagged(torch.tensor([token for row in tokens for token in row]), lengths),
        "group_id": torch.tensor(groups),
        "session_id": torch.arange(group_size).repeat(len(prompts.tokens)),
    }
    return TensorDict(columns, batch_size=[len(groups)]), groups


@dataclass
class Rollout:
    """Answers prompts with the newest weights it was given. Seeds: see `generation.row_seeds`."""

    model: Model
    seed: int
    temperature: float = 1.0
    version: int = field(default=0, init=False)

    def load(self, weights: Weights) -> None:
        load_weights(self.model, weights)
        self.version = weights.version

    def __call__(self, rows: ragged.Columns) -> TensorDict:
        seeds = generation.row_seeds(self.seed, rows["group_id"].tolist(), rows["session_id"].tolist())
        answers = generation.generate(self.model, rows["prompts"], generation.gumbel_noise(seeds), self.temperature)
        size = len(seeds)
        trainable = torch.ones(len(answers.responses.values()), dtype=torch.int8)
        columns = {
            "responses": answers.responses,
            "response_mask": ragged.jagged(trainable, ragged.row_lengths(answers.responses)),
            "rollout_log_probs": answers.log_probs,
            "temperature": torch.full((size,), self.temperature),
            "finish_reason": (~answers.ended).to(torch.uint8),
            "policy_version": torch.full((size, 2), self.version),
        }
        return TensorDict(columns, batch_size=[size])


def score_rows(rows: TensorDict, task: Task) -> TensorDict:
    """Reward each answer against the target that its own prompt shows."""
    scores = task.score(rows["responses"], task.targets_of(rows["prompts"]))
    return TensorDict({"rewards": scores.rewards, "exact": scores.exact}, batch_size=rows.batch_size)


@dataclass
class Reference:
    """Log-probs of the answers under the start weights."""

    model: Model

    def __call__(self, rows: TensorDict) -> TensorDict:
        return TensorDict({"ref_log_probs": answer_log_probs(self.model, rows)}, batch_size=rows.batch_size)


@torch.no_grad()
def answer_log_probs(model: Model, rows: ragged.Columns) -> Tensor:
    """Return the log-probs of the answers, jagged [B, R] float32, without a gradient."""
    lengths = ragged.row_lengths(rows["responses"])
    log_probs = response_log_probs(model, rows["prompts"], rows["responses"], rows["temperature"])
    return ragged.jagged(log_probs[ragged.valid(lengths)], lengths)


def advantage_rows(rows: TensorDict) -> TensorDict:
    """Compare each reward with its group; the rows hold whole groups."""
    advantages, _ = group_advantages(rows["rewards"], rows["group_id"])
    return TensorDict({"advantages": advantages}, batch_size=rows.batch_size)
