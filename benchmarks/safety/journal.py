"""What it costs to write down every change before it is answered: in shared memory, and synced to a disk."""

from __future__ import annotations

import tempfile

from benchmarks import control, whole
from benchmarks.figures import Report
from benchmarks.safety.calls import Reader, measure_calls
from benchmarks.safety.data import ALL, measure_batches
from benchmarks.safety.sides import WITHOUT, Conf, Sides
from benchmarks.scale import Scale

IN_MEMORY = "journal in shared memory"
ON_DISK = "journal on a disk"
CALLS_AT_MOST = 1.15  # times the call without a journal
DATA_AT_MOST = 1.05

_BATCHES = ("dense", "ragged", "small")


def measure(report: Report, scale: Scale) -> None:
    """Small calls on three sessions in turn, then whole batches on two."""
    with tempfile.TemporaryDirectory(prefix="tq-benchmark-") as folder:
        confs: dict[str, Conf] = {
            WITHOUT: {"journal": {"enabled": False}},
            IN_MEMORY: {"journal": {"enabled": True}},
            ON_DISK: {"journal": {"enabled": True, "path": folder}},
        }
        with Sides(confs) as sides:
            stages = sides.stage(control.Writer), sides.stage(Reader)
            aims = {IN_MEMORY: {"at_most": CALLS_AT_MOST}}
            measure_calls(report, scale, *stages, prefix="calls", sides=list(confs), base=WITHOUT, aims=aims)


def measure_data(report: Report, scale: Scale) -> None:
    """Whole batches on two sessions in turn."""
    confs = {WITHOUT: {"journal": {"enabled": False}}, IN_MEMORY: {"journal": {"enabled": True}}}
    with Sides(confs) as sides:
        stages = sides.stage(whole.Writer), sides.stage(whole.Reader)
        measure_batches(
            report,
            scale,
            *stages,
            _BATCHES,
            prefix="data",
            sides=list(confs),
            base=WITHOUT,
            rounds=scale.turns,
            aims={ALL: {IN_MEMORY: {"at_most": DATA_AT_MOST}}},
        )
