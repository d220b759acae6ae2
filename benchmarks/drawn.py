"""The dense batch in several puts, read some rows at a time in an order that has nothing to do with them."""

from __future__ import annotations

from benchmarks import floors
from benchmarks.figures import RATE, Report
from benchmarks.placement import Stage
from benchmarks.scale import Scale
from benchmarks.whole import TOUCH, VIEW, Facts

PUTS = 8
ROWS = 64  # at a time
GET_TO_GATHER = 0.5  # aimed at

_NAME = "dense"


def measure(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    """A duration per batch of rows; they are compared with a gather of the same rows by NumPy."""
    facts: Facts = writer.call("prepare", _NAME, scale)
    rows = min(ROWS, facts.rows // PUTS)
    case = f"drawn, {rows} rows at a time from {PUTS} puts"
    parts = facts.rows // rows
    floor = report.find(floors.CASE, floors.GATHER)
    puts = report.series(case, f"{PUTS} puts", size_bytes=facts.size_bytes, skip=scale.warm_up)
    options = {"size_bytes": facts.size_bytes // parts, "skip": scale.warm_up * parts}
    gets = report.series(case, VIEW, against=floor, **options)
    touches = report.series(case, TOUCH, **options)
    if floor is not None:
        report.compare(case, VIEW, floors.GATHER, [gets], [floor], RATE, at_least=GET_TO_GATHER)
        report.compare(case, "get + touch", floors.GATHER, [gets, touches], [floor], RATE)
    for _ in range(scale.warm_up + scale.rounds):
        puts.add(writer.call("put", _NAME, PUTS))
        for get_s, touch_s in reader.call("read_drawn", facts, rows):
            gets.add(get_s)
            touches.add(touch_s)
        writer.call("clear")
    writer.call("forget")
