"""The job as a whole, on the embedded queue; with Ray where marked slow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import transfer_queue
from recipe.grpo_tiny.job import NOT_LEARNED, PASSED, ROWS_WRONG
from recipe.verl_style import job
from recipe.verl_style.config import Settings
from recipe.verl_style.protocol import DataProto
from recipe.verl_style.rollout import PARTITION, RolloutWorker
from recipe.verl_style.workers import RewardWorker

MODES = ["sync", "async"]


def small(mode: str, **changes: Any) -> Settings:
    """6 steps of 4 prompts."""
    settings = Settings(mode=mode, runtime="embedded", steps=6, prompts=4, group_size=4, timeout_s=20, smoke=True)
    return replace(settings, **changes)


def lines(output: str) -> dict[str, str]:
    """The summary, by the first word of a line."""
    return {line.split()[0]: line for line in output.splitlines() if line}


def test_in_step_every_answer_is_of_the_newest_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """And rollout and actor agree on its log-probs, or the run had ended with another status."""
    assert job.exit_status(small("sync")) == PASSED
    shown = lines(capsys.readouterr().out)
    assert "96 samples by 0  (bound: 0)" in shown["staleness"]
    assert "96 samples inserted = 96 trained once and cleared + 0 dropped as too old + 0 left" in shown["audit"]


@pytest.mark.parametrize(("max_staleness", "workers"), [(0, 1), (1, 2), (3, 1)])
def test_running_ahead_stays_within_the_bound(
    max_staleness: int, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was generated is trained once, or told as dropped or left over; with a bound of 0 nothing is ahead."""
    settings = small("async", max_staleness=max_staleness, rollout_workers=workers)
    assert job.exit_status(settings) == PASSED
    shown = lines(capsys.readouterr().out)
    assert f"(bound: {max_staleness})" in shown["staleness"]
    assert "96 trained once and cleared" in shown["audit"]
    if max_staleness == 0:
        assert "96 samples by 0 " in shown["staleness"]
    if workers == 1:
        assert " 0 dropped as too old" in shown["audit"]


@pytest.mark.parametrize("mode", MODES)
def test_learning_rate_zero_is_no_success(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.exit_status(small(mode, steps=20, lr=0.0, smoke=False)) == NOT_LEARNED
    assert capsys.readouterr().out.count("FAILED") == 2


def test_a_lost_sample_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One that somebody clears while its batch is on its way."""
    compute_reward = RewardWorker.compute_reward

    def losing(self: RewardWorker, batch: Any) -> Any:
        done = compute_reward(self, batch)
        if batch.extra_info["global_steps"] == 2:
            transfer_queue.kv_clear(batch.keys[-1], PARTITION)
        return done

    monkeypatch.setattr(RewardWorker, "compute_reward", losing)
    assert job.exit_status(small("sync")) == ROWS_WRONG
    assert "1 of 8 keys not found in partition 'train': ['11_3']" in capsys.readouterr().err


def test_an_error_in_a_stage_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: RewardWorker, data: DataProto) -> DataProto:
        raise ZeroDivisionError("reward model on fire")

    monkeypatch.setattr(RewardWorker, "compute_reward", broken)
    with pytest.raises(ZeroDivisionError, match="on fire"):
        job.exit_status(small("async"))


def test_an_error_of_a_worker_that_runs_ahead_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the wait that it leaves behind."""

    def broken(self: RolloutWorker, *_: Any) -> None:
        raise ZeroDivisionError("engine on fire")

    monkeypatch.setattr(RolloutWorker, "_put", broken)
    with pytest.raises(ZeroDivisionError, match="on fire"):
        job.exit_status(small("async", timeout_s=0.5))


@pytest.fixture
def command(forked: Any) -> Callable[..., tuple[int, str, str]]:
    """Runs the job and returns its status, its output and its errors."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with forked("", *arguments, module="recipe.verl_style") as process:
            output, errors = process.communicate(timeout=100)
        return process.returncode, output, errors

    return run


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("runtime", ["embedded", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.timeout(110)
def test_smoke_command(mode: str, runtime: str, command: Any) -> None:
    """A few steps end with status 0 and the accounts of every sample."""
    status, output, errors = command("--smoke", "--mode", mode, "--runtime", runtime)
    assert status == 0, errors
    shown = lines(output)
    assert f"{4 * 128} trained once and cleared" in shown["audit"]
    assert ("rollout" in shown) == (mode == "async")
    assert len(output.splitlines()) <= 24


@pytest.mark.slow
@pytest.mark.timeout(110)
@pytest.mark.parametrize("mode", MODES)
def test_the_job_learns(mode: str, command: Any) -> None:
    """The whole run under Ray passes both checks."""
    status, output, errors = command("--mode", mode)
    assert status == 0, output + errors
    assert output.count("passed") == 2
