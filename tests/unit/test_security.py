"""Who gets in: the introduction of a connection, frame by frame; encrypted connections; strangers that go too far."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder, announce, draw, drawn, frees_done
from transfer_queue import messages
from transfer_queue.errors import ConnectionLost, DecodeError, InvalidArgument, NotAuthorized, ProtocolMismatch
from transfer_queue.messages import Announced, GetAudit, ListPartitions, Names
from transfer_queue.wire import link, security, strangers
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.security import Gate, Introduction, Kind, new_token, signal
from transfer_queue.wire.server import Server

OTHER = bytes(32)


def introduce(client: Introduction, gate: Gate, identity: bytes = b"1") -> list[bytes]:
    """Exchange frames until neither side has more to say; return all of them."""
    said = [client.hello()]
    answer: bytes | None = said[0]
    while answer is not None:
        said.append(gate.receive(identity, [answer]))
        answer = client.receive(said[-1])
        if answer is not None:
            said.append(answer)
    return said


def test_tokens_are_long_and_never_the_same() -> None:
    """Every session has a secret of its own."""
    assert len(new_token()) == 32
    assert new_token() != new_token()


def test_both_sides_prove_the_token() -> None:
    """After four frames the client is welcome and the server knows whom it talks to."""
    client, gate = Introduction(TOKEN, "reward-1/ab"), Gate(TOKEN)
    said = introduce(client, gate)
    assert [Kind(frame[0]) for frame in said] == [Kind.HELLO, Kind.CHALLENGE, Kind.PROOF, Kind.WELCOME]
    assert client.welcomed
    assert gate.client_of(b"1") == "reward-1/ab"
    assert gate.auth_failures == 0
    assert not any(TOKEN in frame for frame in said)


def test_a_wrong_token_is_refused_and_counted() -> None:
    """The client raises, the server counts and still knows nobody."""
    client, gate = Introduction(OTHER, "c"), Gate(TOKEN)
    with pytest.raises(NotAuthorized, match="token"):
        introduce(client, gate)
    assert gate.auth_failures == 1
    assert gate.client_of(b"1") is None


def test_a_server_that_cannot_prove_the_token_is_not_trusted() -> None:
    """A welcome from somebody else's server raises."""
    client, gate = Introduction(TOKEN, "c"), Gate(OTHER)
    challenge = gate.receive(b"1", [client.hello()])
    client.receive(challenge)
    with pytest.raises(NotAuthorized):
        client.receive(signal(Kind.WELCOME) + challenge[1:33])
    assert not client.welcomed


def test_another_version_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal names the version of the server and of the client."""
    gate = Gate(TOKEN)
    monkeypatch.setattr(security, "PROTOCOL_VERSION", messages.PROTOCOL_VERSION + 41)
    client = Introduction(TOKEN, "c")
    hello = client.hello()
    monkeypatch.undo()
    mismatch = gate.receive(b"1", [hello])
    monkeypatch.setattr(security, "PROTOCOL_VERSION", messages.PROTOCOL_VERSION + 41)
    with pytest.raises(ProtocolMismatch) as refused:
        client.receive(mismatch)
    assert str(messages.PROTOCOL_VERSION) in str(refused.value)
    assert str(messages.PROTOCOL_VERSION + 41) in str(refused.value)


def test_what_a_stranger_sends_is_not_looked_at() -> None:
    """Anything but an introduction is answered by the question who it is."""
    gate = Gate(TOKEN)
    for frames in ([b"M whatever", b"body"], [b""], [b"\xff" * 1000], [signal(Kind.PROBE)], [signal(Kind.PROOF)]):
        assert gate.receive(b"9", frames) == signal(Kind.WHO)
    assert gate.client_of(b"9") is None


def test_a_recorded_introduction_opens_nothing() -> None:
    """Frames of an earlier connection, played back, do not prove anything."""
    gate = Gate(TOKEN)
    hello, _, proof, _ = introduce(Introduction(TOKEN, "c"), gate, b"1")
    gate.receive(b"2", [hello])
    assert gate.receive(b"2", [proof])[0] == Kind.REFUSED
    assert gate.receive(b"2", [proof]) == signal(Kind.WHO)
    assert gate.auth_failures == 1
    assert gate.client_of(b"2") is None


def test_a_proof_of_the_server_is_no_proof_of_a_client() -> None:
    """The labels differ, so a challenge cannot be reflected."""
    gate = Gate(TOKEN)
    challenge = gate.receive(b"1", [Introduction(TOKEN, "c").hello()])
    assert gate.receive(b"1", [signal(Kind.PROOF) + challenge[-32:]])[0] == Kind.REFUSED


def test_answers_to_an_earlier_hello_are_dropped() -> None:
    """A client that started over is not confused by what comes late."""
    client, gate = Introduction(TOKEN, "c"), Gate(TOKEN)
    late = gate.receive(b"1", [client.hello()])
    current = gate.receive(b"1", [client.hello()])
    assert client.receive(late) is None
    proof = client.receive(current)
    assert proof is not None
    welcome = gate.receive(b"1", [proof])
    assert client.receive(welcome) is None
    assert client.welcomed


def test_many_questions_lead_to_one_hello() -> None:
    """A server asks once per frame it does not look at; the client starts over once."""
    client, gate = Introduction(TOKEN, "c"), Gate(TOKEN)
    introduce(client, gate)
    answers = [client.receive(signal(Kind.WHO)) for _ in range(5)]
    assert [answer is not None for answer in answers] == [True, False, False, False, False]
    assert not client.welcomed


def test_tables_are_bounded_and_the_forgotten_may_return() -> None:
    """The least recently used identity makes room, is asked again, and gets in again."""
    gate = Gate(TOKEN, known=2, strangers=2)
    clients = [Introduction(TOKEN, f"c{number}") for number in range(3)]
    for number, client in enumerate(clients):
        introduce(client, gate, bytes([number]))
    assert [gate.client_of(bytes([number])) for number in range(3)] == [None, "c1", "c2"]
    assert gate.receive(b"\0", [b"M", b"body"]) == signal(Kind.WHO)
    introduce(clients[0], gate, b"\0")
    assert gate.client_of(b"\0") == "c0"


def test_strangers_do_not_push_out_the_known() -> None:
    """A flood of introductions that never prove anything costs bounded memory and hurts nobody."""
    gate = Gate(TOKEN, known=10, strangers=4)
    introduce(Introduction(TOKEN, "c"), gate, b"good")
    for number in range(100):
        gate.receive(str(number).encode(), [Introduction(OTHER, "x").hello()])
    assert gate.client_of(b"good") == "c"


@given(st.lists(st.binary(max_size=120), min_size=1, max_size=3))
def test_a_gate_answers_anything_and_opens_for_nothing(frames: list[bytes]) -> None:
    """Random frames never raise and never get in."""
    gate = Gate(TOKEN)
    assert gate.receive(b"1", frames)
    hello = Introduction(TOKEN, "c").hello()
    assert gate.receive(b"1", [hello + frames[0]])
    assert gate.client_of(b"1") is None


@given(st.binary(min_size=1, max_size=120))
def test_a_client_survives_any_frame(frame: bytes) -> None:
    """Random frames from a server end in nothing or in a typed error."""
    client = Introduction(TOKEN, "c")
    client.hello()
    with contextlib.suppress(DecodeError, ProtocolMismatch):
        client.receive(frame)
    assert not client.welcomed


# ---------------------------------------------------------------- encrypted connections


@pytest.fixture(scope="module")
def keys() -> CurveKeys:
    return CurveKeys.new()


@pytest.fixture
def handler() -> Recorder:
    return Recorder()


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


# ---------------------------------------------------------------- strangers


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


@pytest.fixture
def server(handler: Recorder, tmp_path: Path) -> Iterator[Server]:
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as running:
        yield running


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
