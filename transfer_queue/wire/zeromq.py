"""What the two ends of a ZeroMQ connection have in common."""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import zmq

from transfer_queue.wire.codec import MAX_FRAME_BYTES, MAX_FRAMES
from transfer_queue.wire.stream import HIGH_WATER_MARK, LINGER_S

MOST_SOCKETS = 32768  # of one process
WAITING_CONNECTIONS = 4096
HANDSHAKE_S = 10.0
REFUSED_EVENTS = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH

_EVENT = struct.Struct("=Hi")
_COPIED_FRAMES = 2  # header and body; the buffers behind them are handed on as they are
_READABLE = int(zmq.POLLIN)


def client_context() -> zmq.Context[zmq.Socket[bytes]]:
    """Return ZeroMQ's context of this process, with room for as many sockets as there are descriptors."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
    if context.get(zmq.MAX_SOCKETS) < MOST_SOCKETS:
        context.set(zmq.MAX_SOCKETS, MOST_SOCKETS)
    return context


def configure(socket: zmq.Socket[bytes], *, ipv6: bool) -> None:
    """Set the options of a new socket."""
    options = {
        zmq.LINGER: int(1000 * LINGER_S),
        zmq.SNDHWM: HIGH_WATER_MARK,
        zmq.RCVHWM: HIGH_WATER_MARK,
        zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
        zmq.HEARTBEAT_IVL: 5000,
        zmq.HEARTBEAT_TIMEOUT: 30000,
        zmq.HANDSHAKE_IVL: int(1000 * HANDSHAKE_S),
        zmq.BACKLOG: WAITING_CONNECTIONS,
        zmq.IPV6: int(ipv6),
    }
    for option, value in options.items():
        socket.setsockopt(option, value)


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message has arrived. Asking renews the signal of the socket's descriptor, which tells of changes."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _READABLE)


def receive_first(socket: zmq.Socket[bytes]) -> tuple[bytes, int]:
    """Return the first frame of a message that has arrived, and the descriptor over which it came; -1: not known."""
    frame: zmq.Frame = socket.recv(zmq.NOBLOCK, copy=False)
    try:
        return frame.bytes, int(frame.get(zmq.SRCFD))
    except zmq.ZMQError:  # it came from an old version of ZeroMQ
        return frame.bytes, -1


def receive(socket: zmq.Socket[bytes], envelope: int = 0, first: bytes | None = None) -> list[Any]:
    """Return the frames of a message that has arrived, behind `envelope` frames of addresses.

    `first`: the first one, if it was received before. Those beyond what a message can have are read and dropped.
    """
    frames: list[Any] = [socket.recv(zmq.NOBLOCK) if first is None else first]
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv(copy=len(frames) < envelope + _COPIED_FRAMES)
        if len(frames) < envelope + _COPIED_FRAMES + MAX_FRAMES:
            frames.append(frame.buffer if isinstance(frame, zmq.Frame) else frame)
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Any], envelope: int = 0) -> None:
    """Send without waiting; raises `zmq.ZMQError` if that is impossible."""
    socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) <= envelope + _COPIED_FRAMES)


class Monitor:
    """What ZeroMQ does with the connections of a socket: (event, value) of those among `events`."""

    def __init__(self, watched: zmq.Socket[bytes], events: int) -> None:
        address = f"inproc://transfer_queue-{secrets.token_hex(8)}"
        self._watched = watched
        self._socket: zmq.Socket[bytes] = watched.context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # a full one would block the thread that serves all connections
        self._socket.setsockopt(zmq.LINGER, 0)
        watched.monitor(address, events)
        self._socket.connect(address)
        self.fd = int(self._socket.getsockopt(zmq.FD))
        is_readable(self._socket)  # from now on `fd` tells

    def take(self) -> Iterator[tuple[int, int]]:
        """Yield what happened since the last call, all of it: then `fd` tells of what is new."""
        while is_readable(self._socket):
            event, _ = self._socket.recv_multipart(zmq.NOBLOCK)
            yield _EVENT.unpack(event)

    def close(self) -> None:
        """Stop watching. To be called before the watched socket is closed."""
        self._watched.monitor(None, 0)
        self._socket.close()
