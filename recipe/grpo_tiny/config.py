"""What a run is made of, and its command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recipe import command_line
from transfer_queue.errors import nearest

DP_SIZE = 2
SMOKE_STEPS = 8
MAX_PROMPT_NOISE = 50  # the model knows 64 positions
TREND_STEPS = 10  # the first and the last so many steps are compared


@dataclass(frozen=True)
class Settings:
    out: Path = Path("runs/tiny")
    runtime: str = "ray"
    task: str = "digit_sum"
    steps: int = 150
    seed: int = 0
    lr: float = 2e-3
    kl: float = 0.01
    prompts: int = 24  # per step
    group_size: int = 8  # answers to each prompt
    chunk_prompts: int = 8  # what a stage draws at a time
    prompt_noise: int = 0  # up to so many fillers in front of a prompt
    timeout_s: float = 60.0  # a stage waits this long for rows
    smoke: bool = False

    @property
    def rows_per_step(self) -> int:
        return self.prompts * self.group_size

    @property
    def rows_per_chunk(self) -> int:
        return self.chunk_prompts * self.group_size

    @property
    def chunks_per_step(self) -> int:
        return self.prompts // self.chunk_prompts

    def problem(self) -> str | None:
        """Say why these settings cannot be run, if so."""
        if self.steps < (1 if self.smoke else 2 * TREND_STEPS):
            return f"--steps {self.steps}: the first and last {TREND_STEPS} steps are compared; or use --smoke"
        if self.group_size < 2:
            return f"--group-size {self.group_size}: an answer is compared with at least one other"
        if min(self.prompts, self.chunk_prompts) < 1 or self.prompts % self.chunk_prompts:
            return (
                f"--prompts {self.prompts} must be divisible by --chunk-prompts {self.chunk_prompts}, both at least 1"
            )
        if self.prompts % DP_SIZE:
            return f"--prompts {self.prompts} must be divisible by the {DP_SIZE} trainers, which train on whole groups"
        if not 0 <= self.seed < 2**63:
            return f"--seed {self.seed} must lie in [0, 2**63)"
        if not 0 <= self.prompt_noise <= MAX_PROMPT_NOISE:
            return f"--prompt-noise {self.prompt_noise} must lie in [0, {MAX_PROMPT_NOISE}]"
        if not all(math.isfinite(number) and number >= 0 for number in (self.lr, self.kl)):
            return f"--lr {self.lr} and --kl {self.kl} must be finite and not negative"
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0):
            return f"--timeout {self.timeout_s} must be a positive number of seconds"
        from recipe.grpo_tiny.task import TASKS  # last, for it brings torch

        if self.task not in TASKS:
            return f"--task {self.task}{nearest(self.task, TASKS)}"
        return None


def parse(argv: Sequence[str] | None) -> Settings:
    """Read a command line and make the output folder; a bad one exits with status 2 and says why."""
    parser = _parser()
    settings = command_line.read(parser, Settings, argv, SMOKE_STEPS)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {settings.out}: {error.strerror}")
    return settings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.grpo_tiny",
        description="Train a tiny random model by GRPO on a CPU, with every row going through the queue.",
        epilog="exit status: 0 learned; 1 crash; 2 bad arguments; 3 no improvement or no conditional gain; "
        "4 rows lost, repeated or mismatched; 130 interrupted",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Settings()
    add = parser.add_argument
    add("--out", type=Path, default=default.out, help="folder for metrics.jsonl, summary.json, reward.png and model/")
    add("--runtime", choices=("ray", "embedded"), default=default.runtime, help="Ray actors, or threads of one process")
    add("--task", default=default.task, help="digit_sum, or the easier echo")
    steps_help = f"optimiser steps (default: {default.steps}, or {SMOKE_STEPS} with --smoke)"
    add("--steps", type=int, default=argparse.SUPPRESS, help=steps_help)
    add("--seed", type=int, default=default.seed)
    add("--lr", type=float, default=default.lr, help="learning rate of AdamW")
    add("--kl", type=float, default=default.kl, help="weight of the KL divergence from the start weights")
    add("--prompts", type=int, default=default.prompts, help="prompts per step")
    add("--group-size", type=int, default=default.group_size, help="answers per prompt")
    add("--chunk-prompts", type=int, default=default.chunk_prompts, help="prompts a stage draws at a time")
    add("--prompt-noise", type=int, default=default.prompt_noise, help="most filler tokens in front of a prompt")
    add("--timeout", type=float, default=default.timeout_s, dest="timeout_s", help="seconds a stage waits for rows")
    add("--smoke", action="store_true", help="a few steps, with the conservation checks only")
    return parser
