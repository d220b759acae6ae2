"""Small calls of ours and of peers that have samples, in turn: some of ours, some of theirs, and so on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.control import BATCH, IN_FLIGHT, SAMPLE_VALUES, Reader, Writer
from benchmarks.figures import Report
from benchmarks.peers.child import Child
from benchmarks.peers.environments import Unavailable
from benchmarks.peers.table import PeerKind
from benchmarks.placement import Placement
from benchmarks.scale import Scale

TURNS = 10
CASE = "put of one 12 KiB sample"

_PARTITION = "beside"
_PARTITIONS = 2  # of the sizes that are drawn from, the smallest
_SHARE = 40  # of the calls that ours alone are measured with


def measure(report: Report, scale: Scale, placement: Placement, peers: Sequence[PeerKind]) -> None:
    """Add the series of both sides and their comparisons. A peer that fails is reported, and the next one comes."""
    both = [(kind, variant) for kind in peers for variant in kind.variants if variant.latencies]
    if not both:
        return
    sides = _Ours(placement)
    for kind, variant in both:
        label = kind.label(variant)
        try:
            with kind.running(variant, report) as child:
                print(f"measuring small calls beside {label} ...", flush=True)
                _take_turns(report, scale, label, sides, child)
        except Unavailable as error:
            print(f"{label}: {error}", flush=True)
            report.peer(label, reason=str(error))


class _Ours:
    def __init__(self, placement: Placement) -> None:
        self._writer = placement.stage(Writer)
        self._reader = placement.stage(Reader)

    def put_samples(self, calls: int) -> list[float]:
        return list(self._writer.call("put_samples", f"{_PARTITION} alone", calls))

    def put_together(self, rounds: int) -> list[float]:
        return list(self._writer.call("put_together", f"{_PARTITION} together", rounds))

    def fill(self, rows: int) -> None:
        self._writer.call("fill", _PARTITION, rows)

    def draw(self, rows: int, calls: int) -> list[float]:
        return list(self._reader.call("draw", _PARTITION, rows, calls))

    def clear(self) -> None:
        self._writer.call("clear", _PARTITION)


def _take_turns(report: Report, scale: Scale, label: str, ours: _Ours, child: Child) -> None:
    calls = max(2, scale.calls // _SHARE)

    def turns(case: str, measure: str, our: Callable[[], list[float]], their: Callable[[], list[float]]) -> None:
        """Leave out the first turn of either side."""
        our(), their()
        mine = report.series(f"{case} beside {label}", measure)
        other = report.series(f"{case}, {label}", measure)
        report.compare(case, measure, label, [mine], [other])
        for _ in range(TURNS):
            mine.add(*our())
            other.add(*their())

    def put_samples() -> list[float]:
        return list(child.call("put_samples", calls, SAMPLE_VALUES))

    def put_together() -> list[float]:
        return list(child.call("put_together", 1, IN_FLIGHT, SAMPLE_VALUES))

    turns(CASE, "alone", lambda: ours.put_samples(calls), put_samples)
    turns(CASE, f"{IN_FLIGHT} in flight, per put", lambda: ours.put_together(1), put_together)
    present = 0
    for rows in scale.partition_rows[:_PARTITIONS]:
        ours.fill(rows - present)
        child.call("fill", present, rows)
        present = rows

        def draw(rows: int = rows) -> list[float]:
            return ours.draw(rows, calls)

        def their_draw(rows: int = rows) -> list[float]:
            return list(child.call("draw", rows, calls, BATCH))

        turns(f"get_meta({BATCH})", f"{rows} samples", draw, their_draw)
    ours.clear()
    child.call("empty", present)
