"""What safety costs: each thing beside the same run without it, in turn, as ratios of each round.

A part is measured on sessions of its own, whose servers are child processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.figures import Report
from benchmarks.safety import checkpoint, checksums, connections, journal, leases, recovery
from benchmarks.scale import Scale
from benchmarks.workloads import PARTS, SAFETY

MEASURES: dict[str, Callable[[Report, Scale], None]] = {
    "journal": journal.measure,
    "journal-data": journal.measure_data,
    "connections": connections.measure,
    "encryption": connections.measure_encryption,
    "checksums": checksums.measure,
    "leases": leases.measure,
    "controller-idle": lambda report, scale: recovery.measure(report, scale, recovery.CONTROLLER, loaded=False),
    "controller-loaded": lambda report, scale: recovery.measure(report, scale, recovery.CONTROLLER, loaded=True),
    "unit-idle": lambda report, scale: recovery.measure(report, scale, recovery.UNIT, loaded=False),
    "unit-loaded": lambda report, scale: recovery.measure(report, scale, recovery.UNIT, loaded=True),
    "checkpoint": checkpoint.measure,
}


def measure(report: Report, scale: Scale, parts: Sequence[str] = tuple(PARTS)) -> None:
    """Add these parts to the report, each under a name of its own."""
    for part in parts:
        print(f"measuring {part} ...", flush=True)
        report.benchmark = f"{SAFETY}/{part}"
        MEASURES[part](report, scale)
