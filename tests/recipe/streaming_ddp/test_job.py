"""The job as its users run it: processes of their own, on gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def command(forked: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs the job and returns its status, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with forked("", *arguments, module="recipe.streaming_ddp") as process:
            output, errors = process.communicate(timeout=100)
        return process.returncode, output, errors

    return run


@pytest.mark.timeout(110)
def test_the_job_learns_and_sees_every_row_once(command: Any) -> None:
    """Two ranks with a loader worker each, which share the rows equally."""
    status, output, errors = command("--rows", "8192", "--batch-size", "128", "--features", "32", "--num-workers", "1")
    assert status == 0, output + errors
    shown = {line.partition("  ")[0].strip(): line for line in output.splitlines()}
    assert "4,096 rows in 32 batches" in shown["rank 0"]
    assert "4,096 rows in 32 batches" in shown["rank 1"]
    assert "8,192 put, each seen exactly once" in shown["rows"]
    assert len(output.splitlines()) < 10


@pytest.mark.slow
@pytest.mark.timeout(110)
@pytest.mark.parametrize("workers", [0, 2])
def test_the_job_with_other_loaders(workers: int, command: Any) -> None:
    """Batches drawn by a thread of the rank, or by two processes in turn."""
    status, output, errors = command("--num-workers", str(workers))
    assert status == 0, output + errors
    assert "65,536 put, each seen exactly once" in output


@pytest.mark.slow
@pytest.mark.timeout(110)
def test_learning_rate_zero_is_no_success(command: Any) -> None:
    status, output, errors = command("--rows", "4096", "--lr", "0")
    assert status == 3, output + errors
    assert "FAILED  variance explained" in output
