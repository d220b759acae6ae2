"""What was measured: series of durations, numbers, comparisons; the JSON they are kept in."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import tables
from benchmarks.origin import origin

FASTER = "× as fast as"
LONGER = "× the time of"
RATE = "× the rate of"


@dataclass
class Series:
    """Durations of one thing done again and again.

    size_bytes  that each of them moved; None where the duration itself is what matters
    against     a series to compare with: share of its bytes per second, or multiple of its median
    skip        leading durations that are warm-up; the very first is reported on its own
    x, axis     where it lies on a scaling curve: a number, and what it counts
    workload, label  whose bar it is in the chart of what batch
    """

    case: str
    measure: str
    size_bytes: int | None = None
    against: Series | None = None
    skip: int = 0
    x: float | None = None
    axis: str | None = None
    workload: str | None = None
    label: str | None = None
    durations_s: list[float] = field(default_factory=list)

    @property
    def counted_s(self) -> list[float]:
        return self.durations_s[self.skip :]

    @property
    def p50_s(self) -> float:
        return statistics.median(self.counted_s)

    @property
    def p99_s(self) -> float:
        return quantile(self.counted_s, 0.99)

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
            "x": self.x,
            "axis": self.axis,
            "workload": self.workload,
            "label": self.label,
        }


@dataclass(frozen=True)
class Comparison:
    """The same thing done in two ways, round by round; ratios are taken within each round.

    ours, other  series whose durations of a round are added up
    unit         `FASTER`: the other's time by ours; `LONGER`: ours by the other's; `RATE`: our bytes per second by the
                 median of the other's, which was not measured in turn
    at_least, at_most  what the project aims at, for the median
    """

    case: str
    measure: str
    against: str
    ours: Sequence[Series]
    other: Sequence[Series]
    unit: str = FASTER
    at_least: float | None = None
    at_most: float | None = None

    @property
    def ratios(self) -> list[float]:
        """One per round that both sides have finished."""
        if self.unit == RATE:
            floor = self.other[0].bytes_per_s if self.other[0].counted_s else None
            size = self.ours[0].size_bytes
            if floor is None or size is None:
                return []
            return [size / duration_s / floor for duration_s in _sums(self.ours)]
        pairs = zip(_sums(self.ours), _sums(self.other), strict=False)
        return [other / ours if self.unit == FASTER else ours / other for ours, other in pairs]

    def record(self) -> dict[str, Any]:
        ratios = self.ratios
        median = statistics.median(ratios)
        met = None
        if self.at_least is not None or self.at_most is not None:
            met = median >= (self.at_least or 0.0) and median <= (self.at_most or float("inf"))
        return {
            "case": self.case,
            "measure": self.measure,
            "against": self.against,
            "unit": self.unit,
            "median": median,
            "p10": quantile(ratios, 0.1),
            "p90": quantile(ratios, 0.9),
            "n": len(ratios),
            "at_least": self.at_least,
            "at_most": self.at_most,
            "met": met,
        }


@dataclass(frozen=True)
class Quantity:
    """One number that is no duration: bytes, a share, a rate."""

    case: str
    measure: str
    value: float
    unit: str
    x: float | None = None
    axis: str | None = None


class Report:
    """The figures of one run, in the order in which they were begun; series without a counted duration are left out.

    benchmark  whose figures come next; kept with each of them
    """

    def __init__(self, benchmark: str, settings: dict[str, Any]) -> None:
        self.benchmark = benchmark
        self.complete = False
        self._about = {"benchmark": benchmark, "settings": settings, **origin()}
        self._series: list[tuple[str, Series]] = []
        self._quantities: list[tuple[str, Quantity]] = []
        self._comparisons: list[tuple[str, Comparison]] = []
        self._peers: list[dict[str, Any]] = []
        self._earlier: dict[str, Any] = {}

    def series(self, case: str, measure: str, **options: Any) -> Series:
        """Begin one."""
        series = Series(case, measure, **options)
        self._series.append((self.benchmark, series))
        return series

    def quantity(self, case: str, measure: str, value: float, unit: str, **place: Any) -> None:
        """Add a number that is no duration; `place` is `x` and `axis` of a scaling curve."""
        self._quantities.append((self.benchmark, Quantity(case, measure, value, unit, **place)))

    def compare(
        self,
        case: str,
        measure: str,
        against: str,
        ours: Sequence[Series],
        other: Sequence[Series],
        unit: str = FASTER,
        **aim: float | None,
    ) -> None:
        """Add a comparison; it follows the series as they grow. `aim` is `at_least` or `at_most`."""
        self._comparisons.append((self.benchmark, Comparison(case, measure, against, ours, other, unit, **aim)))

    def peer(self, label: str, versions: dict[str, str] | None = None, reason: str | None = None) -> None:
        """Say that a peer was measured, with the versions of its packages, or why it was not or not wholly."""
        entry = {"benchmark": self.benchmark, "peer": label, "versions": versions or {}, "reason": reason}
        self._peers.append(entry)

    def find(self, case: str, measure: str) -> Series | None:
        """The series of that name, if it was begun."""
        return next((one for _, one in self._series if (one.case, one.measure) == (case, measure)), None)

    def record(self) -> dict[str, Any]:
        figures = {
            "measurements": [{"benchmark": of, **one.record()} for of, one in self._series if one.counted_s],
            "quantities": [{"benchmark": of, **asdict(one)} for of, one in self._quantities],
            "comparisons": [{"benchmark": of, **one.record()} for of, one in self._comparisons if one.ratios],
            "peers": self._peers,
        }
        own = {one["benchmark"] for entries in figures.values() for one in entries}
        joined = {
            kind: [*(one for one in self._earlier.get(kind, ()) if one["benchmark"] not in own), *entries]
            for kind, entries in figures.items()
        }
        commits = {**self._earlier.get("commits", {}), **dict.fromkeys(sorted(own), tables.commit(self._about))}
        return {**self._about, "complete": self.complete, "commits": commits, **joined}

    def join(self, path: Path) -> None:
        """Go with the figures of an earlier run that `write` left there, but for benchmarks that this run has too.

        Nothing is taken from a run on another machine or with other versions, or from one that ended early.
        """
        if not path.exists():
            return
        earlier = json.loads(path.read_text())
        if earlier["complete"] and _origin_of(earlier) == _origin_of(self._about):
            self._earlier = earlier

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.record(), indent=1) + "\n")

    def table(self) -> str:
        return tables.text(self.record())


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which that share of the others lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _origin_of(record: dict[str, Any]) -> dict[str, Any]:
    """What two runs have in common if their figures belong together."""
    machine = {name: value for name, value in record["machine"].items() if not name.startswith("load")}
    return {**{name: record[name] for name in ("benchmark", "settings", "versions")}, "machine": machine}


def _sums(series: Sequence[Series]) -> list[float]:
    """Per round, over the series; of the rounds that all of them have."""
    return [sum(durations_s) for durations_s in zip(*(one.counted_s for one in series), strict=False)]
