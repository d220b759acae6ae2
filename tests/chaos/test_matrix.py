"""The table of the fault matrix: complete, and true to the runs that it is made of."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.matrix import _ROWS_OF_CLIENT, _ROWS_OF_SERVER, matrix
from tests.chaos.operations import OPERATIONS
from tests.chaos.rows import ROWS
from tests.chaos.steps import VICTIMS

ROOT = Path(__file__).parents[2]
BY_RUNS = {row for fault in FAULTS for row in fault.rows.split()} | {
    row for rows in (*_ROWS_OF_CLIENT.values(), *_ROWS_OF_SERVER.values()) for row in rows
}
RUN = {
    "seed": 7,
    "minutes": 30.0,
    "rounds": 40,
    "faults": {
        "kill unit": {"rows": "F11", "how": "SIGKILL", "times": 9, "recovered": 9, "in failed rounds": 0},
        "unit raises": {"rows": "F07", "how": "raises", "times": 5, "recovered": 4, "in failed rounds": 2},
    },
    "steps": {
        "kills": [{"operation": "ack", "victim": "client", "outcome": "done once", "kills": 3}],
        "violations": [],
    },
    "recovery": {server: {"kills": 0} for server in ("controller", "unit")},
    "counts": {},
    "violations": [],
}


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each row, by the name of the fault."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| F"]
    return {row[0].split()[0]: row for row in cells}


def test_every_row_of_the_matrix_is_there_and_injected() -> None:
    """By a fault of the random run, at every step, or by tests."""
    assert list(ROWS) == [f"F{number:02}" for number in range(1, 39)]
    for name, row in ROWS.items():
        assert row.tests or name in BY_RUNS, name


@pytest.mark.parametrize("test", sorted({test for row in ROWS.values() for test in row.tests}))
def test_the_tests_that_rows_name_exist(test: str) -> None:
    """In that file, in that class."""
    path, *names = test.split("::")
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text()).body
    for name in names:
        found = [each for each in body if getattr(each, "name", None) == name]
        assert found, f"{path} has no {name}"
        body = found[0].body  # type: ignore[attr-defined]


def test_each_operation_is_killed_at_every_step_of_each_process() -> None:
    assert list(OPERATIONS) == ["put", "draw", "ack", "clear", "save a checkpoint", "load a checkpoint"]
    assert VICTIMS == ("client", "controller", "unit-0")


def test_a_row_says_how_often_with_what_outcome_and_in_which_run() -> None:
    rows = rows_of(matrix([RUN]))
    assert list(rows) == list(ROWS)
    assert rows["F11"][2:] == ["9", "holds", "7 × 30"]
    assert rows["F07"][1].startswith("unit raises: raises")
    assert rows["F07"][2:] == ["5, 4 of them reached", "2 times in a run with a violation", "7 × 30"]
    assert rows["F02"][1].startswith("kill client in ack: SIGKILL at each")
    assert rows["F02"][2:] == ["3", "holds", "every step"]
    assert rows["F24"][2:] == ["the suite", "as the tests assert", "–"]
    assert rows["F01"][3] == "not run"
    assert "| ack | 3 kills: 3 done once | has no step in it | has no step in it | 0 |" in matrix([RUN])


def test_runs_are_added_up() -> None:
    other: dict[str, Any] = RUN | {"seed": 8, "minutes": 2.5}
    assert rows_of(matrix([RUN, other]))["F11"][2:] == ["18", "holds", "7 × 30, 8 × 2.5"]
