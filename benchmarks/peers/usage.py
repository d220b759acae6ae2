"""Memory and processor time of a peer: its process and all that descend from it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.accounting import process_usage, reset_peak
from benchmarks.figures import Report

_GONE = (FileNotFoundError, ProcessLookupError)


@dataclass
class FamilyUsage:
    """Between entering and leaving `watched_family`; processes of the same name count together.

    peak_bytes  the most of any of them, as `VmHWM`
    cpu_s       of all of them
    """

    peak_bytes: dict[str, int] = field(default_factory=dict)
    cpu_s: float = 0.0

    def report(self, report: Report, case: str, moved_bytes: int) -> None:
        for name, size in sorted(self.peak_bytes.items()):
            report.quantity(case, f"peak resident memory, {name}", size / 1e6, "MB")
        report.quantity(case, "processor time, all", self.cpu_s / (moved_bytes / 1e9), "s/GB")


@contextlib.contextmanager
def watched_family(root: int) -> Iterator[FamilyUsage]:
    """Processes that end in between are left out; those that begin are counted from their start."""
    usage = FamilyUsage()
    before = {}
    for pid in family(root):
        with contextlib.suppress(*_GONE):
            reset_peak(pid)
            before[pid] = process_usage(pid).cpu_s
    yield usage
    for pid, name in family(root).items():
        with contextlib.suppress(*_GONE):
            now = process_usage(pid)
            usage.peak_bytes[name] = max(now.peak_bytes, usage.peak_bytes.get(name, 0))
            usage.cpu_s += now.cpu_s - before.get(pid, 0.0)


def family(root: int) -> dict[int, str]:
    """Names of a process and its descendants, by process id."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(*_GONE):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    names, waiting = {}, [root]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        with contextlib.suppress(*_GONE):
            names[pid] = _name(pid)
    return names


def _name(pid: int) -> str:
    """The class of a Ray actor, else the name that the kernel knows."""
    title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split(".")[0].split("(")[0]
    return Path(f"/proc/{pid}/comm").read_text().strip()
