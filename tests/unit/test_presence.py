"""Clients that are gone: told once, at once if their process is dead, else after a grace period; never too early."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder, draw
from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import ListPartitions
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.presence import Presence
from transfer_queue.wire.security import Gate, Introduction
from transfer_queue.wire.server import Server


class Clock:
    """Time and processes as a test says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.dead: set[int] = set()
        self.presence = Presence(grace_s=2.0, clock=lambda: self.now, lives=lambda pid: pid not in self.dead)


def test_a_client_is_gone_when_its_last_connection_ended() -> None:
    """After the grace period, once; while one connection is left it is there."""
    clock = Clock()
    presence = clock.presence
    presence.come("c", 1)
    presence.come("c", 2)
    presence.leave("c", 1, 7)
    assert presence.due_s() is None
    presence.leave("c", 2, 7)
    clock.now += 1.9
    assert presence.take_gone() == []
    assert presence.due_s() is not None
    clock.now += 0.2
    assert presence.take_gone() == ["c"]
    assert presence.take_gone() == []
    assert presence.due_s() is None


def test_a_client_that_returns_is_not_gone() -> None:
    """A new connection within the grace period is the client's return; leaving again starts the period anew."""
    clock = Clock()
    presence = clock.presence
    presence.come("c", 1)
    presence.leave("c", 1, 7)
    clock.now += 1.9
    presence.come("c", 2)
    clock.now += 1.0
    assert presence.take_gone() == []
    presence.leave("c", 2, 7)
    clock.now += 1.0
    assert presence.take_gone() == []


def test_a_dead_process_is_not_waited_for() -> None:
    """Neither when it was dead already, nor when it dies a moment after its connection ended."""
    clock = Clock()
    presence = clock.presence
    for name, pid in (("a", 1), ("b", 2), ("unknown", 0)):
        presence.come(name, name)
        presence.leave(name, name, pid)
    clock.dead.add(1)
    assert presence.take_gone() == ["a"]
    clock.dead.add(2)
    assert presence.take_gone() == []  # not looked at in every turn of the server
    clock.now += 0.1
    assert presence.take_gone() == ["b"]
    assert presence.take_gone() == []


def test_what_is_not_watched_any_more_is_not_missed() -> None:
    """A connection that had to make room in a table may be there or not."""
    clock = Clock()
    presence = clock.presence
    presence.come("c", 1)
    assert presence.overlook("c", 1)
    presence.leave("c", 1, 7)
    assert not presence.overlook("c", 1)
    assert presence.due_s() is None
    assert presence.connections("c") == ()


def test_a_gate_tells_who_came_and_who_left() -> None:
    """Only proved connections count, and starting over is no absence once the token is proved again."""
    gate, client = Gate(TOKEN), Introduction(TOKEN, "c")
    challenge = gate.receive(b"1", [client.hello()])
    assert gate.presence.connections("c") == ()
    gate.receive(b"1", [client.receive(challenge) or b""])
    assert gate.presence.connections("c") == (b"1",)
    gate.receive(b"1", [client.hello()])
    assert gate.presence.connections("c") == ()
    assert gate.presence.due_s() is not None
    gate.forget(b"stranger", 1)


def test_an_identity_that_made_room_is_not_watched() -> None:
    """The table of identities is bounded; whoever fell out of it is not missed."""
    gate = Gate(TOKEN, known=1)
    for name in ("c", "d"):
        client = Introduction(TOKEN, name)
        gate.receive(name, [client.receive(gate.receive(name, [client.hello()])) or b""])
    assert gate.presence.connections("c") == ()
    assert gate.presence.connections("d") == ("d",)
    assert gate.presence.due_s() is None


# ---------------------------------------------------------------- in a server


def in_child(address: str) -> tuple[int, int]:
    """Fork a process with an introduced connection that waits for a draw; return its id and what tells it is there."""
    inlet, outlet = os.pipe()
    child = os.fork()
    if child == 0:
        client = BareClient(address, "child/1").introduce()
        client.send(draw(), 1)
        os.write(outlet, b"!")
        time.sleep(WAIT_S)
        os._exit(0)
    os.close(outlet)
    return child, inlet


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_client_is_gone(handler: Recorder, server: Server, address: str) -> None:
    """On the same host at once, over TCP after the grace period if it holds something; what it waited for before."""
    handler.holders = {"child/1"}
    child, inlet = in_child(address)
    handler.wait_for(lambda: handler.tickets)
    server._desk.gate.presence._grace_s = 0.2 if address.startswith("tcp") else 60.0
    begin = time.monotonic()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(inlet)
    handler.wait_for(lambda: handler.gone_clients)
    assert time.monotonic() - begin < (3.0 if address.startswith("tcp") else 1.0)
    assert handler.gone_clients == ["child/1"]
    assert handler.lost_replies == [(handler.tickets[0], None)]


def test_a_client_that_ended_its_connections_is_gone(handler: Recorder, server: Server, address: str) -> None:
    """Its process lives, so it gets a moment; one that has another connection, or made a new one, is there."""
    presence = server._desk.gate.presence
    presence._grace_s = 0.3
    handler.holders = {"leaves/1", "stays/1", "returns/1"}
    with BareClient(address, "stays/1") as stays:
        stays.introduce()
        with BareClient(address, "leaves/1") as leaves, BareClient(address, "stays/1") as second:
            leaves.introduce()
            second.introduce()
            with BareClient(address, "returns/1") as returns:
                returns.introduce()
            returned = BareClient(address, "returns/1").introduce()
        handler.wait_for(lambda: handler.gone_clients)
        stays.ask(ListPartitions(), 1)
        returned.ask(ListPartitions(), 1)
        assert handler.gone_clients == ["leaves/1"]
        returned.__exit__()


def test_a_holder_that_does_not_read_is_there(handler: Recorder, server: Server, address: str) -> None:
    """Being looked at each second fills nobody's socket, and never counts as absence."""
    presence = server._desk.gate.presence
    presence._grace_s = 0.0
    handler.holders = {"bare/1", "never seen/1"}
    with BareClient(address) as client:
        client.introduce()
        for _ in range(3000):
            server._post(lambda: server._desk._look_for("bare/1"))
        assert client.ask(ListPartitions(), 1).names == ("bare/1",)
        assert presence.connections("bare/1") != ()
        assert handler.gone_clients == []


# ---------------------------------------------------------------- in process


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_local_peer_is_gone_when_it_is_closed(handler: Recorder) -> None:
    """Once; in a forked child nothing happens, because the client lives on in the parent."""
    peer = LocalPeer(handler, "c")
    child = os.fork()
    if child == 0:
        peer.close()
        os._exit(len(handler.gone_clients))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    peer.close()
    peer.close()
    assert handler.gone_clients == [peer.name]
    with pytest.raises(ConnectionLost):
        peer.begin(ListPartitions())
