"""Whole batches between two processes of a host: put, then draw, get and every byte touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.figures import Report
from benchmarks.safety.sides import Compared, SideStage, turns
from benchmarks.scale import Scale
from benchmarks.whole import WAYS, Facts, Way

PUT = "put"
GET = "draw + get"
ALL = "put + draw + get + touch"

_COPIED = WAYS[0]


def measure_batches(
    report: Report,
    scale: Scale,
    writer: SideStage,
    reader: SideStage,
    names: Sequence[str],
    *,
    prefix: str,
    sides: Sequence[str],
    base: str,
    rounds: int,
    ways: Mapping[str, Way] | None = None,
    aims: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> None:
    """Compare these batches; `aims` are bounds by measure (`PUT`, `GET`, `ALL`) and side.

    `ways`: how sides read whose reader does not just copy.
    """
    for name in names:
        facts: Facts | None = None
        for side in sides:
            facts = writer.call(side, "prepare", name, scale)
        assert facts is not None
        compared = {
            measure: Compared(
                report,
                f"{prefix}: {name}, {measure}",
                sides,
                base=base,
                size_bytes=facts.size_bytes,
                aims=(aims or {}).get(measure),
            )
            for measure in (PUT, GET, ALL)
        }
        for side, counts in turns(sides, rounds, scale.warm_up):
            put_s = writer.call(side, "put", name)
            draw_s, get_s, touch_s = reader.call(side, "read", facts, (ways or {}).get(side, _COPIED))
            writer.call(side, "clear")
            compared[PUT].add(side, counts, [put_s])
            compared[GET].add(side, counts, [draw_s + get_s])
            compared[ALL].add(side, counts, [put_s + draw_s + get_s + touch_s])
        for side in sides:
            writer.call(side, "forget")
