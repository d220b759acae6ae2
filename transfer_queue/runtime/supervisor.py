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

_LONGEST_PAUSE_S = 2.0
_FIRST_PAUSE_S = 0.1
_END_S = 10.0  # for a child to end by itself


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
                self._give_up(code)
                return
            log.warning("%s ended with %s and is started again", self.name, _ending(code))
            self._set("starting")
            self._ending.wait(pause_s)
            self._start_again()

    def _start_again(self) -> None:
        with self._lock:
            if self._ending.is_set():
                return
            _close_input(self._process)
            try:
                self._process = self._spawn()
            except ConnectionLost as error:
                log.warning("%s", error)
                return
        try:
            self._answer(self._process)
        except TransferQueueError as error:
            log.warning("%s could not be started again: %s", self.name, error)
            self._process.kill()
        else:
            self._set("running")

    def _give_up(self, code: int) -> None:
        window_s, most = self.restarts.window_s, self.restarts.most
        last = f"it ended with {_ending(code)}"
        reason = f"{last} after {most} restarts within {window_s:.0f} s" if most else f"{last} and kept no journal"
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
