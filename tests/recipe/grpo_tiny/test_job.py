"""The job as a whole, on the embedded queue; with Ray where marked slow."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensordict import TensorDict

import transfer_queue
from recipe.grpo_tiny import job
from recipe.grpo_tiny.config import Settings
from recipe.grpo_tiny.stages import TASK_NAMES, score_rows
from recipe.grpo_tiny.task import Task

FILES = {"metrics.jsonl", "summary.json", "reward.png", "model"}


def small(out: Path, **changes: Any) -> Settings:
    """20 steps of 2 prompts in two chunks."""
    settings = Settings(out=out, runtime="embedded", steps=20, prompts=2, chunk_prompts=1, timeout_s=20)
    return replace(settings, **changes)


def rewards_of(out: Path) -> list[float]:
    return [json.loads(line)["reward"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_learning_rate_zero_is_no_success(tmp_path: Path) -> None:
    """Nothing is learned, both checks say so, and the files are there: status 3."""
    assert job.exit_status(small(tmp_path, lr=0.0)) == job.NOT_LEARNED
    assert len(rewards_of(tmp_path)) == 20
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [check["passed"] for check in summary["checks"]] == [False, False]
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    """Two runs of one seed agree in every step, whatever order their stages ran in; another seed differs."""
    rewards = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        assert job.exit_status(small(tmp_path / name, seed=seed, steps=3, smoke=True)) == job.PASSED
        rewards.append(rewards_of(tmp_path / name))
    first, again, other = rewards
    assert len(first) == 3
    assert first == again != other


def test_rewards_of_the_neighbour_are_found_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Paid for another group's target the reward still rises, but the policy ignores its prompt: status 3."""
    settings = small(tmp_path, steps=30, lr=6e-3, prompts=8, chunk_prompts=8)

    def of_the_neighbour(rows: TensorDict, task: Task) -> TensorDict:
        targets = task.targets_of(rows["prompts"]).roll(settings.group_size)
        scores = task.score(rows["responses"], targets)
        return TensorDict({"rewards": scores.rewards, "exact": scores.exact}, batch_size=rows.batch_size)

    assert job.exit_status(settings, of_the_neighbour) == job.NOT_LEARNED
    checks = [line.split()[0] for line in capsys.readouterr().out.splitlines() if "needed" in line]
    assert checks == ["passed", "FAILED"]


def test_a_lost_row_ends_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that somebody takes out of the queue is missed: status 4, and the steps before it stay on disk."""
    calls = 0

    def losing(rows: TensorDict, task: Task) -> TensorDict:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first chunk of step 2
            client = transfer_queue.get_client()
            stolen = client.get_meta(data_fields=["prompts"], batch_size=1, global_step=2, task_name="thief")
            client.clear_samples(stolen)
        return score_rows(rows, task)

    assert job.exit_status(small(tmp_path, timeout_s=3), losing) == job.ROWS_WRONG
    assert "rows lost, repeated or mismatched" in capsys.readouterr().err
    assert len(rewards_of(tmp_path)) == 2


def test_an_error_in_a_stage_is_raised_as_it_is(tmp_path: Path) -> None:
    """A crash of one stage ends the waits of all others at once."""

    def broken(rows: TensorDict, task: Task) -> TensorDict:
        raise ZeroDivisionError("reward model on fire")

    with pytest.raises(ZeroDivisionError, match="on fire"):
        job.exit_status(small(tmp_path), broken)


def test_interrupt_stops_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C gives status 130 and keeps the steps so far; the leak checks see that no thread is left."""
    calls = 0

    def interrupting(rows: TensorDict, task: Task) -> TensorDict:
        nonlocal calls
        calls += 1
        if calls == 5:
            import _thread

            _thread.interrupt_main()
        return score_rows(rows, task)

    assert job.exit_status(small(tmp_path), interrupting) == job.INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
    assert len(rewards_of(tmp_path)) >= 2


@pytest.fixture
def command(forked: Any, tmp_path: Path) -> Callable[..., tuple[int, str, str]]:
    """Runs the job and returns its status, its output and its errors; its files are in `tmp_path`."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with forked("", "--out", str(tmp_path), *arguments, module="recipe.grpo_tiny") as process:
            output, errors = process.communicate(timeout=250)
        return process.returncode, output, errors

    return run


@pytest.mark.parametrize("runtime", ["embedded", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.timeout(250)
def test_smoke_command(tmp_path: Path, runtime: str, command: Any) -> None:
    """A few steps with ragged prompts end with status 0, all files, and a bill in which every task took every row."""
    status, _, errors = command("--smoke", "--runtime", runtime, "--prompt-noise", "2")
    assert status == 0, errors
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert (tmp_path / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert len(rewards_of(tmp_path)) == 8
    bills = {bill["task"]: bill for bill in json.loads((tmp_path / "summary.json").read_text())["tasks"]}
    assert {bill["rows"] for bill in bills.values()} == {8 * 192}
    assert set(bills) == {"insert", *TASK_NAMES}
    assert all(bills[task]["bytes_got"] > 0 for task in TASK_NAMES)


@pytest.mark.slow
@pytest.mark.timeout(250)
@pytest.mark.parametrize("runtime", ["embedded", "ray"])
def test_the_job_learns(tmp_path: Path, runtime: str, command: Any) -> None:
    """The whole run passes both checks within its time."""
    status, output, errors = command("--runtime", runtime)
    assert status == 0, output + errors
    times = json.loads((tmp_path / "summary.json").read_text())["times_s"]
    assert times["training"] < 60
    assert times["whole"] < 120
