"""What a server does with input that makes no sense, claims too much, or comes from strangers."""

from __future__ import annotations

import dataclasses
import socket
import struct

import pytest
import zmq

from tests.unit.serving import (
    BareClient,
    Recorder,
    announce,
    put,
)
from transfer_queue.messages import (
    MESSAGE_TYPES,
    Done,
    ErrorReply,
    GetAudit,
    ListPartitions,
    Request,
)
from transfer_queue.wire import desk
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.security import Kind
from transfer_queue.wire.server import Server

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
