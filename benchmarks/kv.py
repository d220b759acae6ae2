"""Put and get of whole batches, from one process to another, alone and in turn with other stores."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence

from benchmarks import beside, drawn, whole, wide
from benchmarks.figures import Report
from benchmarks.peers.table import PeerKind
from benchmarks.placement import Placement, Stage
from benchmarks.scale import Scale
from benchmarks.whole import Reader, Writer
from benchmarks.workloads import WORKLOADS

_IN_TURN: dict[str, Callable[[Report, Scale, Stage, Stage], None]] = {
    **{name: functools.partial(whole.measure, name=name) for name in ("dense", "ragged", "small")},
    "wide": wide.measure,
    "drawn": drawn.measure,
}
_APART = ("large", "multimodal")  # modules of that name


def measure(
    report: Report,
    scale: Scale,
    placement: Placement,
    workloads: Sequence[str] = tuple(WORKLOADS),
    peers: Sequence[PeerKind] = (),
) -> None:
    """Add the chosen workloads to the report, then the peers beside those that they can do."""
    shared = [name for name in workloads if name in _IN_TURN]
    if shared:
        writer, reader = placement.stage(Writer), placement.stage(Reader)
        for name in shared:
            print(f"measuring {name} ...", flush=True)
            _IN_TURN[name](report, scale, writer, reader)
        beside.measure(report, scale, writer, reader, shared, peers)
    for name in workloads:
        if name in _APART:
            print(f"measuring {name} ...", flush=True)
            importlib.import_module(f"benchmarks.{name}").measure(report, scale, placement)
