"""A short run of everything: real processes, killed and meddled with, and a judgement at the end."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.chaos.faults import BY_NAME, Fault, Scene
from tests.chaos.matrix import matrix
from tests.chaos.operations import Violated
from tests.chaos.run import run, run_round, summary
from tests.chaos.steps import some_steps
from tests.chaos.zygote import Zygote

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """What forks the processes of the workload."""
    with Zygote() as started:
        yield started


@pytest.mark.parametrize(
    ("seed", "names"),
    [
        (11, ["kill controller", "kill unit", "kill consumer (adds a field)", "kill trainer rank", "kill producer"]),
        (12, ["drop message", "duplicate message", "truncate message", "cut message", "kill controller at a step"]),
        (13, ["delay bytes", "duplicate bytes", "truncate bytes", "cut bytes", "split bytes"]),
        (16, ["fork", "wall clock", "unit raises"]),
    ],
)
def test_nothing_is_lost(seed: int, names: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """Whatever is injected: each sample is consumed, duplicates are counted, contents are right, nothing is left."""
    done = run_round(seed, [BY_NAME[name] for name in names], 2.0, zygote, tmp_path, samples=60)
    assert not done.violations, "\n".join(done.violations)
    assert done.counts["samples"] > 100
    assert matrix([summary(seed, done.seconds, [done]) | {"steps": {"kills": [], "violations": []}}]).startswith(
        "| fault"
    )


def test_killed_at_a_step_an_operation_is_done_once_or_not_at_all(zygote: Zygote) -> None:
    """Clients, controller and unit die at random journal and message steps of each operation."""
    report = some_steps(zygote, 5, 5.0)
    assert not report.violations, "\n".join(report.violations)
    assert report.kills.total() > 0


def test_a_violation_leaves_its_evidence_and_ends_nothing(zygote: Zygote, tmp_path: Path) -> None:
    """Of a fault that did not end well, and of a round that broke off: a folder, and the summary so far."""
    errors = iter([Violated("as the test asked"), AssertionError("so did this")])

    def inject(scene: Scene) -> str:
        raise next(errors, TimeoutError("and this"))

    fault, told, saved = Fault("breaks", "F00", "raises", inject), list[str](), list[dict[str, Any]]()
    with mock.patch.multiple("tests.chaos.run", FAULTS=(fault,), Zygote=lambda: contextlib.nullcontext(zygote)):
        found = run(0.05, 13, [fault], tmp_path, told.append, saved.append)
    text = "\n".join(found["violations"])
    assert "'breaks' did not end well: Violated: as the test asked" in text
    assert "the round broke off" in text
    assert saved[-1] == found
    folder = tmp_path / "seed-13000"
    assert found["evidence"][0] == str(folder)
    assert str(folder) in told[0]
    kept = json.loads((folder / "round.json").read_text())
    assert kept["seed"] == 13000
    assert kept["disturbances"][0]["fault"] == "breaks"
    assert (folder / "servers.txt").exists()
    assert list(folder.glob("scorer-*.log"))
