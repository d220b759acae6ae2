"""What counts as lost, repeated or too old."""

from __future__ import annotations

from typing import Any

import pytest

from recipe.grpo_tiny.checks import ConservationError
from recipe.verl_style.checks import Tally, staleness_of
from transfer_queue import KVBatchMeta

FINE: dict[str, list[float]] = {"rows": [2, 2], "weights_sum": [0.5, 0.5], "gap": [1e-6, 2e-6]}


def batch(*groups: int, version: int = 3, rows: int = 2) -> KVBatchMeta:
    keys = [f"{group}_{session}" for group in groups for session in range(rows)]
    return KVBatchMeta(keys, [{"version": version} for _ in keys], "train")


def tally(max_staleness: int = 1) -> Tally:
    return Tally(group_size=2, max_staleness=max_staleness)


def test_a_step_as_it_should_be() -> None:
    """Old answers within the bound may differ from what the policy would say."""
    trained = tally()
    trained.check_step(3, batch(0, 1), FINE)
    trained.check_step(4, batch(2, 3), FINE | {"gap": [0.5, 0.1]})
    trained.check_accounts({"inserted": 12, "live": 2, "dropped": {"cleared": 8, "stale": 2}}, generated=12)
    assert staleness_of(4, batch(2)) == {1: 2}


@pytest.mark.parametrize(
    ("step", "wrong", "metrics", "text"),
    [
        (3, batch(0, 9), {}, r"2 samples were trained before: \['0_0', '0_1'\]"),
        (3, batch(5, 6, 7, 8, rows=1), {}, r"groups \['5', '6', '7', '8'\] are not whole"),
        (5, batch(5, 6), {}, r"lag behind by {2: 4}, allowed 1"),
        (2, batch(5, 6), {}, r"lag behind by {-1: 4}"),
        (3, batch(5, 6), {"rows": [2, 1]}, r"of 4 samples the ranks trained on \[2, 1\]"),
        (3, batch(5, 6), {"weights_sum": [0.5, 0.6]}, "different weights"),
        (3, batch(5, 6), {"gap": [1e-6, 0.1]}, r"rollout and actor differ by 1\.00e-01"),
        (3, batch(5, 6), {"gap": [float("nan"), 0.0]}, "differ by nan"),
    ],
)
def test_steps_that_are_wrong(step: int, wrong: KVBatchMeta, metrics: dict[str, Any], text: str) -> None:
    trained = tally()
    trained.check_step(3, batch(0, 1), FINE)
    with pytest.raises(ConservationError, match=text):
        trained.check_step(step, wrong, FINE | metrics)


@pytest.mark.parametrize(
    ("accounts", "text"),
    [
        ({"inserted": 5, "live": 1, "dropped": {"cleared": 4}}, "4 samples were generated, the queue knows 5"),
        ({"inserted": 4, "live": 2, "dropped": {"cleared": 2}}, "4 samples were trained on, 2 cleared"),
        ({"inserted": 4, "live": 1, "dropped": {"cleared": 4}}, "lost"),
        ({"inserted": 4, "live": -1, "dropped": {"cleared": 4, "quarantined": 1}}, "lost"),
    ],
)
def test_accounts_that_are_wrong(accounts: dict[str, Any], text: str) -> None:
    trained = tally()
    trained.check_step(3, batch(0, 1), FINE)
    with pytest.raises(ConservationError, match=text):
        trained.check_accounts(accounts, generated=4)
