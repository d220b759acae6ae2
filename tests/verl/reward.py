"""The rule that verl's reward workers load from this file by its path."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any, **_: Any) -> dict[str, Any]:
    """Score the number of words, so that a prompt's trajectories are told from those of others."""
    assert data_source == "additions"
    return {"score": float(len(solution_str.split())), "expected": ground_truth}
