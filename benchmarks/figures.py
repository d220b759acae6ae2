"""What was measured: series of durations, the one table they are printed as, the JSON they are kept in."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("transfer-queue", "torch", "tensordict", "numpy", "pyzmq", "msgpack", "ray")


@dataclass
class Series:
    """Durations of one thing done again and again.

    size_bytes  that each of them moved; None where the duration itself is what matters
    against     a series to compare with: share of its bytes per second, or multiple of its median
    skip        leading durations that are warm-up; the very first is reported on its own
    """

    case: str
    measure: str
    size_bytes: int | None = None
    against: Series | None = None
    skip: int = 0
    durations_s: list[float] = field(default_factory=list)

    @property
    def counted_s(self) -> list[float]:
        return self.durations_s[self.skip :]

    @property
    def p50_s(self) -> float:
        return statistics.median(self.counted_s)

    @property
    def p99_s(self) -> float:
        ordered = sorted(self.counted_s)
        return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]

    @property
    def bytes_per_s(self) -> float | None:
        return None if self.size_bytes is None else self.size_bytes / self.p50_s

    @property
    def ratio(self) -> float | None:
        """Share of the other's bytes per second, or of medians if one of the two moves no bytes."""
        if self.against is None or not self.against.counted_s:
            return None
        rate, other = self.bytes_per_s, self.against.bytes_per_s
        return self.p50_s / self.against.p50_s if rate is None or other is None else rate / other

    def add(self, *durations_s: float) -> None:
        self.durations_s.extend(durations_s)

    def record(self) -> dict[str, Any]:
        rate = self.bytes_per_s
        return {
            "case": self.case,
            "measure": self.measure,
            "p50_ms": 1e3 * self.p50_s,
            "p99_ms": 1e3 * self.p99_s,
            "min_ms": 1e3 * min(self.counted_s),
            "n": len(self.counted_s),
            "first_ms": 1e3 * self.durations_s[0] if self.skip else None,
            "size_bytes": self.size_bytes,
            "gb_per_s": None if rate is None else rate / 1e9,
            "against": None if self.against is None else {"case": self.against.case, "measure": self.against.measure},
            "ratio": self.ratio,
        }


class Report:
    """The series of one run, in the order in which they were begun; those without a counted duration are left out."""

    def __init__(self, benchmark: str, settings: dict[str, Any]) -> None:
        self._series: list[Series] = []
        self._about = {"benchmark": benchmark, "settings": settings, **_origin()}
        self.complete = False

    def series(self, case: str, measure: str, **options: Any) -> Series:
        """Begin one."""
        self._series.append(Series(case, measure, **options))
        return self._series[-1]

    def find(self, case: str, measure: str) -> Series | None:
        """The series of that name, if it was begun."""
        return next((one for one in self._series if (one.case, one.measure) == (case, measure)), None)

    def record(self) -> dict[str, Any]:
        measured = [series.record() for series in self._measured()]
        return {**self._about, "complete": self.complete, "measurements": measured}

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.record(), indent=1) + "\n")

    def table(self) -> str:
        header = ("case", "measure", "p50 ms", "p99 ms", "n", "first ms", "GB/s", "compared")
        rows = [_cells(record) for record in (series.record() for series in self._measured())]
        about = self._about
        settings = " · ".join(f"{key} {value}" for key, value in about["settings"].items())
        commit = f"{about['commit']} with changes" if about["changed"] else about["commit"]
        lines = [
            f"{about['benchmark']} · {settings}",
            f"commit {commit} · {_machine_line(about['machine'])}",
            "",
            *_aligned([header, *rows]),
        ]
        if not self.complete:
            lines.append("ended early: the figures are what was measured until then")
        return "\n".join(lines)

    def _measured(self) -> list[Series]:
        return [series for series in self._series if series.counted_s]


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    compared = ""
    if record["ratio"] is not None:
        share = f"{100 * record['ratio']:.3g} % of" if record["gb_per_s"] is not None else f"{record['ratio']:.2f} ×"
        compared = f"{share} {record['against']['measure']}"
    return (
        record["case"],
        record["measure"],
        _number(record["p50_ms"]),
        _number(record["p99_ms"]),
        str(record["n"]),
        "" if record["first_ms"] is None else _number(record["first_ms"]),
        "" if record["gb_per_s"] is None else f"{record['gb_per_s']:.2f}",
        compared,
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 1, len(widths) - 1}
    lines = []
    for row in rows:
        cells = zip(range(len(row)), row, widths, strict=True)
        padded = [cell.ljust(width) if number in left else cell.rjust(width) for number, cell, width in cells]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


# ---------------------------------------------------------------- where it was measured


def _origin() -> dict[str, Any]:
    return {
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain")),
        "machine": {
            "cpu": _first_value("/proc/cpuinfo", "model name"),
            "cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "kernel": platform.release(),
            "load_1_min_at_start": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def _machine_line(machine: dict[str, Any]) -> str:
    memory = machine["memory_bytes"] / 2**30
    load = machine["load_1_min_at_start"]
    return f"{machine['cores']} cores ({machine['cpu']}), {memory:.0f} GiB, load {load:.1f} at the start"


def _git(*arguments: str) -> str | None:
    """What git says about the folder of this file; None without git or outside a repository."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """None for a checkout that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_value(path: str, key: str) -> str | None:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None
