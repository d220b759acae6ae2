"""The judge finds each thing that must not be, in the log of a run that was right but for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.doctored import EXPLAINED, WRONG, Doctor
from tests.chaos.judge import judge, main
from tests.chaos.record import Record
from tests.chaos.right_log import LOST, right


def test_a_run_that_was_right_is_found_right() -> None:
    verdict = judge(right())
    assert verdict.violations == []
    assert verdict.counts["samples"] == 4


@pytest.mark.parametrize(("doctor", "expected"), WRONG)
def test_the_judge_sees(doctor: Doctor, expected: str) -> None:
    """Each of these, whatever else it finds."""
    record = right()
    doctor(record)
    found = judge(record).violations
    assert any(expected in violation for violation in found), found


@pytest.mark.parametrize("doctor", EXPLAINED)
def test_what_a_fault_explains_is_no_violation(doctor: Doctor) -> None:
    record = right()
    doctor(record)
    assert judge(record).violations == []


def test_what_was_kept_is_judged_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = right()
    record.disturbances, record.killed, record.live = [LOST], {"looker-0-0"}, {7}
    record.keep(tmp_path)
    assert vars(Record.kept(tmp_path)) == vars(record) | {"lives": {}}
    assert main([str(tmp_path)]) == 1
    assert "sample 7 is there, which nobody put" in capsys.readouterr().out
