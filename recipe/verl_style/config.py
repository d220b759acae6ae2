"""What a run is made of, and its command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

from recipe import command_line
from recipe.grpo_tiny.config import TREND_STEPS

NUM_ACTORS = 2  # data-parallel ranks
SMOKE_STEPS = 4


@dataclass(frozen=True)
class Settings:
    mode: str = "sync"
    runtime: str = "ray"
    steps: int = 60
    prompts: int = 16  # per step
    group_size: int = 8  # answers to each prompt
    mini_batches: int = 2  # optimiser steps per step
    rollout_workers: int = 1
    max_staleness: int = 1  # versions that the policy of an answer may lag behind when it is trained on; async only
    seed: int = 0
    lr: float = 3e-3
    kl: float = 0.01
    temperature: float = 1.0
    timeout_s: float = 60.0  # the longest wait for samples, or for weights
    smoke: bool = False

    @property
    def rows_per_step(self) -> int:
        return self.prompts * self.group_size

    @property
    def prompts_at_once(self) -> int:
        """What a rollout worker answers in one go."""
        return max(self.prompts // (2 * self.rollout_workers), 1)

    def problem(self) -> str | None:
        """Say why these settings cannot be run, if so."""
        if self.steps < (1 if self.smoke else 2 * TREND_STEPS):
            return f"--steps {self.steps}: the first and last {TREND_STEPS} steps are compared; or use --smoke"
        if self.group_size < 2:
            return f"--group-size {self.group_size}: an answer is compared with at least one other"
        if min(self.mini_batches, self.rollout_workers) < 1:
            return "--mini-batches and --rollout-workers must be at least 1"
        for parts, who in ((NUM_ACTORS, "actors"), (self.rollout_workers, "rollout workers")):
            if self.prompts < 1 or self.prompts % parts:
                return f"--prompts {self.prompts} must be divisible by the {parts} {who}, which get whole groups"
        if self.max_staleness < 0:
            return f"--max-staleness {self.max_staleness} must be at least 0"
        if not all(math.isfinite(number) and number >= 0 for number in (self.lr, self.kl)):
            return f"--lr {self.lr} and --kl {self.kl} must be finite and not negative"
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            return f"--timeout {self.timeout_s} must be a positive number of seconds"
        return self._endless_wait()

    def _endless_wait(self) -> str | None:
        """A worker starts only if all of them may, see `rollout`: the last samples of a step might never be started."""
        spare = self.max_staleness * self.prompts
        if self.mode == "async" and spare < (self.rollout_workers - 1) * self.prompts_at_once:
            return f"--max-staleness {self.max_staleness} leaves no room for {self.rollout_workers} rollout workers"
        return None


def parse(argv: Sequence[str] | None) -> Settings:
    """Read a command line; a bad one exits with status 2 and says why."""
    return command_line.read(_parser(), Settings, argv, SMOKE_STEPS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.verl_style",
        description="Train a tiny random model by PPO on a CPU: the driver holds metadata, workers fetch and put rows.",
        epilog="exit status: 0 learned; 1 crash; 2 bad arguments; 3 no improvement or no conditional gain; "
        "4 rows lost, repeated or too old; 130 interrupted",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Settings()
    add = parser.add_argument
    mode_help = "one stage after the other, or generation that runs ahead within the staleness bound"
    add("--mode", choices=("sync", "async"), default=default.mode, help=mode_help)
    add("--runtime", choices=("ray", "embedded"), default=default.runtime, help="Ray actors, or threads of one process")
    steps_help = f"training steps (default: {default.steps}, or {SMOKE_STEPS} with --smoke)"
    add("--steps", type=int, default=argparse.SUPPRESS, help=steps_help)
    add("--prompts", type=int, default=default.prompts, help="prompts per step")
    add("--group-size", type=int, default=default.group_size, help="answers per prompt")
    add("--mini-batches", type=int, default=default.mini_batches, help="optimiser steps per step")
    add("--rollout-workers", type=int, default=default.rollout_workers)
    staleness_help = "versions by which an answer's policy may lag behind when it is trained on, with --mode async"
    add("--max-staleness", type=int, default=default.max_staleness, help=staleness_help)
    add("--seed", type=int, default=default.seed)
    add("--lr", type=float, default=default.lr, help="learning rate of AdamW")
    add("--kl", type=float, default=default.kl, help="weight of the KL divergence from the start weights")
    add("--timeout", type=float, default=default.timeout_s, dest="timeout_s", help="seconds to wait for samples")
    add("--smoke", action="store_true", help="a few steps, with the conservation checks only")
    return parser
