"""The README's section "Numbers" shows what the records in the repository hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import loader, numbers
from benchmarks.figures import Report


def record(folder: Path, delay_s: float, step_s: float | None = None) -> None:
    report = Report("all", {"runtime": "embedded", "scale": "tiny"})
    report.benchmark = "stream"
    report.series("stream, 8 processes", "from put to draw").add(delay_s)
    if step_s is not None:
        report.benchmark = "rl_step"
        report.series("rl_step, 16 prompts", "step").add(step_s)
    (folder / "all.json").write_text(json.dumps(report.record()))


def run(tmp_path: Path, *arguments: str) -> int:
    return numbers.main(arguments, readme=tmp_path / "README.md", folder=tmp_path)


def test_the_readme_has_the_form_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    """If this fails, run the command that the message names."""
    assert numbers.main(["--check"]) == 0, capsys.readouterr().err


def test_other_values_have_the_same_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A new run keeps the form; another row does not, until the section is written again."""
    readme = tmp_path / "README.md"
    readme.write_text(f"# Before\n\n{numbers.BEGIN}\n\n{numbers.END}\n\n# After\n")
    record(tmp_path, 0.001)
    assert run(tmp_path, "--check") == 1
    assert "python -m benchmarks.numbers" in capsys.readouterr().err
    assert run(tmp_path) == 0
    assert "| … from put to draw | 1.00 ms | 1.00 ms |" in readme.read_text()
    record(tmp_path, 1234.5678)
    assert run(tmp_path, "--check") == 0
    record(tmp_path, 0.001, 0.002)
    assert run(tmp_path, "--check") == 1
    assert run(tmp_path) == 0
    text = readme.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\n# After\n")
    assert "| one step of rollout, reward, reference, 4 trainers | 2.00 ms | 2.00 ms |" in text


def test_the_loader_has_a_table(tmp_path: Path) -> None:
    """With the wait for a micro-batch, and the count of a stream whose rank was restarted."""
    report = Report("loader", {"runtime": "processes", "scale": "tiny"})
    for workers, step_s in ((0, 0.0), (2, 0.01)):
        report.series(loader.case_of(workers, step_s), loader.NEXT).add(0.001 * (workers + 1))
    case = "loader, 4 ranks × 2 workers, one restarted"
    report.quantity(case, "samples that came exactly once", 100_000, "samples")
    report.quantity(case, "samples drawn, read and handed out", 5_000.0, "1/s")
    (tmp_path / "loader.json").write_text(json.dumps(report.record()))
    text = numbers.section(numbers.load(tmp_path), str)
    assert "| 0 workers, a loop that asks at once | 1.00 ms | 1.00 ms | ≤ 2 ms |" in text
    assert "| … that computes for 10 ms | 3.00 ms | 3.00 ms | ≤ 2 ms |" in text
    assert "100,000 samples put,\neach handed out exactly once; 5,000 per second" in text


def test_marks_are_needed(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# A README without them\n")
    with pytest.raises(ValueError, match="lacks the lines"):
        run(tmp_path)


def test_a_record_of_all_stands_in_for_missing_ones() -> None:
    """A benchmark's own record goes before that of `all`."""

    def made(benchmark: str, **p50_ms: float) -> dict[str, Any]:
        measured = [{"benchmark": name, "case": "c", "measure": "m", "p50_ms": p50_ms[name]} for name in p50_ms]
        return {"benchmark": benchmark, "measurements": measured, "comparisons": [], "quantities": []}

    results = numbers.Results([made("all", kv=1.0, costs=2.0), made("kv", kv=3.0)])
    found = {name: results.find("measurements", name, "c", "m") for name in ("kv", "costs", "stream")}
    assert {name: one and one["p50_ms"] for name, one in found.items()} == {"kv": 3.0, "costs": 2.0, "stream": None}
