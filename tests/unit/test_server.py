"""A server on real sockets: one bad request, client or handler never harms another."""

from __future__ import annotations

import dataclasses
import errno
import os
import socket
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zmq

from tests.unit.serving import (
    TOKEN,
    BareClient,
    Recorder,
    announce,
    draw,
    drawn,
    explain,
    put,
    put_done,
)
from transfer_queue.errors import ConnectionLost, InvalidArgument
from transfer_queue.messages import (
    MESSAGE_TYPES,
    Done,
    ErrorReply,
    FreeBlocks,
    GetAudit,
    ListPartitions,
    ListUnits,
    Request,
)
from transfer_queue.wire import desk
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.doors import Watch
from transfer_queue.wire.security import Gate, Kind
from transfer_queue.wire.server import Server
from transfer_queue.wire.tcp import TcpDoor


@pytest.fixture
def handler() -> Recorder:
    return Recorder()


@pytest.fixture
def server(handler: Recorder, tmp_path: Path) -> Iterator[Server]:
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as running:
        yield running


@pytest.fixture(params=["unix", "tcp"])
def address(server: Server, request: pytest.FixtureRequest) -> str:
    return server.local_address if request.param == "unix" else server.address


@pytest.fixture
def client(address: str) -> Iterator[BareClient]:
    with BareClient(address) as bare:
        yield bare.introduce()


# ---------------------------------------------------------------- addresses


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


# ---------------------------------------------------------------- answers


def test_replies_echo_the_id_of_their_request(client: BareClient) -> None:
    """Requests sent together are told apart by their ids."""
    for number in (5, 3, 9):
        client.send(GetAudit(partition_id=str(number)), number)
    answers = dict(client.receive() for _ in range(3))
    assert {number: reply.entries["asked"] for number, reply in answers.items()} == {3: "3", 5: "5", 9: "9"}


def test_a_bug_in_the_handler_harms_only_its_request(server: Server, client: BareClient) -> None:
    """The caller gets type and traceback, it is counted, and the next request is served."""
    reply = client.ask(explain("bug"), 1)
    assert (reply.name, "a bug in the handler" in reply.message) == ("RemoteError", True)
    assert client.ask(GetAudit(partition_id="next"), 2).entries == {"asked": "next"}
    assert server.failures == 1


def test_an_error_of_ours_arrives_with_its_details(server: Server, client: BareClient) -> None:
    """A handler may answer with an exception; that is no failure of the server."""
    reply = client.ask(explain("unknown"), 1)
    assert (reply.name, reply.details) == ("InvalidArgument", {"known": ["a"]})
    assert server.failures == 0


def test_an_answer_that_cannot_be_sent_becomes_an_error(handler: Recorder, client: BareClient) -> None:
    """The caller hears why, and the handler that its answer was lost."""
    assert client.ask(explain("unsendable"), 1).name == "EncodeError"
    handler.wait_for(lambda: len(handler.lost_replies) == 1)


def test_answers_may_come_from_any_thread(handler: Recorder, client: BareClient) -> None:
    """A waiting request is answered as soon as another thread answers its ticket."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    answering = threading.Thread(target=handler.tickets[0].answer, args=(drawn(4),))
    answering.start()
    number, reply = client.receive()
    answering.join()
    assert (number, reply.indexes.tolist()) == (1, [4])


def test_a_ticket_is_answered_once(handler: Recorder, client: BareClient) -> None:
    """The second answer is a bug of the handler and says so."""
    client.ask(put(), 1)
    with pytest.raises(AssertionError, match="twice"):
        handler.tickets[0].answer(Done())


def test_waiting_requests_delay_nobody(handler: Recorder, address: str, client: BareClient) -> None:
    """While one client waits, others and itself are served."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    with BareClient(address, "other/1") as other:
        assert other.introduce().ask(GetAudit(partition_id="x"), 1).entries == {"asked": "x"}
    assert client.ask(GetAudit(partition_id="y"), 2).entries == {"asked": "y"}


def test_what_is_due_is_done_without_requests(handler: Recorder, server: Server) -> None:
    """The handler is asked again when it said so, and when somebody wakes the server."""
    handler.next_tick_s = 0.01
    server.wake()
    handler.wait_for(lambda: handler.ticks > 5)


def test_closing_sends_what_was_answered(handler: Recorder, tmp_path: Path) -> None:
    """An answer given just before the end still arrives; closing twice is allowed."""
    server = Server(handler, TOKEN, local_path=str(tmp_path / "socket")).start()
    with BareClient(server.local_address) as client:
        client.introduce().send(draw(), 1)
        handler.wait_for(lambda: handler.tickets)
        handler.tickets[0].answer(drawn(1))
        server.close()
        server.close()
        assert client.receive()[0] == 1
    assert "closed" in repr(server)


def test_a_server_that_never_started_can_be_closed(handler: Recorder, tmp_path: Path) -> None:
    """Binding holds sockets; they are released."""
    server = Server(handler, TOKEN, local_path=str(tmp_path / "socket"))
    assert "not started" in repr(server)
    server.close()
    server.close()


# ---------------------------------------------------------------- bad input


WITH_FIELDS = [cls for code, cls in sorted(MESSAGE_TYPES.items()) if 10 <= code < 60 and dataclasses.fields(cls)]


@pytest.mark.parametrize("cls", WITH_FIELDS, ids=lambda cls: cls.__name__)
def test_a_malformed_request_is_answered_and_the_next_is_served(client: BareClient, cls: type[Request]) -> None:
    """A body that does not fit the type gives a `DecodeError` that names the type."""
    header = bytearray(encode_message(ListPartitions(), 7)[0])
    header[1:3] = next(code for code, known in MESSAGE_TYPES.items() if known is cls).to_bytes(2, "little")
    client.send_frames(bytes(header), b"\x90")
    number, reply = client.receive()
    assert (number, reply.name) == (7, "DecodeError")
    assert cls.__name__ in reply.message
    assert client.ask(GetAudit(partition_id="ok"), 8).entries == {"asked": "ok"}


def test_frames_that_make_no_sense_are_dropped_and_counted(server: Server, client: BareClient) -> None:
    """Without a request id there is nobody to answer; the server goes on."""
    for frames in ([b"M"], [b"\0\1\2", b"x"], [b""], [b"", b"", b""], [b"C" * 97], [b"M" * 18]):
        client.send_frames(*frames)
    client.send_frames(*[b"x"] * 20_000)
    assert client.ask(GetAudit(partition_id="ok"), 8).entries == {"asked": "ok"}
    assert server.malformed >= 6


@pytest.mark.parametrize(
    "message", [Done(), ErrorReply(name="x", message="y", details={})], ids=lambda m: type(m).__name__
)
def test_a_reply_is_no_request(handler: Recorder, client: BareClient, message: Request) -> None:
    """A server never hands its handler what is not a request."""
    assert client.ask(message, 3).name == "ProtocolMismatch"
    assert handler.requests == []


def test_a_request_without_id_is_not_done(handler: Recorder, client: BareClient) -> None:
    """Only one-way messages come without id."""
    client.send(put(), 0)
    client.ask(GetAudit(partition_id=None), 1)
    assert handler.puts == 0


def test_strangers_are_asked_who_they_are_and_not_decoded(handler: Recorder, server: Server, address: str) -> None:
    """Without introduction a good request reaches nobody."""
    with BareClient(address) as stranger:
        stranger.send(put(), 1)
        assert stranger.receive_frames() == [bytes([Kind.WHO])]
        stranger.send_frames(*[b"garbage"] * 3)
        assert stranger.receive_frames() == [bytes([Kind.WHO])]
        assert stranger.introduce().ask(GetAudit(partition_id="x"), 1).entries == {"asked": "x"}
    assert handler.puts == 0
    assert server.malformed == 0


def test_a_stranger_cannot_take_the_place_of_a_client(handler: Recorder, server: Server) -> None:
    """Identities are given by the server: choosing the name of another connection leads nowhere."""
    with BareClient(server.address) as client, zmq.Context.instance().socket(zmq.DEALER) as stranger:
        client.introduce().ask(announce(), 1)
        channel = handler.tickets[0].channel
        assert isinstance(channel, bytes)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.setsockopt(zmq.IDENTITY, b"\1" + channel[1:])
        stranger.connect(server.address)
        stranger.send_multipart(encode_message(put(), 1))
        assert [stranger.recv(), stranger.recv()] == [b"", bytes([Kind.WHO])]
    assert handler.puts == 0


def test_wrong_tokens_are_counted(server: Server, address: str) -> None:
    """Each failed proof is refused and shows in `auth_failures`."""
    with BareClient(address, token=b"x" * 32) as thief:
        thief.send_frames(thief.introduction.hello())
        proof = thief.introduction.receive(thief.receive_frames()[0])
        assert proof is not None
        thief.send_frames(proof)
        assert thief.receive_frames()[0][0] == Kind.REFUSED
    assert server.auth_failures == 1


# ---------------------------------------------------------------- the same request again


def test_a_repeated_request_is_done_once(handler: Recorder, client: BareClient) -> None:
    """Sent again with its id, a put gives its first answer."""
    first, again = client.ask(put(), 5), client.ask(put(), 5)
    assert handler.puts == 1
    assert first.indexes.tolist() == again.indexes.tolist() == [1]
    assert client.ask(put(), 6).indexes.tolist() == [2]


def test_an_answer_follows_the_client_to_its_new_connection(
    handler: Recorder, address: str, client: BareClient
) -> None:
    """A request that waits and is sent again over another connection is answered there, once."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    with BareClient(address) as second:
        second.introduce().send(draw(), 1)
        second.ask(ListPartitions(), 2)
        handler.tickets[0].answer(drawn(3))
        number, reply = second.receive()
    assert (number, reply.indexes.tolist(), len(handler.tickets)) == (1, [3], 1)


def test_the_same_number_of_another_client_is_another_request(
    handler: Recorder, address: str, client: BareClient
) -> None:
    """Request ids belong to a client id."""
    client.ask(put(), 1)
    with BareClient(address, "other/1") as other:
        other.introduce().ask(put(), 1)
    assert handler.puts == 2


def test_what_the_client_does_not_wait_for_is_forgotten(handler: Recorder, client: BareClient) -> None:
    """Below the floor that a client names, a repeated request is refused instead of done again."""
    client.ask(put(), 5)
    client.ask(put(), 6, floor=6)
    reply = client.ask(put(), 5)
    assert (reply.name, reply.details) == ("ConnectionLost", {"request_id": 5})
    assert handler.puts == 2


# ---------------------------------------------------------------- clients that are gone


def test_a_client_that_vanished_does_not_wait(handler: Recorder, address: str) -> None:
    """Its waiting request is lost within seconds, and so is an answer that comes later."""
    with BareClient(address) as client:
        client.introduce().send(draw(), 1)
        handler.wait_for(lambda: handler.tickets)
    handler.wait_for(lambda: handler.lost_replies)
    [ticket] = handler.tickets
    assert handler.lost_replies == [(ticket, None)]
    reply = drawn(1)
    ticket.answer(reply)
    handler.wait_for(lambda: len(handler.lost_replies) == 2)
    assert handler.lost_replies[1] == (ticket, reply)


def test_a_waiting_client_is_pinged(handler: Recorder, client: BareClient) -> None:
    """One that waits longer than a second hears that the server lives."""
    client.send(ListUnits(timeout_s=60.0), 1)
    assert client.receive_frames() == [bytes([Kind.PING])]


@pytest.mark.parametrize("answered", [False, True], ids=["waiting", "answered"])
def test_a_withdrawn_draw_is_lost(handler: Recorder, client: BareClient, answered: bool) -> None:
    """Cancelled before or after its answer, the handler takes the draw back; asked again, it is a new one."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    reply = drawn(1)
    if answered:
        handler.tickets[0].answer(reply)
        client.receive()
    client.cancel(1)
    handler.wait_for(lambda: handler.lost_replies)
    assert handler.lost_replies == [(handler.tickets[0], reply if answered else None)]
    client.send(draw(), 1)
    handler.wait_for(lambda: len(handler.tickets) == 2)


def test_a_put_that_was_answered_cannot_be_withdrawn(handler: Recorder, client: BareClient) -> None:
    """Its outcome stands and can still be asked for."""
    client.ask(put(), 1)
    client.cancel(1)
    assert client.ask(put(), 1).indexes.tolist() == put_done(1).indexes.tolist()
    assert (handler.puts, handler.lost_replies) == (1, [])


# ---------------------------------------------------------------- pushing


def test_a_push_reaches_the_connection_that_asked(handler: Recorder, server: Server, client: BareClient) -> None:
    """The channel of a ticket can be told things later."""
    client.ask(announce(), 1)
    ids = np.arange(3)
    server.push(handler.tickets[0].channel, FreeBlocks(sequence=9, blocks=ids, partial_blocks=ids, partial_slots=ids))
    number, order = client.receive()
    assert (number, order.sequence, order.blocks.tolist()) == (0, 9, [0, 1, 2])


def test_a_push_within_the_process_runs_in_the_thread_of_the_server(handler: Recorder, server: Server) -> None:
    """So that it never runs under a lock of whoever pushes."""
    called = threading.Event()
    threads: list[str] = []

    def channel(message: Done) -> None:
        threads.append(threading.current_thread().name)
        called.set()

    server.push(channel, Done())
    assert called.wait(20)
    assert threads == ["transfer_queue server"]


def test_a_push_to_nobody_is_dropped(server: Server, client: BareClient) -> None:
    """A channel that is gone is no error."""
    server.push(b"\0gone", Done())
    assert client.ask(GetAudit(partition_id="x"), 1).entries == {"asked": "x"}


# ---------------------------------------------------------------- limits


def test_a_failure_of_the_server_itself_is_answered(
    monkeypatch: pytest.MonkeyPatch, server: Server, client: BareClient
) -> None:
    """A bug in decoding ends neither the server nor the wait of the caller."""

    def fail(frames: object, header: object) -> None:
        raise ZeroDivisionError("a bug in the server")

    monkeypatch.setattr(desk, "decode", fail)
    assert client.ask(ListPartitions(), 1).name == "RemoteError"
    monkeypatch.undo()
    assert client.ask(ListPartitions(), 2).names == ("bare/1",)
    assert server.failures == 1


def test_a_frame_that_claims_too_much_ends_its_connection(server: Server, client: BareClient, address: str) -> None:
    """Also of a client that has proved the token: 2^63 bytes are neither awaited nor set aside."""
    if address.startswith("tcp"):
        claim = b"\xff" + bytes(8) + b"\x7f\3\0" + b"NULL".ljust(20, b"\0") + bytes(32)
        claim += b"\4\x19\5READY\13Socket-Type\0\0\0\6DEALER" + struct.pack("!BQ", 2, 1 << 63)
        host, port = address.removeprefix("tcp://").split(":")
        with socket.create_connection((host, int(port))) as liar:
            liar.sendall(claim)
            liar.settimeout(20)
            while liar.recv(1 << 16):
                pass
    else:
        client.line._stream._socket.sendall(struct.pack("<3I", 2, 19, (1 << 32) - 1))  # type: ignore[attr-defined]
        while client.line.connected:
            client.line.wait(1.0)
            client.line.read()
    with BareClient(address) as other:
        assert other.introduce().ask(ListPartitions(), 1).names == ("bare/1",)
