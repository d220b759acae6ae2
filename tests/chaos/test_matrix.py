"""The table of the fault matrix: complete, and true to the runs that it is made of."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.faults import FAULTS
from tests.chaos.matrix import _ROWS_OF_CLIENT, _ROWS_OF_SERVER, BEGIN, END, main, matrix
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


def test_the_tests_that_rows_name_exist() -> None:
    found = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {test for row in ROWS.values() for test in row.tests} <= found


def test_each_operation_is_killed_at_every_step_of_each_process() -> None:
    assert list(OPERATIONS) == ["put", "draw", "ack", "clear", "save a checkpoint", "load a checkpoint"]
    assert VICTIMS == ("client", "controller", "unit-0")


def test_a_row_says_how_often_with_what_outcome_and_in_which_run() -> None:
    rows = rows_of(matrix([RUN]))
    assert list(rows) == list(ROWS)
    assert rows["F11"][2:] == ["9", ROWS["F11"].outcome, "7 × 30"]
    assert rows["F07"][1].startswith("unit raises: raises")
    assert rows["F07"][2:] == [
        "5, 4 of them reached",
        f"2 times in a run with a violation; else {ROWS['F07'].outcome}",
        "7 × 30",
    ]
    assert rows["F02"][1].startswith("kill client in ack: SIGKILL at each")
    assert rows["F02"][2:] == ["3", ROWS["F02"].outcome, "every step"]
    assert rows["F24"][2:] == ["the suite", ROWS["F24"].outcome, "–"]
    assert rows["F01"][3] == "not run"
    assert "| ack | 3 kills: 3 done once | has no step in it | has no step in it | 0 |" in matrix([RUN])


def test_runs_are_added_up() -> None:
    other: dict[str, Any] = RUN | {"seed": 8, "minutes": 2.5}
    assert rows_of(matrix([RUN, other]))["F11"][2:] == ["18", ROWS["F11"].outcome, "7 × 30, 8 × 2.5"]


def test_the_readme_shows_the_runs(tmp_path: Path) -> None:
    """If this fails, run `python -m tests.chaos.matrix --readme`."""
    copy = tmp_path / "README.md"
    copy.write_text((ROOT / "README.md").read_text())
    main(["--readme"], readme=copy)
    assert copy.read_text() == (ROOT / "README.md").read_text()


def test_the_matrix_stands_between_its_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the files that are named, or of all that are kept; what is around it stays."""
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{BEGIN}\n\nold\n\n{END}\n\nafter\n")
    for seed in (7, 8):
        (tmp_path / f"{seed}.json").write_text(json.dumps(RUN | {"seed": seed}))
    assert main([str(tmp_path / "7.json")]) == 0
    assert rows_of(capsys.readouterr().out)["F11"][2:] == ["9", ROWS["F11"].outcome, "7 × 30"]
    assert main(["--readme"], readme=readme, results=tmp_path) == 0
    text = readme.read_text()
    assert rows_of(text)["F11"][4] == "7 × 30, 8 × 30"
    assert (text[:8], text[-7:]) == ("before\n\n", "\nafter\n")
    assert "\nold\n" not in text
