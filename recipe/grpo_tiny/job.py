"""The driver: inserts the prompts of a step, lets the stages run, checks, clears; then judges what was learned."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from recipe.grpo_tiny import stages
from recipe.grpo_tiny.actors import Pipeline, prepare_process
from recipe.grpo_tiny.checks import Check, ConservationError, check_accounts, check_cleared, check_step, success_checks
from recipe.grpo_tiny.config import Settings
from recipe.grpo_tiny.evaluation import Evaluation
from recipe.grpo_tiny.report import (
    Journal,
    StepMetrics,
    Times,
    draw_rewards,
    merged,
    traffic_table,
    write_summary,
)
from recipe.grpo_tiny.runtimes import RUNTIMES, Runtime
from recipe.grpo_tiny.stages import RewardFunction, TaskPort, Traffic, prompt_rows
from recipe.grpo_tiny.task import TASKS, Prompts, draw_prompts
from recipe.grpo_tiny.trainer import TrainReport
from transfer_queue.errors import GetMetaTimeout, KeyNotFound, StaleSampleError

PASSED, NOT_LEARNED, ROWS_WRONG, INTERRUPTED = 0, 3, 4, 130


def exit_status(settings: Settings, reward: RewardFunction = stages.score_rows) -> int:
    """Run the job, say what ended it early, and return the status that the command line promises."""
    return status_of(lambda: run(settings, reward), f"interrupted; the metrics so far are in {settings.out}")


def status_of(run: Callable[[], bool], if_interrupted: str) -> int:
    """Run a job, which returns whether it passed its checks; a crash is raised as it is."""
    try:
        return PASSED if run() else NOT_LEARNED
    except KeyboardInterrupt:
        print(if_interrupted, file=sys.stderr)
        return INTERRUPTED
    except (ConservationError, GetMetaTimeout, KeyNotFound, StaleSampleError) as error:
        print(f"rows lost, repeated or mismatched: {error}", file=sys.stderr)
        return ROWS_WRONG


def run(settings: Settings, reward: RewardFunction = stages.score_rows) -> bool:
    """Run the job and leave its files in `settings.out`; return whether the success checks passed.

    Raises ConservationError, or what a stage raised, with everything stopped and the metrics so far on disk.
    """
    console = Console(highlight=False, soft_wrap=True)
    whole = time.perf_counter()
    runtime = RUNTIMES[settings.runtime]()
    try:
        with tempfile.TemporaryDirectory(prefix="grpo_tiny_") as folder:
            prepare_process()
            _start_queue(settings, runtime)
            pipeline = Pipeline(runtime, settings, reward)
            pipeline.start(Path(folder) / "trainers")
            start_up = time.perf_counter() - whole
            console.print(f"{settings.runtime}: all workers ready after {start_up:.1f} s")
            port = TaskPort(runtime.client, "insert", timeout_s=settings.timeout_s)
            steps, training = _train(settings, runtime, pipeline, port, console)
            started = time.perf_counter()
            evaluation, traffic = pipeline.finish(settings.out.absolute() / "model")
            judging = time.perf_counter() - started
    finally:
        runtime.close()
    times = Times(start_up, training, judging, time.perf_counter() - whole)
    return _report(settings, console, steps, times, merged([port.traffic, *traffic]), evaluation)


def _start_queue(settings: Settings, runtime: Runtime) -> None:
    """With room for one step at a time; the tasks that need whole groups get a sampler that gives them those."""
    window = {
        "global_batch_size": settings.prompts,
        "num_global_batch": 1,
        "num_n_samples": settings.group_size,
    }
    runtime.start({"controller": window})
    for task in stages.GROUPED_TASKS:
        runtime.client.register_sampler(task, "GRPOSampler", num_n_samples=settings.group_size)


def _train(
    settings: Settings, runtime: Runtime, pipeline: Pipeline, port: TaskPort, console: Console
) -> tuple[list[StepMetrics], float]:
    """Run all steps; return their metrics and the seconds they took."""
    task = TASKS[settings.task]
    started = time.perf_counter()
    with Journal(settings.out / "metrics.jsonl", console, settings.steps) as journal:
        for step in range(settings.steps):
            step_started = time.perf_counter()
            prompts = draw_prompts(
                task, seed=settings.seed, step=step, count=settings.prompts, noise=settings.prompt_noise
            )
            port.insert(step, *prompt_rows(prompts, settings.group_size), settings.group_size)
            reports = pipeline.run_step(step)
            _check_and_clear(settings, runtime, step, prompts, reports)
            journal.add(_metrics(step, settings.rows_per_step, reports, time.perf_counter() - step_started))
    return journal.steps, time.perf_counter() - started


def _check_and_clear(
    settings: Settings, runtime: Runtime, step: int, prompts: Prompts, reports: Sequence[TrainReport]
) -> None:
    """Nothing of the step may be missing before it is removed, and nothing of it may be left afterwards."""
    check_step(step, prompts, settings.group_size, reports)
    name = f"step_{step}"
    check_accounts(step, settings.rows_per_step, runtime.client.audit()["partitions"].get(name))
    runtime.client.clear(global_step=step)
    check_cleared(step, runtime.client.audit()["partitions"].get(name))


def _metrics(step: int, rows: int, reports: Sequence[TrainReport], step_s: float) -> StepMetrics:
    update = reports[0].update
    return StepMetrics(
        step=step,
        reward=sum(report.reward_sum for report in reports) / rows,
        exact=sum(report.num_exact for report in reports) / rows,
        kl=update.kl,
        loss=update.loss,
        gradient_norm=update.gradient_norm,
        max_gap=max(report.update.max_gap for report in reports),
        rows=rows,
        step_s=step_s,
    )


def _report(
    settings: Settings,
    console: Console,
    steps: Sequence[StepMetrics],
    times: Times,
    traffic: Sequence[Traffic],
    evaluation: Evaluation,
) -> bool:
    """Write and print the results; return whether the run counts as a success."""
    checks: tuple[Check, ...] = ()
    if not settings.smoke:
        checks = success_checks([metrics.reward for metrics in steps], evaluation)
    draw_rewards(settings.out / "reward.png", steps, f"GRPO on {settings.task}, {settings.runtime} runtime")
    write_summary(settings.out / "summary.json", settings, steps, times, traffic, evaluation, checks)
    console.print(traffic_table(traffic))
    for check in checks:
        console.print(str(check), markup=False)
    console.print(
        f"start-up {times.start_up:.1f} s, training loop {times.training:.1f} s, evaluation {times.evaluation:.1f} s, "
        f"whole job {times.whole:.1f} s; results in {settings.out}"
    )
    return all(check.passed for check in checks)
