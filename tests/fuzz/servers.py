"""A controller and a storage unit in a process of their own, which this module is when it is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from transfer_queue.ledger import Ledger
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.unit_server import UnitServer
from transfer_queue.wire.descriptors import raise_descriptor_limit

ROOT = Path(__file__).parents[2]


class Servers:
    """The process, as a test holds it. A context manager."""

    def __init__(self, *before: str) -> None:
        """`before`: words of a command line that come before that of the process."""
        command = [*before, sys.executable, "-m", "tests.fuzz.servers"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        record = self._read()
        self.controller = ZMQServerInfo.from_record(record["controller"])
        self.token = self.controller.token
        self.addresses = {
            ("controller", "unix"): self.controller.local_address,
            ("controller", "tcp"): self.controller.to_addr("request"),
            ("unit", "unix"): record["unit"][0],
            ("unit", "tcp"): record["unit"][1],
        }

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.stdout.close()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def resident_bytes(self) -> int:
        """Memory of the process without the arenas, which are files."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return 1024 * sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def counters(self) -> dict[str, dict[str, int]]:
        """What the servers counted: {server: {counter: number}}."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        counted: dict[str, dict[str, int]] = self._read()
        return counted

    def _read(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def _say(thing: Any) -> None:
    sys.stdout.write(json.dumps(thing) + "\n")
    sys.stdout.flush()


def _serve() -> None:
    raise_descriptor_limit()
    with ControllerServer(Ledger(), host="127.0.0.1", journal=True) as controller:
        unit = UnitServer(
            controller.info, unit_id="unit", host="127.0.0.1", capacity_bytes=64 << 20, arena_bytes=16 << 20
        )
        _say({"controller": controller.info.to_record(), "unit": [unit.info.local_address, unit.info.address]})
        served = {"controller": controller._server, "unit": unit._server}
        for _ in sys.stdin:
            names = ("malformed", "auth_failures", "failures")
            _say({name: {each: getattr(server, each) for each in names} for name, server in served.items()})
        unit.close()


if __name__ == "__main__":
    _serve()
