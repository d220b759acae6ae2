"""The two ways to a server: a Unix socket on its host, ZeroMQ over TCP from elsewhere.

A line carries messages of several frames. It is made at once, also where no server listens yet, and gets by itself
over a server that is gone for a while; `connected` tells whether what is sent can arrive.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import zmq

from transfer_queue.errors import ConnectionLost
from transfer_queue.wire.codec import MAX_FRAME_BYTES
from transfer_queue.wire.ports import is_unix_address, unix_path
from transfer_queue.wire.stream import HIGH_WATER_MARK, Stream

LINGER_S = 0.25

_COPIED_FRAMES = 2
_READABLE = int(zmq.POLLIN)


class Line(Protocol):
    """One connection. A line has one owner at a time, and only the owner calls it."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, or one in the making that nobody else has to see to."""

    @property
    def fd(self) -> int:
        """The descriptor that an event loop watches; the same one as long as the line lives."""

    @property
    def silent(self) -> bool:
        """Sending may swallow the signal of `fd`, so look for input after each `send`."""

    def reconnect(self) -> bool:
        """Try again, if not connected; return whether it succeeded."""

    def send(self, frames: Sequence[Any], *, hold: bool = False) -> bool:
        """Send a message; `hold`: not before `flush`. False: too many wait, or nobody is there."""

    def flush(self) -> None:
        """Send what was held."""

    def wait(self, timeout_s: float) -> bool:
        """Wait for input or the bell; return whether there may be any."""

    def read(self) -> None:
        """Take over what has arrived, before `next` is asked."""

    def next(self) -> list[Any] | None:
        """Return the frames of the next message that has arrived."""

    def close(self) -> None: ...


def open_line(address: str, bell_fd: int) -> Line:
    """Return a line to an address. `bell_fd` ends a wait when it becomes readable.

    Raises `ConnectionLost` if the process has no descriptor left.
    """
    try:
        return UnixLine(unix_path(address), bell_fd) if is_unix_address(address) else ZmqLine(address, bell_fd)
    except (zmq.ZMQError, OSError) as error:
        raise ConnectionLost(f"cannot connect to {address}: {error}") from error


class UnixLine:
    """To a server of this host."""

    silent = False

    def __init__(self, path: str, bell_fd: int) -> None:
        self._path = path
        self._watch = select.epoll()  # of its own, so that `fd` outlives a connection
        self._watch.register(bell_fd, select.EPOLLIN)
        self._stream: Stream | None = None
        self._sending = False
        try:
            self.reconnect()
        except OSError:
            self._watch.close()
            raise

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def fd(self) -> int:
        return self._watch.fileno()

    def reconnect(self) -> bool:
        if self._stream is not None:
            return True
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        made.setblocking(False)
        try:
            made.connect(self._path)
        except OSError:  # nobody listens, or too many want to
            made.close()
            return False
        self._watch.register(made.fileno(), select.EPOLLIN)
        self._stream, self._sending = Stream(made), False
        return True

    def send(self, frames: Sequence[Any], *, hold: bool = False) -> bool:
        if self._stream is None:
            return False
        sent = self._stream.send(frames, hold=hold)
        self._watch_sending(self._stream)
        return sent or self._stream.deaf  # then the end of the connection is still to be read, behind what came before

    def flush(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            self._watch_sending(self._stream)

    def wait(self, timeout_s: float) -> bool:
        return bool(self._watch.poll(timeout_s, 2))

    def read(self) -> None:
        if self._stream is None:
            return
        if self._sending:
            self.flush()
        self._stream.read()
        if self._stream.broken:
            self._end(self._stream)

    def next(self) -> list[Any] | None:
        return None if self._stream is None else self._stream.next()

    def close(self) -> None:
        if self._stream is not None:
            self._end(self._stream)
        self._watch.close()

    def _end(self, stream: Stream) -> None:
        self._watch.unregister(stream.fd)  # a forked child may hold the socket, so closing it is not enough
        stream.close(LINGER_S)
        self._stream = None

    def _watch_sending(self, stream: Stream) -> None:
        if stream.full != self._sending:
            self._sending = not self._sending
            self._watch.modify(stream.fd, select.EPOLLIN | (select.EPOLLOUT if self._sending else 0))


class ZmqLine:
    """To a server anywhere; ZeroMQ reconnects by itself."""

    connected = True
    silent = True

    def __init__(self, address: str, bell_fd: int) -> None:
        options = {
            zmq.LINGER: int(1000 * LINGER_S),
            zmq.SNDHWM: HIGH_WATER_MARK,
            zmq.RCVHWM: HIGH_WATER_MARK,
            zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
            zmq.RECONNECT_IVL: 50,
            zmq.RECONNECT_IVL_MAX: 1000,
            zmq.HEARTBEAT_IVL: 5000,
            zmq.HEARTBEAT_TIMEOUT: 30000,
            zmq.IPV6: int("[" in address),
        }
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._socket.connect(address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(bell_fd, zmq.POLLIN)

    @property
    def fd(self) -> int:
        return int(self._socket.getsockopt(zmq.FD))

    def reconnect(self) -> bool:
        return True

    def send(self, frames: Sequence[Any], *, hold: bool = False) -> bool:  # ZeroMQ gathers small messages by itself
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK, copy=len(frames) <= _COPIED_FRAMES)
        except zmq.Again:
            return False
        return True

    def flush(self) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        return bool(self._poller.poll(int(1000 * timeout_s) + 1))

    def read(self) -> None: ...

    def next(self) -> list[Any] | None:
        if not int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:
            return None
        frames: list[Any] = [self._socket.recv(zmq.NOBLOCK)]
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(copy=len(frames) < _COPIED_FRAMES)
            frames.append(frame.buffer if isinstance(frame, zmq.Frame) else frame)
        return frames

    def close(self) -> None:
        self._socket.close()
