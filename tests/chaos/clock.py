"""A wall clock that a test can set, in the processes under test only: the machine's own is left alone.

The file `clock` in the control folder says by how many seconds it is off. `time.time` and `time.time_ns` are what
Python code reads it by; clocks that C code reads go on as they are, and so does `time.monotonic`.

Where the variable `TQ_CHAOS_CLOCK` is set, both are replaced as soon as this module is imported, which has to be before
the library is: what takes one of them as a default keeps the function that was there then.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CLOCK = "TQ_CHAOS_CLOCK"

_FILE = "clock"
_read, _read_ns = time.time, time.time_ns


class _WallClock:
    """The machine's, until `path` names a file that says by how much it is off."""

    path: Path | None = None

    def time(self) -> float:
        return _read() + self._off_s()

    def time_ns(self) -> int:
        return _read_ns() + int(1e9 * self._off_s())

    def _off_s(self) -> float:
        try:
            return 0.0 if self.path is None else float(self.path.read_text())
        except FileNotFoundError:
            return 0.0


_clock = _WallClock()


def arm_clock(control: Path) -> None:
    """Let the wall clock of this process follow the file."""
    _clock.path = control / _FILE
    _install()


def disarm_clock() -> None:
    """This process has the machine's clock again."""
    _clock.path = None
    time.time, time.time_ns = _read, _read_ns


def set_clock(control: Path, off_s: float) -> None:
    """Put the clock of all armed processes off by so many seconds."""
    partial = control / f"{_FILE}.new"
    partial.write_text(repr(off_s))
    os.rename(partial, control / _FILE)


def _install() -> None:
    time.time, time.time_ns = _clock.time, _clock.time_ns


if CLOCK in os.environ:
    _install()
