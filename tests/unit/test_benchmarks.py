"""The benchmarks run, print their table and write what they measured; how fast things are is not looked at here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from benchmarks import charts
from benchmarks.__main__ import INTERRUPTED, main
from benchmarks.figures import LONGER, RATE, Report

FLOORS = ("memcpy", "gather of random", "/dev/shm, fresh", "/dev/shm, warm", "round trip, ipc", "frame of 1 MiB, tcp")
MEASURED = {
    "kv": {
        ("dense", "put"),
        ("dense, copied", "get to a view"),
        ("ragged, copy=False", "touch every byte"),
        ("small, copied, rows at random", "put + draw + get + touch"),
        ("wide, 128 fields, copied", "put + draw + get + touch"),
        ("drawn, 4 rows at a time from 8 puts", "get to a view"),
    },
    "control": {
        ("get_meta(64)", "512 samples"),
        ("put of one 12 KiB sample", "beside 512 samples"),
        ("parked get_meta(1)", "since the put began"),
    },
}


def check(expected: set[tuple[str, str]], table: str, record: dict[str, Any]) -> None:
    measurements = record["measurements"]
    names = {(one["case"], one["measure"]) for one in measurements}
    assert names >= expected
    assert all(floor in table for floor in FLOORS)
    assert all(measure in table for _, measure in names)
    assert all(one["n"] > 0 and 0 <= one["p50_ms"] <= one["p99_ms"] for one in measurements)
    assert record["machine"]["cores"] > 0
    assert record["machine"]["memory_bytes"] > 0
    assert record["versions"]["torch"]
    assert record["complete"]


@pytest.mark.parametrize("benchmark", ["kv", "control"])
def test_embedded(benchmark: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each benchmark ends with status 0, a table of floors and figures, and the same figures as JSON."""
    file = tmp_path / "out.json"
    assert main([benchmark, "--scale", "tiny", "--runtime", "embedded", "--json", str(file)]) == 0
    check(MEASURED[benchmark], capsys.readouterr().out, json.loads(file.read_text()))


def test_stages_may_be_ray_actors(ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark uses the Ray that runs already and leaves it running."""
    file = tmp_path / "out.json"
    assert main(["kv", "--workloads", "dense", "--scale", "tiny", "--json", str(file)]) == 0
    check({("dense, copied", "get to a view")}, capsys.readouterr().out, json.loads(file.read_text()))
    assert ray_session.is_initialized()


def test_interrupted(tmp_path: Path) -> None:
    """After Ctrl-C the figures measured so far are printed and written, and nothing is left in shared memory."""
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks", "kv", "--scale", "tiny", "--runtime", "processes"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command += ["--json", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        timer = threading.Timer(50, process.kill)
        timer.start()
        try:
            begun = [process.stdout.readline() for _ in range(2)]
            assert begun == ["measuring floors ...\n", "measuring kv ...\n"]
            process.send_signal(signal.SIGINT)
            table = process.stdout.read()
        finally:
            timer.cancel()
            timer.join()
    assert process.returncode == INTERRUPTED
    assert "ended early" in table
    record = json.loads(file.read_text())
    assert not record["complete"]
    assert any(one["case"] == "floor" for one in record["measurements"])


def test_ratios() -> None:
    """Series that move bytes are compared by bytes per second, others by their medians; warm-up does not count."""
    report = Report("some", {})
    roof = report.series("floor", "copy", size_bytes=100)
    roof.add(1.0, 1.0)
    half = report.series("case", "put", size_bytes=50, against=roof, skip=1)
    half.add(9.0, 1.0)
    assert half.ratio == 0.5
    assert half.record()["first_ms"] == 9000.0
    slow = report.series("case", "call", against=roof)
    slow.add(3.0, 1.0, 2.0)
    assert slow.ratio == 2.0
    assert [one["measure"] for one in report.record()["measurements"]] == ["copy", "put", "call"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing"], "invalid choice"),
        (["kv", "--json", "/no/such/folder/out.json"], "there is no folder"),
        (["kv", "--scale", "x"], "invalid choice"),
        (["kv", "--workloads", "dense,huge"], "no workload 'huge'; known: dense, ragged"),
        (["kv", "--peers", "ray,redis"], "no peer 'redis'; known: ray, transferqueue, mooncake"),
    ],
)
def test_bad_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line ends with status 2 and says why, before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_drawing_needs_an_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Without matplotlib a picture is refused before anything is measured, and the extra is named."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["kv", "--plot", "out.png"])
    assert "transfer-queue[rollout]" in capsys.readouterr().err


def test_picture(tmp_path: Path) -> None:
    """Bars of batches and calls, and curves, with and without peers, make one PNG."""
    report = Report("all", {"scale": "tiny"})
    report.series("floor", "memcpy, warm pages", size_bytes=1000).add(1e-6)
    for label in ("ours, copied", "peer"):
        report.series("dense", "put", size_bytes=1000, workload="dense", label=label).add(2e-6)
    report.benchmark = "control"
    report.series("get_meta(64)", "1k samples").add(1e-3, 2e-3)
    report.benchmark = "curves"
    for x in (10, 100):
        report.series(f"{x} fields", "put", x=x, axis="fields").add(1e-3 * x)
    file = tmp_path / "out.png"
    charts.draw(report.record(), file)
    assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing was measured"):
        charts.draw(Report("kv", {}).record(), file)


def test_comparisons() -> None:
    """Ratios are taken round by round over the rounds that both sides have; those against a floor by its median."""
    report = Report("kv", {})
    ours, other = report.series("c", "put", size_bytes=100), report.series("c", "get")
    theirs = report.series("theirs", "put and get")
    floor = report.series("floor", "copy", size_bytes=100)
    report.compare("c", "both", "theirs", [ours, other], [theirs], at_least=3.0)
    report.compare("c", "both", "theirs", [ours, other], [theirs], LONGER, at_most=0.1)
    report.compare("c", "put", "copy", [ours], [floor], RATE)
    assert report.record()["comparisons"] == []
    ours.add(1.0, 2.0, 1.0, 1.0)
    other.add(1.0, 2.0, 1.0)
    theirs.add(2.0, 16.0, 8.0, 8.0)
    floor.add(0.5)
    faster, longer, rate = report.record()["comparisons"]
    assert (faster["median"], faster["n"], faster["met"]) == (4.0, 3, True)
    assert (longer["median"], longer["met"]) == (0.25, False)
    assert (rate["median"], rate["met"]) == (0.5, None)
    assert "aim ≥ 3: met" in report.table()
