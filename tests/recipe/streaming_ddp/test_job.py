"""The job as its users run it: processes of their own, on gloo."""

from __future__ import annotations

import subprocess
import sys

import pytest


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "recipe.streaming_ddp", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.timeout(110)
def test_the_job_learns_and_sees_every_row_once() -> None:
    """Two ranks with a loader worker each, which share the rows equally."""
    done = command("--rows", "8192", "--batch-size", "128", "--features", "32", "--num-workers", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = {line.partition("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert "4,096 rows in 32 batches" in shown["rank 0"]
    assert "4,096 rows in 32 batches" in shown["rank 1"]
    assert "8,192 put, each seen exactly once" in shown["rows"]
    assert len(done.stdout.splitlines()) < 10


@pytest.mark.slow
@pytest.mark.timeout(110)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_job_with_other_loaders(workers: int) -> None:
    """Batches drawn by a thread of the rank, or by two processes in turn."""
    done = command("--num-workers", str(workers))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "65,536 put, each seen exactly once" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(110)
def test_learning_rate_zero_is_no_success() -> None:
    done = command("--rows", "4096", "--lr", "0")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "FAILED  variance explained" in done.stdout
