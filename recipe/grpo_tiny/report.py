"""What the run shows and leaves behind: progress, metrics.jsonl, reward.png, summary.json, the final tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import transfer_queue
from recipe.grpo_tiny.checks import Check
from recipe.grpo_tiny.config import Settings
from recipe.grpo_tiny.evaluation import Evaluation
from recipe.grpo_tiny.stages import Traffic

PLAIN_LINE_STEPS = 10  # without a terminal, one line per so many steps
SMOOTHING_STEPS = 5  # to either side


@dataclass(frozen=True)
class StepMetrics:
    step: int
    reward: float  # mean over the rows of the step
    exact: float  # share of right answers
    kl: float
    loss: float
    gradient_norm: float
    max_gap: float  # see trainer.Update
    rows: int
    step_s: float

    @property
    def line(self) -> str:
        return (
            f"reward {self.reward:.3f}  exact {self.exact:.2f}  KL {self.kl:.2f}  {self.rows / self.step_s:.0f} rows/s"
        )


@dataclass(frozen=True)
class Times:
    """Seconds."""

    start_up: float  # until all workers are ready
    training: float  # the loop over the steps
    evaluation: float
    whole: float  # all of it, with stopping


class Journal:
    """The steps as they come: a line of metrics.jsonl, and the bar, or plain lines where there is no terminal."""

    def __init__(self, path: Path, console: Console, num_steps: int) -> None:
        self._file = path.open("w", encoding="utf-8", buffering=1)
        self._console = console
        self._num_steps = num_steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._bar = self._progress.add_task("", total=num_steps)
        self.steps: list[StepMetrics] = []

    def __enter__(self) -> Journal:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()

    def add(self, metrics: StepMetrics) -> None:
        self.steps.append(metrics)
        self._file.write(json.dumps(asdict(metrics)) + "\n")
        self._progress.update(self._bar, advance=1, description=metrics.line)
        last = len(self.steps) == self._num_steps
        if not self._console.is_terminal and (last or metrics.step % PLAIN_LINE_STEPS == 0):
            self._console.print(f"step {metrics.step:3d}  {metrics.line}", highlight=False)


def smoothed(values: Sequence[float]) -> NDArray[np.float64]:
    """Return the mean of each value and its neighbours; fewer of them at the ends."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    steps = np.arange(len(values))
    first = np.maximum(steps - SMOOTHING_STEPS, 0)
    behind = np.minimum(steps + SMOOTHING_STEPS + 1, len(values))
    averages: NDArray[np.float64] = (sums[behind] - sums[first]) / (behind - first)
    return averages


def draw_rewards(path: Path, steps: Sequence[StepMetrics], title: str) -> None:
    """Write the picture of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbers = [metrics.step for metrics in steps]
    rewards = [metrics.reward for metrics in steps]
    axes.plot(numbers, rewards, ".", color="tab:blue", alpha=0.4, label="mean reward of a step")
    axes.plot(numbers, smoothed(rewards), color="tab:blue", label="smoothed")
    axes.plot(numbers, [metrics.exact for metrics in steps], color="tab:orange", linewidth=1, label="exact answers")
    axes.set(xlabel="step", ylabel="mean reward, share of rows", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=120)


def write_summary(
    path: Path,
    settings: Settings,
    steps: Sequence[StepMetrics],
    times: Times,
    traffic: Sequence[Traffic],
    evaluation: Evaluation,
    checks: Sequence[Check],
) -> None:
    """Write all that is needed to compare two runs."""
    versions = {"python": python_version(), "transfer_queue": transfer_queue.__version__}
    versions |= {package: version(package) for package in ("torch", "transformers", "tensordict", "ray", "numpy")}
    summary: dict[str, Any] = {
        "settings": asdict(settings) | {"out": str(settings.out)},
        "seed": settings.seed,
        "versions": versions,
        "times_s": asdict(times),
        "rows_per_s": sum(metrics.rows for metrics in steps) / times.training,
        "rewards": {"first": steps[0].reward, "last": steps[-1].reward},
        "evaluation": asdict(evaluation) | {"conditional_gain": evaluation.conditional_gain},
        "checks": [asdict(check) for check in checks],
        "tasks": [asdict(bill) for bill in traffic],
    }
    path.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


def merged(traffic: Sequence[Traffic]) -> list[Traffic]:
    """Add up the bills of workers that serve the same task."""
    bills: dict[str, Traffic] = {}
    for bill in traffic:
        total = bills.setdefault(bill.task, Traffic(bill.task))
        for column in fields(Traffic):
            if column.name != "task":
                setattr(total, column.name, getattr(total, column.name) + getattr(bill, column.name))
    return list(bills.values())


def traffic_table(traffic: Sequence[Traffic]) -> Table:
    """Return the bill of every task; the times of workers that serve the same task add up."""
    table = Table("task", title="through the queue")
    for heading in ("rows", "MB put", "MB got", "waited s", "moving s", "computing s"):
        table.add_column(heading, justify="right")
    for bill in traffic:
        table.add_row(
            bill.task,
            f"{bill.rows:,}",
            f"{bill.bytes_put / 1e6:.2f}",
            f"{bill.bytes_got / 1e6:.2f}",
            f"{bill.waited_s:.1f}",
            f"{bill.moving_s:.1f}",
            f"{bill.computing_s:.1f}",
        )
    return table
