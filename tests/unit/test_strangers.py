"""Connections that prove nothing end, make room, and cost little."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder
from transfer_queue.messages import ListPartitions
from transfer_queue.wire import strangers
from transfer_queue.wire.server import Server


def ended(connected: socket.socket) -> bool:
    """Whether the other end closes within the time of a test, whatever it says before."""
    connected.settimeout(WAIT_S)
    with contextlib.suppress(ConnectionResetError):
        while connected.recv(1 << 16):
            pass
    return True


@contextlib.contextmanager
def connections(server: Server, kind: str, count: int) -> Iterator[list[socket.socket]]:
    """Connections that say nothing."""
    with contextlib.ExitStack() as closing:
        made = []
        for _ in range(count):
            family = socket.AF_UNIX if kind == "unix" else socket.AF_INET
            made.append(closing.enter_context(socket.socket(family)))
            host, port = server.address.removeprefix("tcp://").split(":")
            made[-1].connect(server.local_address.removeprefix("unix://") if kind == "unix" else (host, int(port)))
        yield made


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_connection_that_proves_nothing_is_ended(monkeypatch: pytest.MonkeyPatch, server: Server, kind: str) -> None:
    """After ten seconds (here less); one that proved the token stays."""
    address = server.local_address if kind == "unix" else server.address
    with BareClient(address) as client:
        client.introduce()
        monkeypatch.setattr(strangers, "PROVE_WITHIN_S", 0.1)
        with connections(server, kind, 2) as silent:
            assert all(map(ended, silent))
        assert client.ask(ListPartitions(), 1).names == ("bare/1",)


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_many_strangers_make_room_for_clients(
    monkeypatch: pytest.MonkeyPatch, handler: Recorder, tmp_path: Path, kind: str
) -> None:
    """The oldest is ended when there are too many (here 8), and a client gets in among them."""
    for name, value in (("MOST_STRANGERS", 8), ("YOUNG_S", 0.1)):
        monkeypatch.setattr(strangers, name, value)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (16, 16))
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as server:
        address = server.local_address if kind == "unix" else server.address
        with connections(server, kind, 12) as silent:
            assert ended(silent[0])
            with BareClient(address) as client:
                assert client.introduce().ask(ListPartitions(), 1).names == ("bare/1",)


def test_a_stranger_over_tcp_may_send_little(server: Server) -> None:
    """Frames without end, which ZeroMQ would keep until the message is complete, end the connection."""
    before = resident_bytes()
    more = struct.pack("!BQ", 0x03, 1 << 20) + b"x" * (1 << 20)  # a frame of 1 MiB, and others follow
    with connections(server, "tcp", 1) as [flooding]:
        flooding.settimeout(WAIT_S)
        flooding.sendall(b"\xff" + b"\0" * 8 + b"\x7f\3\0NULL".ljust(54, b"\0"))
        flooding.sendall(b"\4\x1a\5READY\13Socket-Type\0\0\0\6DEALER")
        with pytest.raises(ConnectionError):
            flooding.sendall(more * 100)
    assert resident_bytes() - before < 50 << 20
    with BareClient(server.address) as client:
        assert client.introduce().ask(ListPartitions(), 1).names == ("bare/1",)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
