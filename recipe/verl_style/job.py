"""The job as a whole: queue and workers, the training in one of its two modes, and the verdict."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from recipe.grpo_tiny.actors import prepare_process
from recipe.grpo_tiny.checks import success_checks
from recipe.grpo_tiny.job import status_of
from recipe.grpo_tiny.runtimes import RUNTIMES
from recipe.verl_style import report
from recipe.verl_style.config import Settings
from recipe.verl_style.rollout import PARTITION
from recipe.verl_style.trainer import PPOTrainer


def exit_status(settings: Settings) -> int:
    """Run the job, say what ended it early, and return the status that the command line promises."""
    return status_of(lambda: run(settings), "interrupted")


def run(settings: Settings) -> bool:
    """Run the job; return whether the reward rose, and for the right reason.

    Raises ConservationError, or what a worker raised, with everything stopped.
    """
    whole = time.perf_counter()
    runtime = RUNTIMES[settings.runtime]()
    try:
        with tempfile.TemporaryDirectory(prefix="verl_style_") as folder:
            prepare_process()
            runtime.start(queue_configuration(settings))
            trainer = PPOTrainer(runtime, settings)
            trainer.start(Path(folder) / "actors")
            report.show_start(settings, time.perf_counter() - whole)
            started = time.perf_counter()
            generated = trainer.train_behind() if settings.mode == "async" else trainer.train_in_step()
            training_s = time.perf_counter() - started
            accounts = runtime.client.audit(PARTITION)["partitions"][PARTITION]
            report.show(settings, trainer.log, accounts, training_s)
            trainer.tally.check_accounts(accounts, generated)
            checks = () if settings.smoke else success_checks(trainer.log.rewards, trainer.evaluate())
    finally:
        runtime.close()
    for check in checks:
        print(check)
    print(f"training {training_s:.1f} s, whole job {time.perf_counter() - whole:.1f} s")
    return all(check.passed for check in checks)


def queue_configuration(settings: Settings) -> dict[str, dict[str, int]]:
    """With the size of a step and the staleness bound the queue can say how far rollout workers may run ahead."""
    return {
        "controller": {"global_batch_size": settings.prompts, "num_n_samples": settings.group_size},
        "limits": {"max_staleness": settings.max_staleness},
    }
