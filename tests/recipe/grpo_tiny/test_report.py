"""What a run leaves behind."""

from __future__ import annotations

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from recipe.grpo_tiny.checks import Check
from recipe.grpo_tiny.config import Settings
from recipe.grpo_tiny.evaluation import Evaluation
from recipe.grpo_tiny.report import (
    Journal,
    StepMetrics,
    Times,
    draw_rewards,
    merged,
    smoothed,
    traffic_table,
    write_summary,
)
from recipe.grpo_tiny.stages import Traffic


def steps(count: int) -> list[StepMetrics]:
    return [
        StepMetrics(
            step=step,
            reward=step / count,
            exact=step / count / 2,
            kl=0.1,
            loss=-0.2,
            gradient_norm=1.0,
            max_gap=1e-6,
            rows=192,
            step_s=0.1,
        )
        for step in range(count)
    ]


def test_picture_shows_curves(tmp_path: Path) -> None:
    """The file is a PNG in which the curves, the grid and the legend left marks."""
    from matplotlib.image import imread

    draw_rewards(tmp_path / "reward.png", steps(50), "title")
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    pixels = imread(tmp_path / "reward.png")[:, :, :3]
    assert pixels.shape[:2] == (540, 960)
    blue = (pixels[:, :, 2] > 0.6) & (pixels[:, :, 0] < 0.3)
    orange = (pixels[:, :, 0] > 0.9) & (pixels[:, :, 2] < 0.3)
    assert blue.sum() > 500
    assert orange.sum() > 500
    columns = blue.any(axis=0).nonzero()[0]
    rising = [blue[:, column].nonzero()[0].mean() for column in (columns[len(columns) // 2], columns[-20])]
    assert rising[0] > rising[1]  # rows of a picture count downwards


def test_smoothing_uses_the_neighbours_there_are() -> None:
    """A centred mean over eleven steps, over fewer at the ends."""
    assert smoothed([1.0, 2.0, 6.0]).tolist() == pytest.approx([3.0, 3.0, 3.0])
    line = smoothed(list(range(20)))
    assert line[8:11].tolist() == pytest.approx([8.0, 9.0, 10.0])
    assert (line[0], line[19]) == pytest.approx((2.5, 16.5))


@pytest.mark.parametrize("terminal", [True, False])
def test_journal_writes_a_line_per_step(tmp_path: Path, terminal: bool) -> None:
    """All steps are on disk as they come; without a terminal every tenth and the last are printed."""
    out = StringIO()
    with Journal(tmp_path / "metrics.jsonl", Console(file=out, force_terminal=terminal, width=120), 12) as journal:
        for step in steps(12):
            journal.add(step)
            written = (tmp_path / "metrics.jsonl").read_text().splitlines()
            assert json.loads(written[-1])["step"] == step.step == len(written) - 1
    assert "reward" in out.getvalue()
    if not terminal:
        assert [line.split()[1] for line in out.getvalue().splitlines()] == ["0", "10", "11"]


def test_bills_of_one_task_add_up() -> None:
    """Two trainers are one line of the table, in the order of first sight."""
    bills = merged(
        [Traffic("train", rows=96, bytes_got=10, waited_s=1), Traffic("reward", rows=5), Traffic("train", rows=96)]
    )
    assert bills == [Traffic("train", rows=192, bytes_got=10, waited_s=1), Traffic("reward", rows=5)]
    out = StringIO()
    Console(file=out, width=100).print(traffic_table(bills))
    assert "train" in out.getvalue()
    assert "192" in out.getvalue()


def test_summary_holds_what_compares_two_runs(tmp_path: Path) -> None:
    """Versions, seed, times, bills and both checks, as JSON."""
    write_summary(
        tmp_path / "summary.json",
        Settings(seed=7),
        steps(20),
        Times(start_up=1, training=2, evaluation=3, whole=6.5),
        [Traffic("reward", rows=5)],
        Evaluation(0.9, 0.5, 0.4),
        [Check("rise", True, 0.8, 0.2)],
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["seed"] == summary["settings"]["seed"] == 7
    assert set(summary["versions"]) >= {"python", "torch", "transformers", "ray", "transfer_queue"}
    assert summary["times_s"]["whole"] == 6.5
    assert summary["evaluation"]["conditional_gain"] == pytest.approx(0.4)
    assert summary["checks"] == [{"name": "rise", "passed": True, "value": 0.8, "needed": 0.2}]
    assert summary["tasks"][0]["task"] == "reward"
