"""The same bytes as few and as many fields: the time should not grow with their number."""

from __future__ import annotations

from typing import Any

from benchmarks import batches, floors
from benchmarks.figures import LONGER, Report
from benchmarks.placement import Stage
from benchmarks.scale import Scale
from benchmarks.whole import TOTAL, WAYS, Facts, Reading

MANY_TO_ONE = 1.3  # times as long, aimed at

_AXIS = "fields"


def measure(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    """One round after the other, in each of them every number of fields in turn."""
    roof = report.find(floors.CASE, floors.MEMCPY)
    facts: dict[int, Facts] = {}
    puts, readings = {}, {}
    for fields in batches.WIDE_FIELDS:
        name = batches.wide_name(fields)
        fact = facts[fields] = writer.call("prepare", name, scale)
        moving: dict[str, Any] = {"size_bytes": fact.size_bytes, "skip": scale.warm_up, "x": fields, "axis": _AXIS}
        puts[fields] = report.series(name, "put", against=roof, **moving)
        for way in _WAYS:
            case = f"{name}, {way.name}"
            readings[fields, way] = Reading(report, case, **moving)
    one, many = batches.WIDE_FIELDS[0], batches.WIDE_FIELDS[-1]
    case, against = batches.wide_name(many), batches.wide_name(one)
    report.compare(case, "put", against, [puts[many]], [puts[one]], LONGER)
    for way in _WAYS:
        totals = [readings[many, way].total], [readings[one, way].total]
        report.compare(f"{case}, {way.name}", TOTAL, f"{against}, {way.name}", *totals, LONGER, at_most=MANY_TO_ONE)
    for _ in range(scale.warm_up + scale.rounds):
        for fields in batches.WIDE_FIELDS:
            put_s = writer.call("put", batches.wide_name(fields))
            puts[fields].add(put_s)
            for way in _WAYS:
                readings[fields, way].add(put_s, reader.call("read", facts[fields], way))
            writer.call("clear")
    writer.call("forget")


_WAYS = [way for way in WAYS if not way.shuffled]
