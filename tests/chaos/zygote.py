"""Starts the workload's processes quickly: one process has loaded everything, and forks for each order.

It reads orders as lines of JSON and writes lines of JSON: `{"pid": …}` for each order, `{"ended": pid, "status": …}`
for each child that ended. It ends, and its children with it, when its input ends.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path
from queue import Queue
from typing import Any

from tests.chaos.actor import act
from tests.chaos.clock import CLOCK, arm_clock
from tests.chaos.forking import fork_in_calls
from tests.chaos.roles import Order, work

ENTRIES = {"actor": act, "forker": fork_in_calls}  # all other roles: `work`

_ROOT = Path(__file__).parents[2]
_WAIT_S = 60.0


class Zygote:
    """The driver's side. `ended` maps process ids to exit statuses (negative: a signal) as they become known."""

    def __init__(self) -> None:
        self.ended: dict[int, int] = {}
        self._started: Queue[int] = Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what a process dies of is in a file beside its log
            cwd=_ROOT,
            env={**os.environ, CLOCK: "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self._thread = threading.Thread(target=self._listen, name="chaos zygote", daemon=True)
        self._thread.start()

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def start(self, order: Order) -> int:
        """Start a process; return its id."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
        self._process.stdin.flush()
        return self._started.get(timeout=_WAIT_S)

    def close(self) -> None:
        """End all processes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(_WAIT_S)
        self._thread.join()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                told = json.loads(line)
                if "pid" in told:
                    self._started.put(told["pid"])
                else:
                    self.ended[told["ended"]] = told["status"]


def main() -> None:
    """Fork for each order until the input ends."""
    wake, bell = os.pipe()
    os.set_blocking(bell, False)
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(bell)
    living: set[int] = set()
    rest = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            _reap(living)
        if 0 in ready:
            data = os.read(0, 1 << 16)
            if not data:
                break
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                pid = _fork(json.loads(line))
                living.add(pid)
                _tell({"pid": pid})
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    for pid in living:
        os.waitpid(pid, 0)


def _fork(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(2, 1)
        told = Order(**order)
        arm_clock(Path(told.control))
        ENTRIES.get(told.role, work)(told)
        code = 0
    except BaseException:
        (Path(order["logs"]) / f"{Order(**order).name}.error").write_text(traceback.format_exc())
    finally:
        os._exit(code)
    return 0


def _reap(living: set[int]) -> None:
    for pid in list(living):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            living.discard(pid)
            _tell({"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _tell(message: dict[str, Any]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main()
