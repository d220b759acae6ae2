"""A short run of everything: real processes, killed and meddled with, and a judgement at the end."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.faults import BY_NAME, FAULTS
from tests.chaos.judge import Record, judge
from tests.chaos.matrix import ROWS, matrix
from tests.chaos.run import run_round, summary
from tests.chaos.sidelog import SideLog, read_all
from tests.chaos.steps import some_steps
from tests.chaos.zygote import Zygote

TESTS = Path(__file__).parents[1]

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
    ],
)
def test_nothing_is_lost(seed: int, names: list[str], zygote: Zygote, tmp_path: Path) -> None:
    """Whatever is injected: each sample is consumed, duplicates are counted, contents are right, nothing is left."""
    done = run_round(seed, [BY_NAME[name] for name in names], 4.0, zygote, tmp_path)
    assert not done.violations, "\n".join(done.violations)
    assert done.counts["samples"] > 100
    assert matrix([summary(seed, 4.0, [done]) | {"steps": {"kills": [], "violations": []}}]).startswith("| fault")


def test_killed_at_a_step_an_operation_is_done_once_or_not_at_all(zygote: Zygote) -> None:
    """Clients, controller and unit die at random journal and message steps of each operation."""
    report = some_steps(zygote, 5, 5.0)
    assert not report.violations, "\n".join(report.violations)
    assert report.kills.total() > 0


def test_the_matrix_names_tests_that_exist() -> None:
    """And no row of it is without a fault of a run or a test."""
    text = "\n".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)", text))
    injected = {row for fault in FAULTS for row in fault.rows.split()}
    for name, row in ROWS.items():
        assert row.tests or name in injected, name
        for test in row.tests:
            assert test in known or (TESTS.parent / test).is_dir(), test


def test_the_judge_sees_what_is_lost_or_doubled(tmp_path: Path) -> None:
    """A put that vanished, a sample acknowledged under two leases, a call that never ended, bytes that differ."""
    log = SideLog(tmp_path / "looker-0-0.log")
    log.note("start", lease_s=4.0)
    log.end(log.begin("put", 1.0, sequences=[1, 2]), "ok")
    for token in (7, 8):
        log.end(log.begin("draw", 1.0, task="look", partition="a"), "ok", keys=["1"], token=token)
        log.end(log.begin("ack", 1.0, task="look", token=token, sequences=[1]), "ok", count=1)
    log.begin("read", 1.0, token=8)
    log.note("damaged", wrong=["seq of sample 1"])
    log.close()
    record = Record(read_all(tmp_path), killed=set(), stopped={}, audit={"partitions": {}}, live=set())
    found = "\n".join(judge(record).violations)
    for expected in (
        "a call never ended",
        "other bytes than were put",
        "sample 2 was put and never seen again",
        "consumed sample 1 under leases",
        "2 samples were delivered under leases, and only 0 granted",
        "nobody acknowledged sample 1 for task train",
    ):
        assert expected in found
