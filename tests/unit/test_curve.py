"""Encrypted connections: who has key and token is served, who lacks one is told so."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.serving import TOKEN, WAIT_S, Recorder, announce, draw, drawn, frees_done
from transfer_queue.errors import ConnectionLost, InvalidArgument, NotAuthorized
from transfer_queue.messages import Announced, GetAudit, ListPartitions, Names
from transfer_queue.wire import link
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.server import Server


@pytest.fixture(scope="module")
def keys() -> CurveKeys:
    return CurveKeys.new()


@pytest.fixture
def encrypted(handler: Recorder, keys: CurveKeys) -> Iterator[Server]:
    with Server(handler, TOKEN, local_path=None, curve=keys) as running:
        yield running


def ask(peer: Peer) -> str:
    """Return the name under which the server knows the client, in both faces of the call."""
    blocked, awaited = peer.begin(ListPartitions()).result(WAIT_S), asyncio.run(peer.acall(ListPartitions(), WAIT_S))
    assert isinstance(blocked, Names)
    assert isinstance(awaited, Names)
    assert blocked.names == awaited.names
    return blocked.names[0]


def test_keys_are_never_the_same_and_the_secret_is_not_shown(keys: CurveKeys) -> None:
    """Neither in logs nor in tracebacks."""
    assert CurveKeys.new() != keys
    assert keys.secret not in repr(keys)
    assert keys.public in repr(keys)


def test_an_encrypted_server_serves_who_has_key_and_token(
    encrypted: Server, handler: Recorder, keys: CurveKeys
) -> None:
    """Calls of both faces, one-way messages and a listener work as ever."""
    peer = Peer.at(encrypted.address, token=TOKEN, client_id="c", curve_key=keys.public)
    assert ask(peer).startswith("c/")
    peer.notify(frees_done(1))
    with Listener(peer, announce(), lambda message: None) as listener:
        assert isinstance(listener.announced(WAIT_S), Announced)
    peer.close()
    assert encrypted.auth_failures == 0


def test_what_is_encrypted_cannot_be_read_on_the_way(keys: CurveKeys) -> None:
    """Neither requests nor replies cross the wire in the clear; without keys they do."""
    for curve in (keys, None):
        with Server(Recorder(), TOKEN, local_path=None, curve=curve) as running, relay(running.address) as (port, seen):
            key = "" if curve is None else curve.public
            peer = Peer.at(f"tcp://127.0.0.1:{port}", token=TOKEN, client_id="c", curve_key=key)
            peer.begin(GetAudit(partition_id="a secret of the user")).result(WAIT_S)
            peer.close()
        assert (b"a secret of the user" in bytes(seen)) == (curve is None)


@contextlib.contextmanager
def relay(address: str) -> Iterator[tuple[int, bytearray]]:
    """Hand on what two ends of a TCP connection say to each other, and write it down."""
    seen, host, port = bytearray(), *address.removeprefix("tcp://").split(":")
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(3) as threads:

        def hand_on(source: socket.socket, target: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    seen.extend(data)
                    target.sendall(data)

        def serve() -> None:
            client = listening.accept()[0]
            with client, socket.create_connection((host, int(port))) as server:
                back = threads.submit(hand_on, server, client)
                hand_on(client, server)
                server.shutdown(socket.SHUT_RDWR)
                back.result(WAIT_S)

        serving = threads.submit(serve)
        yield listening.getsockname()[1], seen
        serving.result(WAIT_S)


def test_a_wrong_token_is_refused_over_encrypted_connections_too(encrypted: Server, keys: CurveKeys) -> None:
    """The key alone opens nothing."""
    thief = Peer.at(encrypted.address, token=b"wrong", client_id="thief", curve_key=keys.public)
    with pytest.raises(NotAuthorized, match="token"):
        ask(thief)
    thief.close()
    assert encrypted.auth_failures == 1


@pytest.mark.parametrize("face", ["blocking", "awaitable"])
@pytest.mark.parametrize("case", ["no key", "wrong key", "server without key"])
def test_who_does_not_have_the_key_is_not_authorized(
    monkeypatch: pytest.MonkeyPatch, keys: CurveKeys, case: str, face: str
) -> None:
    """Well before the deadline, with what to do; the server counts and serves others."""
    monkeypatch.setattr(link, "PROBE_AFTER_S", 0.3)
    key = {"no key": "", "wrong key": CurveKeys.new().public, "server without key": keys.public}[case]
    said = {"no key": "curve_key", "wrong key": "one source", "server without key": "does not encrypt"}[case]
    served = None if case == "server without key" else keys
    with Server(Recorder(), TOKEN, local_path=None, curve=served) as server:
        peer = Peer.at(server.address, token=TOKEN, client_id="c", curve_key=key)
        faces = {
            "blocking": lambda: peer.begin(ListPartitions()).result(WAIT_S),
            "awaitable": lambda: asyncio.run(peer.acall(ListPartitions(), WAIT_S)),
        }
        begin = time.monotonic()
        with pytest.raises(NotAuthorized, match=said):
            faces[face]()
        assert time.monotonic() - begin < 5.0
        peer.close()
        deadline = time.monotonic() + WAIT_S
        while not server.auth_failures + server.malformed:
            assert time.monotonic() < deadline, "it was not counted"
            time.sleep(0.01)
        assert (server.malformed > 0) == (case == "server without key")
        other = Peer.at(server.address, token=TOKEN, client_id="c", curve_key="" if served is None else keys.public)
        ask(other)
        other.close()


def test_a_server_that_is_not_there_is_not_taken_for_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch, keys: CurveKeys
) -> None:
    """Also where encryption was asked for, and one that comes later is found."""
    monkeypatch.setattr(link, "PROBE_AFTER_S", 0.05)
    with Server(Recorder(), TOKEN, local_path=None, curve=keys) as server:
        address = server.address
    peer = Peer.at(address, token=TOKEN, client_id="c", curve_key=keys.public, grace_s=0.5)
    with pytest.raises(ConnectionLost, match="no reply"):
        peer.begin(ListPartitions()).result(0.5)
    with Server(Recorder(), TOKEN, local_path=None, curve=keys, tcp_port=int(address.rpartition(":")[2])):
        ask(peer)
    peer.close()


def test_calls_survive_a_restart_under_the_same_keys(handler: Recorder, keys: CurveKeys) -> None:
    """The keys belong to the session, as the port does."""
    server = Server(handler, TOKEN, local_path=None, curve=keys).start()
    peer = Peer.at(server.address, token=TOKEN, client_id="c", curve_key=keys.public)
    pending = peer.begin(draw())
    handler.wait_for(lambda: handler.tickets)
    server.close()
    second = Recorder()
    with (
        Server(second, TOKEN, local_path=None, curve=keys, tcp_port=int(server.address.rpartition(":")[2])),
        ThreadPoolExecutor(1) as threads,
    ):
        answering = threads.submit(
            second.wait_for, lambda: second.tickets and second.tickets[0].answer(drawn(1)) is None
        )
        assert pending.result(WAIT_S).indexes.tolist() == [1]  # type: ignore[union-attr]
        answering.result(WAIT_S)
    peer.close()


@pytest.mark.parametrize("key", ["x", "é" * 40])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    """Before anything is opened."""
    with pytest.raises(InvalidArgument, match="40"):
        Peer.at("tcp://127.0.0.1:1", token=TOKEN, client_id="c", curve_key=key)
