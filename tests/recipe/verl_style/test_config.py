"""Settings that cannot be run are refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from recipe.verl_style.config import SMOKE_STEPS, Settings, parse


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"steps": 19}, "first and last 10 steps"),
        ({"steps": 0, "smoke": True}, "--steps 0"),
        ({"group_size": 1}, "--group-size 1"),
        ({"mini_batches": 0}, "--mini-batches"),
        ({"prompts": 15}, "divisible by the 2 actors"),
        ({"prompts": 16, "rollout_workers": 3}, "divisible by the 3 rollout workers"),
        ({"max_staleness": -1}, "--max-staleness -1"),
        ({"lr": float("nan")}, "--lr nan"),
        ({"timeout_s": 0.0}, "--timeout"),
        ({"mode": "async", "max_staleness": 0, "rollout_workers": 2}, "leaves no room for 2 rollout workers"),
    ],
)
def test_what_cannot_be_run(changes: dict[str, Any], text: str) -> None:
    problem = Settings(**changes).problem()
    assert problem is not None
    assert text in problem


@pytest.mark.parametrize("mode", ["sync", "async"])
@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_what_can_be_run(mode: str, max_staleness: int) -> None:
    assert Settings(mode=mode, max_staleness=max_staleness).problem() is None


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]) == Settings()
    assert parse(["--smoke", "--mode", "async", "--timeout", "5"]) == Settings(
        mode="async", steps=SMOKE_STEPS, timeout_s=5.0, smoke=True
    )
    with pytest.raises(SystemExit, match="2"):
        parse(["--prompts", "3"])
    assert "--prompts 3 must be divisible" in capsys.readouterr().err
