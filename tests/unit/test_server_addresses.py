"""Where a server listens: private, released when it ends, and refused with a reason."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.unit.serving import (
    TOKEN,
    BareClient,
    Recorder,
)
from transfer_queue.errors import ConnectionLost, InvalidArgument
from transfer_queue.messages import (
    ListPartitions,
)
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.doors import Watch
from transfer_queue.wire.security import Gate
from transfer_queue.wire.server import Server
from transfer_queue.wire.tcp import TcpDoor


def test_the_socket_file_is_private(server: Server, tmp_path: Path) -> None:
    """Only its user may connect to the local socket."""
    assert server.local_address == f"unix://{tmp_path / 'socket'}"
    assert stat.S_IMODE((tmp_path / "socket").stat().st_mode) == 0o600


def test_the_port_is_not_one_for_outgoing_connections(server: Server) -> None:
    """So that it can be kept over a restart; and nothing listens beyond the host by default."""
    host, port = server.address.removeprefix("tcp://").split(":")
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert host == "127.0.0.1"
    assert not low <= int(port) <= high


def test_a_socket_that_cannot_be_watched_leaves_no_file(
    handler: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the server had never been: no file that clients would wait at, and the next one starts."""
    path = str(tmp_path / "socket")
    add = Watch.add

    def fail(watch: Watch, fd: int, ready: Any) -> None:
        if os.path.exists(path):
            raise OSError(errno.ENOSPC, "too many watches")
        add(watch, fd, ready)

    with monkeypatch.context() as short:
        short.setattr(Watch, "add", fail)
        with pytest.raises(ConnectionLost, match="too many watches"):
            Server(handler, TOKEN, local_path=path, tcp_host=None)
    assert not os.path.exists(path)
    Server(handler, TOKEN, local_path=path, tcp_host=None).close()


def test_tcp_and_unix_can_be_left_out(handler: Recorder, tmp_path: Path) -> None:
    """An address that is not asked for is empty."""
    with Server(handler, TOKEN, local_path=None) as server:
        assert server.local_address == ""
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket"), tcp_host=None) as server:
        assert server.address == ""


def test_a_path_too_long_for_a_socket_is_refused(handler: Recorder, tmp_path: Path) -> None:
    """The error says how long it is and how long it may be."""
    path = str(tmp_path / ("x" * 100))
    with pytest.raises(InvalidArgument, match=rf"{len(path)} bytes.*100"):
        Server(handler, TOKEN, local_path=path)


@pytest.mark.parametrize("fault", ["busy port", "missing folder", "foreign host"])
def test_what_cannot_be_bound_is_named(handler: Recorder, server: Server, tmp_path: Path, fault: str) -> None:
    """The error says which address was tried."""
    port = int(server.address.rpartition(":")[2])
    missing = str(tmp_path / "none" / "socket")
    arguments = {
        "busy port": (None, "127.0.0.1", port, str(port)),
        "missing folder": (missing, None, 0, missing),
        "foreign host": (None, "192.0.2.1", 0, "192.0.2.1"),
    }
    path, host, tcp_port, named = arguments[fault]
    with pytest.raises(ConnectionLost, match=named):
        Server(handler, TOKEN, local_path=path, tcp_host=host, tcp_port=tcp_port)


@pytest.mark.parametrize("stage", ["busy port", "Strangers", "Watch.add", "curve"])
def test_a_door_that_is_half_made_leaves_nothing(
    handler: Recorder, server: Server, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever raises while it is made: no socket, no thread of ZeroMQ, no descriptor."""
    watch, gate = Watch(), Gate(TOKEN)
    port = int(server.address.rpartition(":")[2]) if stage == "busy port" else 0
    curve = CurveKeys("no key", "no key") if stage == "curve" else None
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    with monkeypatch.context() as patch:
        if stage == "Strangers":
            patch.setattr("transfer_queue.wire.strangers._EVENTS", "not a number")
        elif stage == "Watch.add":
            patch.setattr(watch, "add", _once(watch.add))
        for _ in range(3):
            with pytest.raises((ConnectionLost, OSError, TypeError, InvalidArgument, zmq.ZMQError)):
                TcpDoor("127.0.0.1", port, watch, lambda channel, frames: None, gate, curve)
            assert watch._ready == {}
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before
    watch.close()


def _once(function: Callable[..., None]) -> Callable[..., None]:
    """The function fails every second time."""
    calls: list[int] = []

    def called(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) % 2 == 0:
            raise OSError("no memory for another descriptor")
        function(*arguments)

    return called


def test_a_port_can_be_taken_over_at_once(handler: Recorder) -> None:
    """After close the same address is free again."""
    with Server(handler, TOKEN, local_path=None) as server:
        address = server.address
    port = int(address.rpartition(":")[2])
    for _ in range(5):
        with Server(handler, TOKEN, local_path=None, tcp_port=port) as server, BareClient(address) as client:
            assert server.address == address
            assert client.introduce().ask(ListPartitions(), 1).names == ("bare/1",)
