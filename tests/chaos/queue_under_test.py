"""A session with servers that a test can kill at a step, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from tests.chaos.armed import CONTROL
from tests.chaos.clock import CLOCK
from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.errors import StaleSampleError
from transfer_queue.messages import UNIT_SHIFT, GetUnitStats, Report
from transfer_queue.runtime import supervisor
from transfer_queue.runtime.processes import ProcessesRuntime
from transfer_queue.runtime.supervisor import Child
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.holders import identify, is_alive

WAIT_S = 60.0
BEACON = "beacon"

_SHARED_MEMORY = Path("/dev/shm")
_USUAL_MAIN, _ARMED_MAIN = "transfer_queue.runtime.process", "tests.chaos.armed"


def wait_until(holds: Callable[[], Any], what: str, wait_s: float = WAIT_S) -> None:
    """Wait for what other processes do; raises `TimeoutError` that names it."""
    deadline = time.monotonic() + wait_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {wait_s:.0f} s in vain: {what}")
        time.sleep(0.005)


class QueueUnderTest:
    """Controller and units in processes with tripwires, started again without limit, and a client to look at them."""

    def __init__(self, control: Path, conf: dict[str, Any], said: Path | None = None) -> None:
        """`said`: a file for what the servers say; None: they say it where this process does."""
        self._others = set(_own_folders())  # of a session that this process has beside this one
        self.control = control
        self._patches = ExitStack()
        self._patches.enter_context(mock.patch.dict(os.environ, {CONTROL: str(control), CLOCK: "1"}))
        self._patches.enter_context(mock.patch.object(supervisor, "subprocess", _armed_subprocess(said)))
        try:
            self.runtime = ProcessesRuntime(settings(merged({"runtime": "processes", **conf})))
        except BaseException:
            self._patches.close()
            raise
        for child in self.runtime.children:
            child.restarts.window_s = 0.0  # chaos kills more often than the limit would let pass
        self.client = TransferQueueClient("driver", self.runtime.info, checksums=bool(conf.get("checksums")))
        self._beacons = self._light_beacons()

    def __enter__(self) -> QueueUnderTest:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def names(self) -> list[str]:
        """Of the servers."""
        return [child.name for child in self.runtime.children]

    def child(self, name: str) -> Child:
        return next(child for child in self.runtime.children if child.name == name)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Send a signal to a server and wait until that process is dead."""
        pid = self.child(name).pid
        process = identify(pid)
        os.kill(pid, number)
        wait_until(lambda: process is None or not is_alive(process), f"the end of {name}")

    def pause(self, name: str, pause_s: float) -> None:
        """Stop a server for a while."""
        pid = self.child(name).pid
        os.kill(pid, signal.SIGSTOP)
        try:
            time.sleep(pause_s)
        finally:
            os.kill(pid, signal.SIGCONT)

    def first_call(self, name: str) -> None:
        """Return when this server has served a call."""
        if name == "controller":
            self.client.get_partition_list()
        else:
            try:
                self.client.get_data(self._beacons[name])
            except StaleSampleError:  # a checkpoint was loaded
                self._beacons = self._light_beacons()

    def recover(self, name: str) -> tuple[float, float]:
        """Kill a server. Return the seconds until the first call was served, and how many of them came after loading.

        What comes before is the restart itself: noticing the death, starting Python, importing the library.
        """
        began = time.monotonic()
        self.kill(name)
        self.first_call(name)
        ended = time.monotonic()
        self.settle(name)
        loaded = float(json.loads((self.control / f"loaded-{name}").read_text()))
        assert began < loaded < ended, "the call was served by the successor"
        return ended - began, ended - loaded

    def settle(self, name: str) -> None:
        """Wait until the successor of a dead server runs and serves."""
        wait_until(lambda: self.child(name).state == "running", f"{name} runs again")
        self.first_call(name)

    # ------------------------------------------------------------ files that servers look at

    def arm(self, name: str, kind: str, number: int) -> None:
        """The server kills itself at the `number`-th step of this kind from now."""
        _replace(self.control / f"trip-{name}", {"kind": kind, "number": number})

    def disarm(self, name: str) -> bool:
        """Return whether it had not come to that."""
        try:
            (self.control / f"trip-{name}").unlink()
        except FileNotFoundError:
            return False
        return True

    def fill_disk(self, name: str, full: bool) -> None:
        path = self.control / f"full-{name}"
        if full:
            path.touch()
        else:
            path.unlink(missing_ok=True)

    def fail_writes(self, name: str, number: int | None) -> None:
        """The unit raises at the `number`-th request to write from now, and at all later ones; None: no more."""
        path = self.control / f"fail-{name}"
        if number is None:
            path.unlink(missing_ok=True)
        else:
            _replace(path, {"kind": "write", "number": number})

    # ------------------------------------------------------------ bytes

    def figures(self) -> dict[str, dict[str, int]]:
        """How each unit uses its bytes, by its name."""
        found = {}
        for info in self.client.storage_infos().values():
            peer = Peer.at(info.local_address, token=self.runtime.info.token, client_id="figures")
            try:
                reply = peer.begin(GetUnitStats()).result(20.0)
                assert isinstance(reply, Report)
                found[info.id] = dict(reply.entries)
            finally:
                peer.close()
        return found

    def held_bytes(self, wait_s: float = 20.0) -> dict[str, int]:
        """Clear everything; return the bytes that units still count as used after a while, by their names."""
        for partition in self.client.get_partition_list():
            self.client.clear_partition(partition)
        deadline = time.monotonic() + wait_s
        while True:
            held = {name: found["bytes_live"] + found["bytes_pinned"] for name, found in self.figures().items()}
            if not any(held.values()) or time.monotonic() > deadline:
                return held
            time.sleep(0.1)

    # ------------------------------------------------------------ the end

    def close(self) -> list[str]:
        """End the session; return what it left in shared memory and which of its processes still run."""
        pids = {child.name: identify(child.pid) for child in self.runtime.children}
        self.client.close()
        self.runtime.close()
        self._patches.close()
        alive = [f"process of {name}" for name, process in pids.items() if process is not None and is_alive(process)]
        return alive + [str(path) for path in _own_folders() if path not in self._others]

    def _light_beacons(self) -> dict[str, Any]:
        """A sample at each unit, by the unit's name, so that a read is a call to it."""
        self.client.clear_partition(BEACON)
        found: dict[str, Any] = {}
        units = {name for name in self.names if name != "controller"}
        numbers = {info.id: number for number, info in enumerate(self.client.storage_infos().values(), 1)}
        names = {number: name for name, number in numbers.items()}
        for sequence in range(200):
            if units <= set(found):
                break
            meta = self.client.put({"x": torch.full((1, 64), sequence)}, partition_id=BEACON)
            found.setdefault(names[int(meta.locations[0].blocks[0]) >> UNIT_SHIFT], meta)
        return found


def _replace(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps(content))
    partial.rename(path)


def _own_folders() -> list[Path]:
    """What this process, or servers that it started, have in shared memory now; nothing of other runs beside it."""
    found = []
    for path in _SHARED_MEMORY.glob(f"tq-{os.getuid()}-*"):
        with suppress(OSError, ValueError):
            owners = json.loads((path / "owner").read_text())
            if os.getpid() in {owners["pid"], (owners.get("supervisor") or owners)["pid"]}:
                found.append(path)
    return found


def _armed_subprocess(said: Path | None) -> Any:
    """The module `subprocess` as the supervisor sees it, which starts the armed main of a server."""

    class Popen(subprocess.Popen[bytes]):
        def __init__(self, arguments: list[str], **kwargs: Any) -> None:
            armed = [_ARMED_MAIN if part == _USUAL_MAIN else part for part in arguments]
            with said.open("ab") if said is not None else nullcontext() as errors:
                super().__init__(armed, stderr=errors, **kwargs)

    return SimpleNamespace(Popen=Popen, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
