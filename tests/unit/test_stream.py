"""Messages of frames over a Unix socket: cut anywhere, of any size, never blocking, never trusted."""

from __future__ import annotations

import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder, draw, drawn, frees_done, put
from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import GetAudit, ListPartitions
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.server import Server
from transfer_queue.wire.stream import Stream


@pytest.fixture
def ends() -> Iterator[tuple[Stream, Stream]]:
    left, right = (Stream(end) for end in socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM))
    yield left, right
    left.close()
    right.close()


def receive(stream: Stream, sender: Stream | None = None) -> list[Any] | None:
    """The next message; the sender goes on sending what did not fit. None: the stream broke."""
    while (frames := stream.next()) is None and not stream.broken:
        if sender is not None:
            sender.flush()
        stream.read()
    return frames


@pytest.mark.parametrize(
    "frames",
    [
        [b"one"],
        [b""],
        [b"header", b"body"],
        [b"header", b"", b"", b"x"],
        [b"h" * 70_000, b"b" * 70_000, os.urandom(3_000_000), b"", os.urandom(10)],
        [b"h"] * 2000,
    ],
    ids=["one", "empty", "two", "empty ones", "large", "many"],
)
def test_frames_arrive_as_they_were_sent(ends: tuple[Stream, Stream], frames: list[bytes]) -> None:
    """Whatever their number and sizes; header and body as bytes, larger ones behind them unchangeable."""
    left, right = ends
    for _ in range(3):
        assert left.send(frames)
        found = receive(right, left)
        assert found is not None
        assert [bytes(frame) for frame in found] == frames
        assert all(type(frame) is bytes or (number >= 2 and frame.readonly) for number, frame in enumerate(found))


def test_messages_may_be_cut_anywhere() -> None:
    """A byte at a time is as good as all at once."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stream = Stream(right)
    data = struct.pack("<3I", 2, 3, 5) + b"abcdefgh" + struct.pack("<2I", 1, 1) + b"!"
    found = []
    for byte in data:
        left.send(bytes([byte]))
        stream.read()
        while (frames := stream.next()) is not None:
            found.append(frames)
    assert found == [[b"abc", b"defgh"], [b"!"]]
    left.close()
    stream.close()


def test_what_was_held_leaves_with_the_next_flush(ends: tuple[Stream, Stream]) -> None:
    """Several messages arrive together and in order; a few held ones leave by themselves."""
    left, right = ends
    for number in range(3):
        left.send([bytes([number])], hold=True)
    right.read()
    assert right.next() is None
    left.flush()
    assert [receive(right) for _ in range(3)] == [[b"\0"], [b"\1"], [b"\2"]]
    for number in range(100):
        left.send([bytes([number])], hold=True)
    assert receive(right) == [b"\0"]


def test_a_full_socket_blocks_nobody(ends: tuple[Stream, Stream]) -> None:
    """What does not fit waits in the sender, as the caller's own memory."""
    left, right = ends
    payload = memoryview(bytearray(os.urandom(8 << 20)))
    assert left.send([b"h", b"b", payload])
    assert left.full
    found = receive(right, left)
    assert found is not None
    assert found[2] == payload
    left.flush()
    assert not left.full


@pytest.mark.parametrize(
    "data",
    [struct.pack("<I", 0), struct.pack("<I", 1 << 20), struct.pack("<2I", 1, 1 << 30), struct.pack("<2I", 1, 5000)],
    ids=["no frames", "too many frames", "a frame too large", "beyond the limit"],
)
def test_what_is_no_message_ends_the_connection(data: bytes) -> None:
    """Nothing is allocated for a claim beyond the limits."""
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    stream = Stream(right, 4096)
    left.send(data)
    stream.read()
    assert stream.next() is None
    assert stream.broken
    assert not stream.send([b"x"])
    left.close()
    stream.close()


def test_the_end_comes_behind_what_was_sent(ends: tuple[Stream, Stream]) -> None:
    """The other end is gone: what it sent before is still read, what is sent to it is not taken."""
    left, right = ends
    left.send([b"last"])
    left.close()
    assert not right.send([b"x"])
    assert right.deaf
    assert receive(right) == [b"last"]
    assert receive(right) is None
    assert right.broken


# ---------------------------------------------------------------- in a server


def test_a_stranger_may_send_little(tmp_path: Path) -> None:
    """Before the token is proved, large messages end the connection, and others are not harmed."""
    with (
        Server(Recorder(), TOKEN, local_path=str(tmp_path / "socket")) as server,
        BareClient(server.local_address) as stranger,
        BareClient(server.local_address) as client,
    ):
        stranger.send_frames(b"M" * 5000)
        client.introduce()
        assert client.ask(GetAudit(partition_id="y" * 100_000), 1).entries == {"asked": "y" * 100_000}
        stranger.line.wait(WAIT_S)
        stranger.line.read()
        assert not stranger.line.connected


def test_replies_do_not_wait_for_messages_without_one(tmp_path: Path) -> None:
    """A request that arrives together with a one-way message, or one that waits, is answered at once."""
    handler = Recorder()
    with (
        Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as server,
        BareClient(server.local_address) as client,
    ):
        client.introduce()
        for later in (lambda: client.send(frees_done(1), 0), lambda: client.send(draw(), 2)):
            client.line.send(encode_message(put(), 1, 1), hold=True)
            later()
            assert client.receive()[0] == 1
        handler.wait_for(lambda: len(handler.tickets) == 2)
        handler.tickets[-1].answer(drawn(7))
        assert client.receive()[0] == 2


def test_the_socket_file_of_a_killed_server_is_taken_over(tmp_path: Path) -> None:
    """A file that nobody listens at is replaced; one where somebody listens stays, and the newcomer is refused."""
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    with Server(Recorder(), TOKEN, local_path=str(path)) as server, BareClient(server.local_address) as client:
        assert client.introduce().ask(ListPartitions(), 1).names == ("bare/1",)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        with pytest.raises(ConnectionLost, match="in use"):
            Server(Recorder(), TOKEN, local_path=str(path))
        assert client.ask(ListPartitions(), 2).names == ("bare/1",)
    assert not path.exists()
