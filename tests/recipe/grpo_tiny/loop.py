"""The stages of the job one after the other in one thread, without a queue: what the job must reproduce."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from tensordict import TensorDict

from recipe.grpo_tiny.evaluation import Evaluation, evaluate
from recipe.grpo_tiny.model import tiny_model, weights_of
from recipe.grpo_tiny.stages import Reference, RewardFunction, Rollout, advantage_rows, prompt_rows, score_rows
from recipe.grpo_tiny.task import TASKS, Task, draw_prompts
from recipe.grpo_tiny.trainer import Trainer, Update

GROUP_SIZE = 8


@dataclass
class Loop:
    """A run on 24 prompts a step; `rows_of` makes the complete rows of one step, `step` trains on them."""

    task: Task = TASKS["digit_sum"]
    lr: float = 6e-3
    seed: int = 0
    prompt_noise: int = 0
    reward: RewardFunction = score_rows
    rewards: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.set_num_threads(1)
        self.model = tiny_model(self.seed)
        self.trainer = Trainer(self.model, lr=self.lr, kl=0.01)
        self.rollout = Rollout(tiny_model(self.seed), self.seed)
        self.reference = Reference(tiny_model(self.seed))

    def rows_of(self, step: int) -> TensorDict:
        prompts = draw_prompts(self.task, seed=self.seed, step=step, count=24, noise=self.prompt_noise)
        rows, _ = prompt_rows(prompts, GROUP_SIZE)
        rows.update(self.rollout(rows))
        rows.update(self.reward(rows, self.task))
        rows.update(advantage_rows(rows))
        rows.update(self.reference(rows))
        return rows

    def step(self, step: int) -> Update:
        rows = self.rows_of(step)
        update = self.trainer.step(rows)
        self.rollout.load(weights_of(self.model, step + 1))
        self.rewards.append(float(rows["rewards"].mean()))
        return update

    def run(self, num_steps: int) -> Evaluation:
        for step in range(num_steps):
            self.step(step)
        return evaluate(self.model, self.task)
