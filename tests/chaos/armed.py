"""A controller or unit of the library with tripwires: `python -m tests.chaos.armed` in place of its usual child main.

Wraps functions of the library in this process only, and then runs the ordinary child main. What is to happen is read
from files in the folder `$TQ_CHAOS_CONTROL`, so that a test can ask for it while the server runs:

    trip-<name>   {"kind": …, "number": n}: the process kills itself at the n-th step of that kind from now on
    fail-<name>   {"kind": "write", "number": n}: a unit raises at the n-th request to write from now, and at later ones
    full-<name>   there is no space left for files, neither of the journal nor of arenas
    clock         seconds by which the wall clock is off

It writes `loaded-<name>`, the `time.monotonic` at which Python and the library were loaded and the server began.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.clock import arm_clock
from transfer_queue.journal import writer
from transfer_queue.journal.files import Files
from transfer_queue.messages import Reserve, Write
from transfer_queue.runtime import process
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.stream import Stream

CONTROL = "TQ_CHAOS_CONTROL"
BROKEN_WRITE = "the unit failed, as the test asked"
KINDS = ("journal-before", "journal-after", "send-before", "send-after", "receive-after")

_SMALL = {"segment_bytes": 1 << 18, "reserve_bytes": 1 << 17, "snapshot_bytes": 1 << 19}


class Countdown:
    """Counts steps of the kind that a file names, from when the file is there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None
        self._kind = ""
        self._left = 0

    def due(self, kind: str) -> bool:
        """Count a step of this kind; return whether it is the one that the file asks for, or a later one."""
        try:
            status = os.stat(self.path)
            seen = (status.st_ino, status.st_mtime_ns)
            if seen != self._seen:
                plan = json.loads(self.path.read_text())
                self._seen, self._kind, self._left = seen, plan["kind"], plan["number"]
        except FileNotFoundError:
            return False
        if kind != self._kind:
            return False
        self._left -= 1
        return self._left <= 0


class Tripwire:
    """Kills this process at a step that a file names."""

    def __init__(self, folder: Path, name: str) -> None:
        self._steps = Countdown(folder / f"trip-{name}")
        self._full = folder / f"full-{name}"

    @property
    def armed(self) -> bool:
        return self._steps.path.exists()

    def step(self, kind: str) -> None:
        """The process is at a step of this kind."""
        if self._steps.due(kind):
            os.unlink(self._steps.path)
            os.kill(os.getpid(), signal.SIGKILL)

    def check_space(self) -> None:
        if self._full.exists():
            raise OSError(errno.ENOSPC, "no space left (as the test asked)")


def arm_messages(wire: Tripwire) -> None:
    """Step before and after each message that goes out, and after each that comes in."""
    send, take = Stream.send, Stream.next

    @functools.wraps(send)
    def sending(self: Stream, *args: Any, **kwargs: Any) -> bool:
        wire.step("send-before")
        sent = send(self, *args, **kwargs)
        if wire.armed:
            self.flush()  # so that what follows really is behind the sending
        wire.step("send-after")
        return sent

    @functools.wraps(take)
    def taking(self: Stream) -> Any:
        frames = take(self)
        if frames is not None:
            wire.step("receive-after")
        return frames

    Stream.send, Stream.next = sending, taking  # type: ignore[method-assign]


def _arm_journal(wire: Tripwire) -> None:
    append, opened = writer.Journal.append, writer.Journal.open

    @functools.wraps(append)
    def appending(self: Any, *args: Any, **kwargs: Any) -> int:
        wire.step("journal-before")
        number = append(self, *args, **kwargs)
        wire.step("journal-after")
        return number

    writer.Journal.append = appending  # type: ignore[method-assign]
    # Small segments, so that a short run passes through many of them and their snapshots.
    writer.Journal.open = functools.partial(opened, **_SMALL)  # type: ignore[method-assign]


def _arm_files(wire: Tripwire) -> None:
    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            wire.check_space()
            return function(*args, **kwargs)

        return checked

    for name in ("create", "allocate", "write"):
        setattr(Files, name, guarded(getattr(Files, name)))
    os.posix_fallocate = guarded(os.posix_fallocate)  # the arenas


def _arm_writing(failing: Countdown) -> None:
    """Raise at a request to write, as a bug in the unit would."""
    handle = UnitService._handle

    @functools.wraps(handle)
    def handling(self: UnitService, request: Any, ticket: Any) -> Any:
        if isinstance(request, Reserve | Write) and failing.due("write"):
            raise RuntimeError(BROKEN_WRITE)
        return handle(self, request, ticket)

    UnitService._handle = handling  # type: ignore[method-assign]


def main() -> int:
    """Arm this process as soon as it is told which server it is, then serve."""
    started = process._start

    def starting(order: dict[str, Any]) -> Any:
        name = "controller" if order["role"] == "controller" else order["server"]["unit_id"]
        folder = Path(os.environ[CONTROL])
        (folder / f"loaded-{name}").write_text(json.dumps(time.monotonic()))
        wire = Tripwire(folder, name)
        arm_messages(wire)
        _arm_journal(wire)
        _arm_files(wire)
        _arm_writing(Countdown(folder / f"fail-{name}"))
        arm_clock(folder)
        return started(order)

    process._start = starting
    return process.main()


if __name__ == "__main__":
    sys.exit(main())
