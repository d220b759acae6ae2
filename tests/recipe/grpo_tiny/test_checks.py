"""Conservation of rows, and what counts as learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recipe.grpo_tiny.checks import ConservationError, check_accounts, check_cleared, check_step, success_checks
from recipe.grpo_tiny.evaluation import Evaluation
from recipe.grpo_tiny.stages import TASK_NAMES
from recipe.grpo_tiny.task import Prompts
from recipe.grpo_tiny.trainer import TrainReport, Update
from tests.recipe.grpo_tiny.loop import Loop

PROMPTS = Prompts(group_ids=(4, 5), targets=(11, 12), tokens=([0], [0]))
UPDATE = Update(max_gap=1e-6, finite=True, num_tokens=9, loss=0.1, kl=0.0, gradient_norm=1.0, weights_sum=3.0)


def report(group: int, sessions: tuple[int, ...] = (0, 1, 2), **changes: Any) -> TrainReport:
    made = TrainReport(
        groups=np.full(len(sessions), group),
        sessions=np.array(sessions),
        targets=np.full(len(sessions), group + 7),
        versions=np.full((len(sessions), 2), 2),
        reward_sum=1.0,
        num_exact=0,
        update=UPDATE,
    )
    return replace(made, **changes)


def test_a_whole_step_passes() -> None:
    """Every row once, on either rank."""
    check_step(2, PROMPTS, 3, [report(5), report(4)])


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([report(4), report(5, (0, 1))], "1 rows never trained: 5/2"),
        ([report(4), report(5, (0, 1, 2, 2))], "1 rows trained more than once: 5/2"),
        ([report(4), report(5), report(6)], r"3 rows trained but not inserted in this step: 6/0, 6/1, 6/2"),
        ([report(4), report(5, (0, 1)), report(5, (2,))], "a group was split over two ranks"),
        ([report(4), report(5, targets=np.array([12, 12, 13]))], "inserted for target 12 and trained with target 13"),
        ([report(4), report(5, versions=np.array([[2, 2], [1, 2], [2, 2]]))], r"versions \[1, 2\], expected 2 only"),
        ([report(4), report(5, update=replace(UPDATE, finite=False))], "advantage is not finite"),
        ([report(4), report(5, update=replace(UPDATE, max_gap=2e-3))], "differ by 2.00e-03"),
        ([report(4), report(5, update=replace(UPDATE, max_gap=float("nan")))], "differ by nan"),
        ([report(4), report(5, update=replace(UPDATE, weights_sum=4.0))], "different weights"),
    ],
)
def test_each_broken_promise_is_named(reports: list[TrainReport], message: str) -> None:
    """Lost, repeated, foreign, split and mismatched rows are each told apart."""
    with pytest.raises(ConservationError, match=f"step 2: .*{message}"):
        check_step(2, PROMPTS, 3, reports)


def test_accounts_of_the_queue() -> None:
    """Every task has consumed every row before the clear, and nothing is left after it."""
    tasks = {task: {"consumed": 6} for task in TASK_NAMES}
    check_accounts(2, 6, {"inserted": 6, "live": 6, "tasks": tasks})
    check_cleared(2, {"live": 0})
    check_cleared(2, None)
    with pytest.raises(ConservationError, match="the queue knows nothing"):
        check_accounts(2, 6, None)
    with pytest.raises(ConservationError, match="'reference': 5"):
        check_accounts(2, 6, {"inserted": 6, "live": 6, "tasks": tasks | {"reference": {"consumed": 5}}})
    with pytest.raises(ConservationError, match="2 rows are left"):
        check_cleared(2, {"live": 2})


@pytest.mark.parametrize(
    ("last", "evaluation", "passed"),
    [
        (0.9, Evaluation(0.9, 0.5, 0.5), (True, True)),
        (0.2, Evaluation(0.9, 0.5, 0.5), (False, True)),
        (0.9, Evaluation(0.7, 0.65, 0.1), (True, False)),
    ],
)
def test_success_needs_a_rise_and_a_conditional_gain(
    last: float, evaluation: Evaluation, passed: tuple[bool, bool]
) -> None:
    """Both checks are needed, each on its own figure."""
    checks = success_checks([0.1] * 10 + [0.5] * 30 + [last] * 10, evaluation)
    assert tuple(check.passed for check in checks) == passed
    assert checks[0].value == pytest.approx(last - 0.1)
    assert "FAILED" in "".join(map(str, checks)) or all(passed)


def test_the_policy_learns() -> None:
    """70 steps at a high learning rate, without a queue, pass both checks."""
    loop = Loop()
    evaluation = loop.run(70)
    checks = success_checks(loop.rewards, evaluation)
    assert [check.passed for check in checks] == [True, True], checks
