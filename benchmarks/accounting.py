"""Memory and processor time of the processes of a run, as the kernel counts them. Linux only.

resident   VmHWM: the most that was mapped and present at once. Pages of an arena count here in every process that has
           touched them, and twice where it has them mapped twice.
private    RssAnon: what this process alone has, its heap and its results. Sampled, so short peaks may be missed.
arenas     bytes of the shared memory of the units, counted once for the host
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import transfer_queue
from benchmarks import figures
from benchmarks.placement import Stage
from transfer_queue.messages import GetUnitStats, Report
from transfer_queue.wire.channel import Peer

_PATIENCE_S = 10.0
_SAMPLE_S = 0.01
_RESET_PEAK = "5"  # proc(5), clear_refs
_USER_TIME, _SYSTEM_TIME = 11, 12  # fields of /proc/<pid>/stat behind the name, each in ticks


@dataclass(frozen=True)
class Usage:
    """peak_bytes: since the process began or `reset_peak`; cpu_s: since it began."""

    peak_bytes: int
    cpu_s: float


def process_usage(pid: int) -> Usage:
    """Raises `ProcessLookupError` or `FileNotFoundError` if the process is gone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    ticks = int(fields[_USER_TIME]) + int(fields[_SYSTEM_TIME])
    return Usage(_status_bytes(pid, "VmHWM"), ticks / os.sysconf("SC_CLK_TCK"))


def private_bytes(pid: int) -> int:
    """What the process has for itself alone, now."""
    return _status_bytes(pid, "RssAnon")


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text(_RESET_PEAK)


def processes(stages: Mapping[str, Stage]) -> dict[int, str]:
    """Names of all processes of a run, by process id: its servers and these stages; "all" if they share one."""
    names: dict[int, list[str]] = {}
    for name, pid in [*_servers(), *((name, stage.pid) for name, stage in stages.items())]:
        names.setdefault(pid, []).append(name)
    if len(names) == 1 and stages:
        return dict.fromkeys(names, "all")
    return {pid: " + ".join(joined) for pid, joined in names.items()}


def server_processes() -> dict[int, str]:
    """Names of the processes that hold controller and units, by process id."""
    return processes({})


def unit_stats() -> Counter[str]:
    """What the units of the session say about their space, summed up."""
    client = transfer_queue.get_client()
    total: Counter[str] = Counter()
    for info in client.storage_infos().values():
        place = (info.local_address, info.folder, info.nonce, info.to_addr("request"))
        peer = Peer(*place, token=client.controller_info.token, client_id="accounting")
        try:
            report = peer.begin(GetUnitStats()).result(_PATIENCE_S)
        finally:
            peer.close()
        assert isinstance(report, Report)
        total.update(report.entries)
    return total


# ---------------------------------------------------------------- a stretch of a run


@dataclass
class Watch:
    """What the processes used between entering and leaving `watched`."""

    names: Mapping[int, str]
    resident_bytes: dict[str, int] = field(default_factory=dict)  # peak
    private_bytes: dict[str, int] = field(default_factory=dict)  # peak over what there was at the start
    arena_bytes: int = 0  # beyond the start; they do not shrink while there is room for more
    cpu_s: dict[str, float] = field(default_factory=dict)

    def report(self, report: figures.Report, case: str, moved_bytes: int) -> None:
        """Add peak and processor time of each process; the latter also per GB of what the stretch moved in all."""
        for name, size in self.resident_bytes.items():
            report.quantity(case, f"peak resident memory, {name}", size / 1e6, "MB")
        report.quantity(case, "arenas made", self.arena_bytes / 1e6, "MB")
        for name, seconds in self.cpu_s.items():
            report.quantity(case, f"processor time, {name}", seconds / (moved_bytes / 1e9), "s/GB")
        if len(self.cpu_s) > 1:
            report.quantity(case, "processor time, all", sum(self.cpu_s.values()) / (moved_bytes / 1e9), "s/GB")


@contextlib.contextmanager
def watched(names: Mapping[int, str], *, sample: bool = False) -> Iterator[Watch]:
    """Account for these processes until the end; `sample` looks at their private memory all the time."""
    watch = Watch(names)
    for pid in names:
        reset_peak(pid)
    arenas = unit_stats()["bytes_arenas"]
    before = {pid: process_usage(pid) for pid in names}
    with _sampled(names if sample else ()) as private:
        yield watch
    for pid, name in names.items():
        usage = process_usage(pid)
        watch.resident_bytes[name] = usage.peak_bytes
        watch.cpu_s[name] = usage.cpu_s - before[pid].cpu_s
    watch.private_bytes = {names[pid]: size for pid, size in private.items()}
    watch.arena_bytes = unit_stats()["bytes_arenas"] - arenas


@contextlib.contextmanager
def _sampled(pids: Iterable[int]) -> Iterator[dict[int, int]]:
    """Keep the peak of private bytes beyond those at the start, by process id; of no processes, do nothing."""
    base = {pid: private_bytes(pid) for pid in pids}
    peak = dict.fromkeys(base, 0)
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(_SAMPLE_S):
            for pid, before in base.items():
                peak[pid] = max(peak[pid], private_bytes(pid) - before)

    if not base:
        yield peak
        return
    thread = threading.Thread(target=sample, name="memory-samples")
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


# ---------------------------------------------------------------- inside


def _servers() -> Iterator[tuple[str, int]]:
    """Name and process id of controller and units, which leave the latter in their folders."""
    client = transfer_queue.get_client()
    yield "controller", _owner(client.controller_info.folder)
    for number, info in enumerate(client.storage_infos().values()):
        yield f"unit {number}", _owner(info.folder)


def _owner(folder: str) -> int:
    return int(json.loads((Path(folder) / "owner").read_text())["pid"])


def _status_bytes(pid: int, name: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise ProcessLookupError(f"process {pid} has no {name}: it is ending")
