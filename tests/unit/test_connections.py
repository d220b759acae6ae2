"""Connections over Unix sockets in rough weather: bursts, floods, deadlines, orphans, no descriptors, no readers."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder, announce, draw, frees_done
from transfer_queue.errors import InvalidArgument
from transfer_queue.messages import Draw, GetAudit, ListPartitions, Request, Unpin
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.link import Link
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket


@contextlib.contextmanager
def serving(handler: Recorder, path: Path) -> Iterator[Server]:
    with Server(handler, TOKEN, local_path=str(path / "socket"), tcp_host=None) as server:
        yield server


def test_a_burst_arrives_whole_although_its_sender_left(tmp_path: Path) -> None:
    """What was sent before a connection ends is done, however much it is."""
    handler = Recorder()
    with serving(handler, tmp_path) as server:
        with BareClient(server.local_address) as client:
            client.introduce()
            for number in range(100):
                client.line.send(encode_message(frees_done(number)), hold=True)
            client.line.flush()
        handler.wait_for(lambda: len(handler.requests) == 100)


def test_more_than_one_batch_of_pushes_is_taken_at_once(tmp_path: Path) -> None:
    """A listener does not wait for further input while it has some."""
    handler = Recorder()
    bell = Bell()
    pushed: list[float] = []
    with serving(handler, tmp_path) as server:
        link = Link(server.local_address, TOKEN, "c/1", bell_fd=bell.fd, on_push=lambda _: pushed.append(0.0))
        link.post(1, encode_message(announce(), 1, 1), lambda answer: None)
        while not handler.tickets:
            link.wait(0.1)
        for number in range(700):
            server.push(handler.tickets[0].channel, Unpin(pin=number))
        begin = time.monotonic()
        while len(pushed) < 700 and time.monotonic() - begin < WAIT_S:
            link.wait(5.0)
        assert time.monotonic() - begin < 1.0
        link.close()
    bell.close()


class Punctual(Recorder):
    """Ends a draw after 0.1 s."""

    def __init__(self) -> None:
        super().__init__()
        self.due_at = float("inf")

    def submit(self, request: Request, ticket: Ticket) -> None:
        super().submit(request, ticket)
        if isinstance(request, Draw):
            self.due_at = time.monotonic() + 0.1

    def tick(self) -> float | None:
        left_s = self.due_at - time.monotonic()
        if left_s <= 0:
            self.due_at = float("inf")
            self.tickets[-1].answer(InvalidArgument("too late"))
        return None if left_s == float("inf") else max(left_s, 0.0)


@pytest.mark.parametrize("before", [0, 5, 7, 8, 12, 40])
def test_a_deadline_behind_a_burst_is_kept(tmp_path: Path, before: int) -> None:
    """Requests that wait for their turn do not make the server forget what is due."""
    with serving(Punctual(), tmp_path) as server, BareClient(server.local_address) as client:
        client.introduce()
        for number in range(before):
            client.line.send(encode_message(frees_done(number)), hold=True)
        client.line.send(encode_message(draw(), 1, 1), hold=True)
        begin = time.monotonic()
        client.line.flush()
        assert client.receive()[0] == 1
        assert time.monotonic() - begin < 1.0


def test_a_flood_of_a_stranger_takes_no_memory_and_little_time(tmp_path: Path) -> None:
    """The server reads no more than it has time to look at, and the others have their turns."""
    with serving(Recorder(), tmp_path) as server, socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(tmp_path / "socket"))
        stranger.settimeout(0.2)
        flood = (struct.pack("<2I", 1, 1) + b"x") * 20_000
        begin = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 0.5:
                stranger.send(flood)
        assert server._unix is not None
        assert all(len(visitor.stream._data) <= 1 << 17 for visitor in server._unix._visitors.values())
        begin = time.monotonic()
        with BareClient(server.local_address) as client:
            assert client.introduce().ask(GetAudit(partition_id="x"), 1).entries == {"asked": "x"}
        assert time.monotonic() - begin < 2.0


class Slow(Recorder):
    """Takes its time for the first request."""

    def submit(self, request: Request, ticket: Ticket) -> None:
        if not self.requests:
            time.sleep(0.7)
        super().submit(request, ticket)


def test_one_way_messages_leave_without_a_later_call(tmp_path: Path) -> None:
    """Also if the server could not take them at once."""
    handler = Slow()
    with serving(handler, tmp_path) as server:
        peer = Peer.at(server.local_address, token=TOKEN, client_id="c")
        for number in range(3000):
            peer.notify(frees_done(number))
        handler.wait_for(lambda: len(handler.requests) == 3000)
        peer.close()


def test_what_a_dead_process_sent_is_taken_first(tmp_path: Path) -> None:
    """Its connection, which a forked child of it still holds, ends when nothing is left to read."""
    handler = Slow()
    inlet = os.pipe()
    with serving(handler, tmp_path) as server:
        client_pid = os.fork()
        if client_pid == 0:
            client = BareClient(server.local_address).introduce()
            for number in range(1000):
                client.line.send(encode_message(frees_done(number)), hold=True)
            client.line.flush()
            while client.line.sending:
                client.line.flush()
            orphan = os.fork()
            if orphan == 0:
                time.sleep(30)
            os.write(inlet[1], str(orphan).encode())
            os._exit(0)
        os.waitpid(client_pid, 0)
        server._next_ping = 0.0
        handler.wait_for(lambda: len(handler.requests) == 1000)
        server._next_ping = 0.0
        server.wake()
        begin = time.monotonic()
        while server._unix._visitors:  # type: ignore[union-attr]
            assert time.monotonic() - begin < WAIT_S
            time.sleep(0.01)
    os.kill(int(os.read(inlet[0], 100)), signal.SIGKILL)
    os.close(inlet[0])
    os.close(inlet[1])


def test_a_connection_that_an_orphan_holds_is_given_up(tmp_path: Path) -> None:
    """A forked child of a killed server keeps its sockets open; a new server at the same path is found all the same."""
    address, inlet = tmp_path / "socket", os.pipe()
    server_pid = os.fork()
    if server_pid == 0:  # a server with a child that outlives it
        Server(Recorder(), TOKEN, local_path=str(address), tcp_host=None).start()
        time.sleep(0.5)
        orphan = os.fork()
        if orphan:
            os.write(inlet[1], str(orphan).encode())
        time.sleep(30)
        os._exit(0)
    peer = Peer.at(f"unix://{address}", token=TOKEN, client_id="c")
    try:
        assert peer.begin(ListPartitions()).result(WAIT_S)
        orphan = int(os.read(inlet[0], 100))
        os.kill(server_pid, signal.SIGKILL)
        os.waitpid(server_pid, 0)
        with serving(Recorder(), tmp_path):
            assert peer.begin(ListPartitions()).result(WAIT_S)
        os.kill(orphan, signal.SIGKILL)
    finally:
        peer.close()
        os.close(inlet[0])
        os.close(inlet[1])


def test_a_server_without_descriptors_listens_again_later(tmp_path: Path) -> None:
    """No connection can be accepted while none is left; nobody has to leave before the next one comes."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(Recorder(), tmp_path) as server, socket.socket(socket.AF_UNIX) as refused:
        in_use = max(map(int, os.listdir("/proc/self/fd"))) + 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (in_use, before[1]))
        held = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    held.append(os.open("/dev/null", os.O_RDONLY))
            refused.connect(str(tmp_path / "socket"))
            begin = time.monotonic()
            while not server._unix.paused:  # type: ignore[union-attr]
                assert time.monotonic() - begin < WAIT_S
                time.sleep(0.01)
        finally:
            for descriptor in held:
                os.close(descriptor)
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        with BareClient(server.local_address) as client:
            assert client.introduce().ask(ListPartitions(), 1).names == ("bare/1",)


def test_clients_that_do_not_read_hold_up_no_shutdown(tmp_path: Path) -> None:
    """All of them together get a moment to take what is left."""
    handler = Recorder()
    server = Server(handler, TOKEN, local_path=str(tmp_path / "socket"), tcp_host=None).start()
    clients = [BareClient(server.local_address, f"c/{number}").introduce() for number in range(8)]
    for client in clients:
        client.send(GetAudit(partition_id="y" * 2_000_000), 1)
    deadline = time.monotonic() + WAIT_S
    while len(handler.requests) < len(clients):
        assert time.monotonic() < deadline
        for client in clients:
            client.line.flush()
        time.sleep(0.01)
    begin = time.monotonic()
    server.close()
    assert time.monotonic() - begin < 1.5
    assert not server._thread.is_alive()
    for client in clients:
        client.__exit__()
