"""What the two ends of a ZeroMQ connection have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq

from transfer_queue.wire.codec import MAX_FRAME_BYTES, MAX_FRAMES
from transfer_queue.wire.stream import HIGH_WATER_MARK, LINGER_S

_COPIED_FRAMES = 2  # header and body; the buffers behind them are handed on as they are
_READABLE = int(zmq.POLLIN)


def configure(socket: zmq.Socket[bytes], *, ipv6: bool) -> None:
    """Set the options of a new socket."""
    options = {
        zmq.LINGER: int(1000 * LINGER_S),
        zmq.SNDHWM: HIGH_WATER_MARK,
        zmq.RCVHWM: HIGH_WATER_MARK,
        zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
        zmq.HEARTBEAT_IVL: 5000,
        zmq.HEARTBEAT_TIMEOUT: 30000,
        zmq.IPV6: int(ipv6),
    }
    for option, value in options.items():
        socket.setsockopt(option, value)


def is_readable(socket: zmq.Socket[bytes]) -> bool:
    """Whether a message has arrived. Asking renews the signal of the socket's descriptor, which tells of changes."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & _READABLE)


def receive(socket: zmq.Socket[bytes], envelope: int = 0) -> list[Any]:
    """Return the frames of a message that has arrived, behind `envelope` frames of addresses.

    Those beyond what a message can have are read and dropped.
    """
    frames: list[Any] = [socket.recv(zmq.NOBLOCK)]
    while socket.getsockopt(zmq.RCVMORE):
        frame = socket.recv(copy=len(frames) < envelope + _COPIED_FRAMES)
        if len(frames) < envelope + _COPIED_FRAMES + MAX_FRAMES:
            frames.append(frame.buffer if isinstance(frame, zmq.Frame) else frame)
    return frames


def send(socket: zmq.Socket[bytes], frames: Sequence[Any], envelope: int = 0) -> None:
    """Send without waiting; raises `zmq.ZMQError` if that is impossible."""
    socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) <= envelope + _COPIED_FRAMES)
