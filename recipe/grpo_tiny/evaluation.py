"""Did the policy learn to answer *its* prompt, or only answers that suit all prompts?"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recipe.grpo_tiny import generation, ragged
from recipe.grpo_tiny.model import Model
from recipe.grpo_tiny.task import TARGET_SHIFT, Task


@dataclass(frozen=True)
class Evaluation:
    """Mean rewards of the greedy answers to every target of the task."""

    reward: float  # against the target that was shown
    shifted_reward: float  # the same answers against another target
    exact: float  # share of right answers

    @property
    def conditional_gain(self) -> float:
        """About 0 for a policy that does not read its prompt, however good its answers look on average."""
        return self.reward - self.shifted_reward


def evaluate(model: Model, task: Task) -> Evaluation:
    """Answer every target once, greedily."""
    targets = torch.arange(task.num_targets)
    tokens = torch.tensor([task.prompt(target) for target in targets.tolist()])
    prompts = ragged.jagged(tokens.flatten(), torch.full((len(tokens),), tokens.shape[1]))
    answers = generation.generate(model, prompts, noise=None).responses
    scores = task.score(answers, targets)
    shifted = task.score(answers, (targets + TARGET_SHIFT) % task.num_targets)
    return Evaluation(float(scores.rewards.mean()), float(shifted.rewards.mean()), float(scores.exact.float().mean()))
