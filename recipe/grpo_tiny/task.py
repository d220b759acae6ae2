"""What the tiny model learns: prompts, and the reward of an answer.

`digit_sum`: the prompt `<bos> t17 =` asks for at most three digits whose sum is 17. `echo`: `<bos> 5 =` asks for the
shown digit, repeated. With f the share of digits among the tokens before the end token, and c in [0, 1] how close the
digits come (0 unless all tokens are digits), the reward is 0.4 f + 0.6 c, and 0 for an empty answer. It is graded, so
the eight answers to a prompt differ from the first step on, although nothing was learned yet.

Legend: B rows, P prompt tokens, R response tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recipe.grpo_tiny import ragged

PAD, BOS, EOS, EQUALS = range(4)
FIRST_DIGIT, NUM_DIGITS = 4, 10
FIRST_SUM, NUM_SUMS = 14, 19
FIRST_FILLER, VOCAB_SIZE = 33, 64
MAX_NEW_TOKENS = 3
TARGET_SHIFT = 7  # the evaluation also scores every answer against the target this far away


@dataclass(frozen=True)
class Scores:
    rewards: Tensor  # [B] float32 in [0, 1]
    exact: Tensor  # [B] bool


@dataclass(frozen=True)
class Task:
    """`closeness(digits [B, R], is_digit [B, R], targets [B])` rates all-digit answers: [B] in [0, 1], 1 is right."""

    name: str
    first_symbol: int
    num_targets: int
    closeness: Callable[[Tensor, Tensor, Tensor], Tensor]

    def prompt(self, target: int) -> list[int]:
        return [BOS, self.first_symbol + target, EQUALS]

    def targets_of(self, prompts: Tensor) -> Tensor:
        """Read the targets [B] back from jagged prompts [B, P]: the token before the last."""
        return prompts.values()[prompts.offsets()[1:] - 2] - self.first_symbol

    def score(self, responses: Tensor, targets: Tensor) -> Scores:
        """Rate jagged `responses` [B, R] against `targets` [B]."""
        tokens = ragged.padded(responses, EOS)
        said = tokens != EOS
        is_digit = (tokens >= FIRST_DIGIT) & (tokens < FIRST_DIGIT + NUM_DIGITS)
        digits = torch.where(is_digit, tokens - FIRST_DIGIT, 0)
        count = said.sum(1)
        share = is_digit.sum(1) / count.clamp(min=1)
        close = self.closeness(digits, is_digit, targets) * ((is_digit == said).all(1) & (count > 0))
        return Scores(rewards=(0.4 * share + 0.6 * close).float(), exact=close == 1)


def _sum_closeness(digits: Tensor, _: Tensor, targets: Tensor) -> Tensor:
    return (1 - (digits.sum(1) - targets).abs() / 9).clamp(min=0)


def _echo_closeness(digits: Tensor, is_digit: Tensor, targets: Tensor) -> Tensor:
    return ((digits == targets[:, None]) & is_digit).sum(1) / is_digit.sum(1).clamp(min=1)


TASKS = {
    task.name: task
    for task in (
        Task("digit_sum", FIRST_SUM, NUM_SUMS, _sum_closeness),
        Task("echo", FIRST_DIGIT, NUM_DIGITS, _echo_closeness),
    )
}


@dataclass(frozen=True)
class Prompts:
    """The prompts of one step; `group_ids` are unique in the run."""

    group_ids: tuple[int, ...]
    targets: tuple[int, ...]
    tokens: tuple[list[int], ...]


def draw_prompts(task: Task, *, seed: int, step: int, count: int, noise: int = 0) -> Prompts:
    """Draw the prompts of a step, the same ones for the same arguments; each has 0 to `noise` fillers in front."""
    random = np.random.default_rng([seed, step])
    targets = tuple(random.integers(task.num_targets, size=count).tolist())
    tokens = []
    for target in targets:
        fillers = random.integers(FIRST_FILLER, VOCAB_SIZE, size=random.integers(noise + 1))
        tokens.append(fillers.tolist() + task.prompt(target))
    return Prompts(tuple(range(step * count, (step + 1) * count)), targets, tuple(tokens))
