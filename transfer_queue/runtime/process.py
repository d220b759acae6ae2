"""A child process with one server in it: `python -m transfer_queue.runtime.process`, started by a supervisor.

The supervisor writes one line of JSON to the standard input, never to the command line, for it holds the token. The
child answers with one line on its standard output, `{"ready": …}` or `{"error": …}`, and serves. It ends

- when the standard input ends, or the supervisor is dead: the session is over, and its files go away
- at SIGTERM: what was asked is answered, and all that a successor needs stays

with exit code 0 both times. SIGINT is for the supervisor to see. Imports neither torch nor ray.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from typing import Any

from transfer_queue import environment
from transfer_queue.errors import to_wire
from transfer_queue.ledger import Ledger
from transfer_queue.messages import ProcessId
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.unit_server import UnitServer
from transfer_queue.samplers.description import make
from transfer_queue.samplers.registry import SamplerLike
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.descriptors import raise_descriptor_limit
from transfer_queue.wire.holders import from_record, is_alive

_INPUT, _OUTPUT, _ERRORS = 0, 1, 2
_LOOK_AFTER_SUPERVISOR_S = 2.0  # a forked process may hold the other end of the input


def main() -> int:
    """Serve as told; returns the exit code."""
    raise_descriptor_limit()
    asked = Bell()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: asked.ring())
    replies = os.dup(_OUTPUT)
    os.dup2(_ERRORS, _OUTPUT)  # what user code prints must not fill a pipe that nobody reads
    order = json.loads(_read_line())
    try:
        environment.set_logging_level()
        server = _start(order)
    except BaseException as error:
        _reply(replies, {"error": to_wire(error)[:2]})
        return 1
    _reply(replies, {"ready": server.info.to_record() if isinstance(server, ControllerServer) else {}})
    if _wait(asked, from_record(order["supervisor"])):
        server.leave()
    else:
        server.close()
    return 0


def _start(order: dict[str, Any]) -> ControllerServer | UnitServer:
    supervisor = from_record(order["supervisor"])
    if order["role"] == "controller":
        sampler = _sampler(order["sampler"], order["import_path"])
        ledger = Ledger(sampler=sampler, **order["ledger"])
        return ControllerServer(ledger, supervisor=supervisor, **order["server"])
    controller = ZMQServerInfo.from_record(order["controller"])
    return UnitServer(controller, supervisor=supervisor, **order["server"])


def _sampler(described: Any, import_path: list[str]) -> SamplerLike:
    if not isinstance(described, str):
        sys.path[:] = import_path
    return make(described)


def _read_line() -> bytes:
    line = b""
    while not line.endswith(b"\n") and (more := os.read(_INPUT, 1 << 16)):
        line += more
    return line


def _reply(descriptor: int, record: dict[str, Any]) -> None:
    with open(descriptor, "w") as file:
        file.write(json.dumps(record) + "\n")


def _wait(asked: Bell, supervisor: ProcessId) -> bool:
    """Return when this process has to end: True, another may take its place; False, the session is over."""
    while True:
        ready, _, _ = select.select([_INPUT, asked.fd], [], [], _LOOK_AFTER_SUPERVISOR_S)
        if _INPUT in ready or not is_alive(supervisor):
            return False
        if asked.fd in ready:
            return True


if __name__ == "__main__":
    sys.exit(main())
