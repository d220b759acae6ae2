"""What safety costs is measured by parts, with and without in turn; how much it is is not looked at here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import charts, numbers, safety_tables
from benchmarks.__main__ import main
from benchmarks.figures import FASTER, Report
from benchmarks.safety import sides
from benchmarks.safety.connections import prove
from benchmarks.safety.sides import WITHOUT, Compared, turns
from benchmarks.workloads import PARTS, SAFETY
from tests.dropin.processes import CONTEXT

BARE = "start of a bare process"
QUICK = ("unit-idle", "leases", "checkpoint")
MEASURED = {
    "journal": {("calls: get_meta(64)", "journal on a disk"), ("calls: ack of 64", WITHOUT)},
    "leases": {("64 12 KiB samples drawn and read", "leased and acknowledged")},
    "checksums": {("data: dense, draw + get", "checksums written and verified")},
    "unit-idle": {("unit-0, idle, 128 samples", "kill to the first call served"), ("unit-0, idle, 0 samples", BARE)},
    "controller-loaded": {
        ("controller, under load, 0 samples", "beyond a bare start"),
        ("controller, under load, 0 samples", BARE),
    },
    "checkpoint": {("128 small samples", "load"), ("128 small samples, get_meta(64)", "while a checkpoint is saved")},
}


@pytest.fixture
def _quick_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages begin in a process that has imported the libraries already; what they do is the same."""
    monkeypatch.setattr(sides, "multiprocessing", SimpleNamespace(get_context=lambda method: CONTEXT))


@pytest.mark.usefixtures("_quick_stages")
@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=[] if part in QUICK else [pytest.mark.slow]) for part in MEASURED]
)
def test_part(part: str, tmp_path: Path) -> None:
    """A part has its series, and nothing but its own."""
    file = tmp_path / "out.json"
    assert main([SAFETY, "--parts", part, "--scale", "tiny", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert record["complete"]
    assert {one["benchmark"] for one in record["measurements"]} == {f"{SAFETY}/{part}"}
    assert {(one["case"], one["measure"]) for one in record["measurements"]} >= MEASURED[part]
    raised = [one["value"] for one in record["quantities"] if one["measure"] == "calls beside it that raised"]
    assert not any(raised)


def test_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([SAFETY, "--parts", "journal,x"])
    assert ended.value.code == 2
    assert "no part 'x'; known: journal, " in capsys.readouterr().err


def test_sides_take_turns() -> None:
    """Every side comes once a round; who begins changes, and warm-up does not count."""
    assert list(turns(["a", "b"], rounds=2, warm_up=1)) == [
        ("b", False),
        ("a", False),
        ("a", True),
        ("b", True),
        ("b", True),
        ("a", True),
    ]


def test_ratios_are_those_of_medians_of_rounds() -> None:
    """One slow call of a round does not count; each call is in the series all the same."""
    report = Report(SAFETY, {})
    compared = Compared(report, "call", [WITHOUT, "with"], aims={"with": {"at_most": 1.15}})
    compared.add("with", False, [100.0])
    for _ in range(3):
        compared.add(WITHOUT, True, [1.0, 1.0, 50.0])
        compared.add("with", True, [1.1, 1.1, 0.1])
    [one] = report.record()["comparisons"]
    assert (one["measure"], one["median"], one["met"]) == ("with", pytest.approx(1.1), True)
    assert [entry["n"] for entry in report.record()["measurements"]] == [9, 9]


def test_both_ends_prove_the_token() -> None:
    assert len(prove(3)) == 3


# ---------------------------------------------------------------- records of several runs


def record(part: str, p50_s: float = 1.0) -> Report:
    report = Report(SAFETY, {"scale": "tiny"})
    report.benchmark = f"{SAFETY}/{part}"
    report.series("new", "connect, proof and first request").add(p50_s)
    report.complete = True
    return report


def test_parts_join_in_one_file(tmp_path: Path) -> None:
    """A run of some parts keeps the figures of the others, and replaces its own."""
    file = tmp_path / "safety.json"
    for one in (record("connections", 1.0), record("leases", 2.0), record("connections", 3.0)):
        one.join(file)
        one.write(file)
    found = json.loads(file.read_text())
    assert {one["benchmark"]: one["p50_ms"] for one in found["measurements"]} == {
        f"{SAFETY}/connections": 3000.0,
        f"{SAFETY}/leases": 2000.0,
    }
    assert found["commits"].keys() == {f"{SAFETY}/connections", f"{SAFETY}/leases"}


@pytest.mark.parametrize("change", [{"complete": False}, {"versions": {}}, {"settings": {"scale": "full"}}])
def test_other_runs_are_not_joined(change: dict[str, Any], tmp_path: Path) -> None:
    """What ended early, or was measured with other versions or at another scale, does not stand beside new figures."""
    file = tmp_path / "safety.json"
    file.write_text(json.dumps({**record("leases").record(), **change}))
    one = record("connections")
    one.join(file)
    assert {entry["benchmark"] for entry in one.record()["measurements"]} == {f"{SAFETY}/connections"}


# ---------------------------------------------------------------- as it is shown


def shown() -> Report:
    report = Report(SAFETY, {"runtime": "processes", "scale": "tiny"})
    report.benchmark = f"{SAFETY}/leases"
    leased = "leased and acknowledged"
    compared = Compared(report, "64 samples drawn", [WITHOUT, leased], unit=FASTER, aims={leased: {"at_least": 0.9}})
    compared.add(WITHOUT, True, [1.0])
    compared.add(leased, True, [2.0])
    report.benchmark = f"{SAFETY}/unit-idle"
    report.series("unit-0, idle, 0 samples", "kill to the first call served").add(0.5, 0.7)
    report.series("unit-0, idle, 0 samples", BARE).add(0.52, 0.52)
    report.series("unit-0, idle, 0 samples", "beyond a bare start").add(-0.02, 0.18)
    report.benchmark = f"{SAFETY}/connections"
    report.series("proof of the token", "both ends computing, no socket").add(1e-5)
    report.series("new client, TCP", "connect, proof and first request").add(1e-3)
    report.series("new client, TCP", "second request").add(2e-4)
    report.benchmark = f"{SAFETY}/checkpoint"
    for name in ("save", "write of a plain file, synced", "load", "read of a plain file"):
        report.series("302 MB", name).add(1.0)
    report.quantity("302 MB, get_meta(64)", "longest call, while a checkpoint is saved", 12.0, "ms")
    return report


def test_readme_shows_what_was_measured() -> None:
    """Ratios with their aims, connections, recovery and checkpoints; nothing where nothing was measured."""
    text = numbers.section(numbers.Results([shown().record()]), str)
    ratio = "0.500 × as fast as without | 0.500 – 0.500 | ≥ 0.9"
    assert f"| lease and `ack`, waited for: 64 samples drawn | {ratio} |" in text
    assert "| new client, TCP | 1.00 ms | 0.200 ms |" in text
    assert "| unit-0, idle, 0 samples, 2 kills | 600 ms / 700 ms | 520 ms / 520 ms | 80.0 ms / 180 ms |" in text
    assert "| 302 MB | 1,000 ms | 1,000 ms | 1,000 ms | 1,000 ms | 12.0 ms |" in text
    assert "`python -m benchmarks safety`: commit" in text
    nothing = numbers.Results([])
    tables = (safety_tables.ratios, safety_tables.recovery, safety_tables.checkpoints)
    assert [table(nothing, str) for table in tables] == ["", "", ""]


def test_picture(tmp_path: Path) -> None:
    """Ratios and times make one PNG."""
    file = tmp_path / "out.png"
    charts.draw(shown().record(), file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_every_part_is_named() -> None:
    from benchmarks import safety

    assert safety.MEASURES.keys() == PARTS.keys()
