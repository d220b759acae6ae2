"""Which process holds something, and whether it still lives."""

from __future__ import annotations

import functools
import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer_queue.messages import ProcessId

_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_DEAD_STATES = "ZX"

ELSEWHERE = ProcessId(host="", pid=0, start_time=0.0)
"""Holds no memory in its hands, it only asks over its connections; so it is gone when these are."""
_STATE, _START_TIME = 0, 19  # fields of /proc/<pid>/stat behind the name


def process_id() -> ProcessId:
    """Return the identity of this process; a forked child has its own."""
    return _process_id(os.getpid())


def identify(pid: int) -> ProcessId | None:
    """Return the identity of another process of this host; None if there is none of this id."""
    stat = _stat(pid)
    if stat is None or stat[_STATE] in _DEAD_STATES:
        return None
    return ProcessId(host=host_id(), pid=pid, start_time=float(stat[_START_TIME]))


def to_record(process: ProcessId) -> dict[str, Any]:
    """Return the identity as JSON has it."""
    return {"host": process.host, "pid": process.pid, "start_time": process.start_time}


def from_record(record: Mapping[str, Any]) -> ProcessId:
    """Rebuild what `to_record` described. Raises `KeyError` or `TypeError` if it is something else."""
    return ProcessId(host=record["host"], pid=record["pid"], start_time=record["start_time"])


def is_remote(process: ProcessId | None) -> bool:
    """Whether this is `ELSEWHERE`, as it is after it travelled."""
    return process is not None and not process.host


def is_alive(process: ProcessId) -> bool:
    """Whether the process still runs. One whose host cannot be looked into from here counts as alive."""
    if process.host != host_id():
        return True
    stat = _stat(process.pid)
    return stat is not None and stat[_STATE] not in _DEAD_STATES and float(stat[_START_TIME]) == process.start_time


@functools.cache
def host_id() -> str:
    """Name the space in which process ids mean something: this boot of this machine, this pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


@functools.lru_cache(maxsize=1)
def _process_id(pid: int) -> ProcessId:
    stat = _stat(pid)
    assert stat is not None, "a running process has an entry in /proc"
    return ProcessId(host=host_id(), pid=pid, start_time=float(stat[_START_TIME]))


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 1 :].split()


def pid_behind(connected: socket.socket) -> int:
    """Return the id of the process that made the other end of a Unix socket; 0 if it is not visible from here."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid: int = _CREDENTIALS.unpack(credentials)[0]
    return pid


def lives(pid: int) -> bool:
    """Whether a process of this id runs; one that cannot be known (0) is taken to."""
    if pid == 0:
        return True
    stat = _stat(pid)
    return stat is not None and stat[_STATE] not in _DEAD_STATES
