"""What the driver measures while it runs, and the one screen that it shows."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from recipe.sparkline import sparkline
from recipe.verl_style.config import NUM_ACTORS, Settings
from recipe.verl_style.rollout import RolloutReport

LINES = 8  # of progress


@dataclass(frozen=True)
class StepMetrics:
    step: int
    reward: float  # mean over the rows of the step
    exact: float  # share of right answers
    kl: float
    staleness: Counter[int]  # {versions that the policy of an answer lagged behind: rows}
    step_s: float

    def __str__(self) -> str:
        lag = sum(lag * rows for lag, rows in self.staleness.items()) / self.staleness.total()
        return (
            f"step {self.step:3d}  reward {self.reward:.3f}  exact {self.exact:.2f}  KL {self.kl:.2f}  "
            f"staleness {lag:.2f}  {self.staleness.total() / self.step_s:.0f} rows/s"
        )


@dataclass
class RunLog:
    """The steps so far, and where the driver's time went."""

    num_steps: int
    steps: list[StepMetrics] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    rollout: RolloutReport | None = None  # of workers that ran ahead

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - started

    def add(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        if metrics.step % max(self.num_steps // LINES, 1) == 0 or len(self.steps) == self.num_steps:
            print(metrics, flush=True)

    @property
    def rewards(self) -> list[float]:
        return [metrics.reward for metrics in self.steps]

    @property
    def staleness(self) -> Counter[int]:
        return sum((metrics.staleness for metrics in self.steps), Counter())


def show_start(settings: Settings, start_up_s: float) -> None:
    counts = f"{settings.rollout_workers} rollout, 1 reward and {NUM_ACTORS} actor workers"
    print(f"{settings.mode} on {settings.runtime}: {counts} ready after {start_up_s:.1f} s", flush=True)


def show(settings: Settings, log: RunLog, accounts: Mapping[str, Any], training_s: float) -> None:
    """Print what happened, a line per question."""
    bound = settings.max_staleness if settings.mode == "async" else 0
    lags = "  ".join(f"{rows:,} samples by {lag}" for lag, rows in sorted(log.staleness.items()))
    print(f"reward     {sparkline(log.rewards)}  {log.rewards[0]:.2f} → {log.rewards[-1]:.2f}")
    print(f"staleness  {lags}  (bound: {bound})")
    print(f"driver     {training_s:.1f} s: {_shares(log.seconds, training_s)}")
    if log.rollout is not None:
        busy = {"generating": log.rollout.generating_s, "waiting for room": log.rollout.waiting_s}
        print(f"rollout    {log.rollout.rows:,} samples; of {training_s:.1f} s: {_shares(busy, training_s)}")
    trained, stale = (accounts["dropped"].get(reason, 0) for reason in ("cleared", "stale"))
    print(
        f"audit      {accounts['inserted']:,} samples inserted = {trained:,} trained once and cleared "
        f"+ {stale:,} dropped as too old + {accounts['live']:,} left over"
    )


def _shares(seconds: Mapping[str, float], whole_s: float) -> str:
    return "  ".join(f"{what} {100 * spent / whole_s:.0f}%" for what, spent in seconds.items())
