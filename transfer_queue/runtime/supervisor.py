"""Keeps child processes alive: starts them, starts them again when they die, and ends them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transfer_queue
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, TransferQueueError, from_wire

log = logging.getLogger("transfer_queue")

MOST_RESTARTS = 5
RESTART_WINDOW_S = 60.0
PATIENCE_S = 60.0
START_TIMEOUT_S = 60.0

_LONGEST_PAUSE_S = 2.0
_FIRST_PAUSE_S = 0.1
_LONGEST_START_PAUSE_S = 10.0
_END_S = 10.0  # for a child to end by itself

RETURN_S = _LONGEST_PAUSE_S + PATIENCE_S + START_TIMEOUT_S
"""How long after the death of a child its successor may come: a pause, starts that fail, and the last one."""


class Restarts:
    """How often something was started again lately, and whether and when it may be once more."""

    def __init__(self, most: int = MOST_RESTARTS, window_s: float = RESTART_WINDOW_S) -> None:
        self.most = most
        self.window_s = window_s
        self.total = 0
        self._times: deque[float] = deque()

    def next_pause_s(self, now: float) -> float | None:
        """Return how long to wait before the next restart, at once after the first death; None: no more restarts."""
        while self._times and self._times[0] <= now - self.window_s:
            self._times.popleft()
        if len(self._times) >= self.most:
            return None
        pause_s = _FIRST_PAUSE_S * 2 ** (len(self._times) - 1) if self._times else 0.0
        self._times.append(now)
        self.total += 1
        return min(pause_s, _LONGEST_PAUSE_S)


class Starts:
    """Starts that failed since the last good one, and whether and when to try again.

    What keeps a process from starting, as a port that is still taken or a full /dev/shm, often goes by itself: tries
    go on for `patience_s`, with longer and longer pauses between them.
    """

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self.patience_s = patience_s
        self.failed = 0
        self.last_error = ""
        self._since: float | None = None

    def succeeded(self) -> None:
        self.failed, self.last_error, self._since = 0, "", None

    def next_pause_s(self, error: str, now: float) -> float | None:
        """One has failed like this; return how long to wait before the next, None: no more."""
        self.failed += 1
        self.last_error = error
        if self._since is None:
            self._since = now
        left_s = self._since + self.patience_s - now
        if left_s <= 0:
            return None
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** (self.failed - 1), _LONGEST_START_PAUSE_S)
        return min(pause_s, left_s)  # the last try comes at the end of the patience


class Child:
    """One child process and its successors. A thread waits for its end.

    name         for messages and thread names
    order        what `runtime.process` reads from its input
    on_change    called, from any thread, whenever `state`, `pid` or `restarts` changed
    restarts     how often it may be started again
    """

    def __init__(
        self,
        name: str,
        order: dict[str, Any],
        on_change: Callable[[], None],
        *,
        restarts: Restarts,
        start_timeout_s: float,
    ) -> None:
        self.name = name
        self.state = "starting"
        self.restarts = restarts
        self.starts = Starts()
        self._order = order
        self._on_change = on_change
        self._start_timeout_s = start_timeout_s
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._process = self._spawn()
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<Child {self.name}: process {self.pid}, {self.state}, started again {self.restarts.total} times>"

    @property
    def pid(self) -> int:
        """Process id of the present one, or of the last one if it was not started again."""
        return self._process.pid

    def ready(self) -> dict[str, Any]:
        """Wait for the first start and return what the child says of itself; from then on it is kept alive."""
        record = self._answer(self._process)
        self._set("running")
        self._thread = threading.Thread(
            target=self._keep, name=f"transfer_queue supervisor of {self.name}", daemon=True
        )
        self._thread.start()
        return record

    def end(self) -> None:
        """Tell the child to end for good, without waiting for it."""
        self._ending.set()
        with self._lock:
            _close_input(self._process)

    def join(self) -> None:
        """Wait for the end that was asked for; a child that takes too long is killed."""
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            log.warning("%s did not end in %.0f s and is killed", self, _END_S)
            self._process.kill()
            self._process.wait()
        if self._thread is not None:
            self._thread.join()
        if self._process.stdout is not None:
            self._process.stdout.close()  # of one whose answer nobody waited for

    # ------------------------------------------------------------ in the thread that keeps it

    def _keep(self) -> None:
        while True:
            code = self._process.wait()
            if self._ending.is_set():
                self._set("ended")
                return
            pause_s = self.restarts.next_pause_s(time.monotonic())
            if pause_s is None:
                self._give_up(self._too_often(code))
                return
            log.warning("%s ended with %s and is started again", self.name, _ending(code))
            self._set("starting")
            self._ending.wait(pause_s)
            if not self._start_until_it_runs():
                return

    def _start_until_it_runs(self) -> bool:
        """Returns whether to go on: it runs, or was told to end."""
        while not self._ending.is_set():
            try:
                self._start_again()
            except TransferQueueError as error:
                pause_s = self.starts.next_pause_s(error.message, time.monotonic())
            else:
                self.starts.succeeded()
                return True
            failed, last = self.starts.failed, self.starts.last_error
            if pause_s is None:
                within = f"within {self.starts.patience_s:.0f} s"
                self._give_up(f"{failed} starts failed {within}, the last one with: {last}")
                return False
            log.warning("%s could not be started again: %s", self.name, last)
            self._set(f"starting, {failed} starts failed, the last one with: {last}")
            self._ending.wait(pause_s)
        return True

    def _start_again(self) -> None:
        """Raises what kept it from starting."""
        with self._lock:
            if self._ending.is_set():
                return
            _close_input(self._process)
            self._process = self._spawn()
        try:
            self._answer(self._process)
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        self._set("running")

    def _too_often(self, code: int) -> str:
        window_s, most = self.restarts.window_s, self.restarts.most
        last = f"it ended with {_ending(code)}"
        return f"{last} after {most} restarts within {window_s:.0f} s" if most else f"{last} and kept no journal"

    def _give_up(self, reason: str) -> None:
        log.error("%s is not started again: %s", self.name, reason)
        self._set(f"not started again: {reason}")

    def _set(self, state: str) -> None:
        self.state = state
        self._on_change()

    # ------------------------------------------------------------ starting

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "transfer_queue.runtime.process"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=_environment(),
                start_new_session=True,  # the keyboard's signals are for the supervisor
            )
        except OSError as error:
            raise ConnectionLost(f"{self.name} could not be started: {error}") from error
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is dead already: there will be no answer
            process.stdin.write(json.dumps(self._order).encode() + b"\n")
            process.stdin.flush()
        return process

    def _answer(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Return what a new child says when it is ready. Raises what kept it from starting."""
        assert process.stdout is not None
        with process.stdout as output:
            there = select.poll()
            there.register(output, select.POLLIN)
            if not there.poll(1000 * self._start_timeout_s):
                raise DeadlineExceeded(f"{self.name} did not start within {self._start_timeout_s:.0f} s")
            line = output.readline()
        if not line:
            raise ConnectionLost(f"{self.name} ended with {_ending(process.wait())} while it started")
        answer = json.loads(line)
        if "error" in answer:
            kind, message = answer["error"]
            raise from_wire(kind, f"{self.name}: {message}", {})
        ready: dict[str, Any] = answer["ready"]
        return ready


def _environment() -> dict[str, str]:
    """The environment of this process, with the package that runs here found first and the current folder left out."""
    package = str(Path(transfer_queue.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH")
    path = package if not inherited else f"{package}{os.pathsep}{inherited}"
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def _close_input(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()


def _ending(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
