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

from benchmarks.__main__ import INTERRUPTED, main
from benchmarks.figures import Report

FLOORS = ("memcpy", "gather of random", "/dev/shm, fresh", "/dev/shm, warm", "round trip, ipc", "frame of 1 MiB, tcp")
MEASURED = {
    "kv": {
        ("dense", "put"),
        ("dense, copied", "get to a view"),
        ("ragged, copy=False", "touch every byte"),
        ("small, copied, rows at random", "put + draw + get + touch"),
    },
    "control": {
        ("get_meta(64)", "512 samples"),
        ("put of one 12 KiB sample", "beside 512 samples"),
        ("parked get_meta(1)", "since the put began"),
    },
}


def check(benchmark: str, table: str, record: dict[str, Any]) -> None:
    measurements = record["measurements"]
    names = {(one["case"], one["measure"]) for one in measurements}
    assert names >= MEASURED[benchmark]
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
    check(benchmark, capsys.readouterr().out, json.loads(file.read_text()))


def test_stages_may_be_ray_actors(ray_session: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A benchmark uses the Ray that runs already and leaves it running."""
    file = tmp_path / "out.json"
    assert main(["kv", "--scale", "tiny", "--json", str(file)]) == 0
    check("kv", capsys.readouterr().out, json.loads(file.read_text()))
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
    "arguments", [["nothing"], ["kv", "--json", "/no/such/folder/out.json"], ["kv", "--scale", "x"]]
)
def test_bad_arguments(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A wrong command line ends with status 2 and says why, before anything is measured."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err
