"""The two ways into a server: a Unix socket for its host, a ROUTER socket of ZeroMQ for TCP.

Both belong to the thread of the server. `Watch` tells it which descriptor is ready; what arrived goes to `take` as
(channel, frames), and a channel is what `send` wants to have back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import zmq

from transfer_queue.errors import ConnectionLost
from transfer_queue.wire.codec import MAX_FRAME_BYTES, MAX_FRAMES
from transfer_queue.wire.ports import random_ports, tcp_address, unix_address
from transfer_queue.wire.security import Gate
from transfer_queue.wire.stream import HIGH_WATER_MARK, MAX_MESSAGE_BYTES, Stream

LINGER_S = 0.25

Take: TypeAlias = Callable[[Hashable, Sequence[Any]], None]

_BATCH = 256
_TURN = 8
_READABLE = int(zmq.POLLIN)
_WAITING_CONNECTIONS = 4096
_STRANGER_BYTES = 4096  # of a message, from a connection that has not proved the token
_COPIED_FRAMES = 2  # header and body; the buffers behind them are handed on as they are


class Watch:
    """Descriptors, and what to call when they are ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, ready: Callable[[], None]) -> None:
        self._ready[fd] = ready
        self._epoll.register(fd, select.EPOLLIN)

    def want_to_send(self, fd: int, wanted: bool) -> None:
        """Call as well when the descriptor can be written to."""
        self._epoll.modify(fd, select.EPOLLIN | (select.EPOLLOUT if wanted else 0))

    def remove(self, fd: int) -> None:
        del self._ready[fd]
        self._epoll.unregister(fd)

    def wait(self, timeout_s: float) -> None:
        for fd, _ in self._epoll.poll(timeout_s, _BATCH):
            ready = self._ready.get(fd)
            if ready is not None:
                ready()

    def close(self) -> None:
        self._epoll.close()


class Visitor:
    """One connection at a Unix socket. A channel that nobody can name but the server."""

    __slots__ = ("more", "next", "sending", "stream")

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.sending = False  # the socket was full: the watch tells when it takes more
        self.next: list[Any] | None = None  # a message that waits for the next turn
        self.more = False  # another of its messages is taken right after this one


class UnixDoor:
    """Listens at a socket file. Connections that have not proved the token to the gate may send little."""

    def __init__(self, path: str, watch: Watch, take: Take, gate: Gate) -> None:
        """Raises `ConnectionLost` if the file cannot be made."""
        self.address = unix_address(path)
        self._path = path
        self._watch = watch
        self._take = take
        self._gate = gate
        self._visitors: dict[int, Visitor] = {}
        self._busy: dict[Visitor, None] = {}
        self._full = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            remove_dead_socket(path)
            self._socket.bind(path)
            os.chmod(path, 0o600)
            self._socket.listen(_WAITING_CONNECTIONS)
        except OSError as error:
            self._socket.close()
            raise ConnectionLost(f"cannot listen at {self.address}: {error}; its folder has to exist") from error
        watch.add(self._socket.fileno(), self._accept)

    def send(self, channel: Visitor, frames: Sequence[Any]) -> bool:
        """Send, together with the answers to what else the channel has asked by now; return whether it is there."""
        sent = channel.stream.send(frames, hold=channel.more)
        self._watch_sending(channel)
        return sent

    def close(self) -> None:
        """Send what is left and end all connections."""
        for visitor in list(self._visitors.values()):
            self._end(visitor)
        if not self._full:
            self._watch.remove(self._socket.fileno())
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self._socket.close()

    def _accept(self) -> None:
        try:
            connected, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # until a connection ends
                self._full = True
                self._watch.remove(self._socket.fileno())
            return
        visitor = Visitor(Stream(connected, _STRANGER_BYTES))
        self._visitors[visitor.stream.fd] = visitor
        self._watch.add(visitor.stream.fd, lambda: self._receive(visitor))

    def _receive(self, visitor: Visitor) -> None:
        visitor.stream.read()
        self._take_turn(visitor)

    def go_on(self) -> bool:
        """Give a turn to each connection with messages left over from its last one; return whether some still have."""
        busy, self._busy = self._busy, {}
        for visitor in busy:
            self._take_turn(visitor)
        return bool(self._busy)

    def _take_turn(self, visitor: Visitor) -> None:
        """Take some messages: many from one connection must not keep the others waiting."""
        stream = visitor.stream
        for left in reversed(range(_TURN)):
            frames = visitor.next or stream.next()
            if frames is None:
                break
            visitor.next = stream.next()
            visitor.more = left > 0 and visitor.next is not None
            self._take(visitor, frames)
            if stream.limit_bytes < MAX_MESSAGE_BYTES and self._gate.client_of(visitor) is not None:
                stream.limit_bytes = MAX_MESSAGE_BYTES
        stream.flush()
        self._watch_sending(visitor)
        if visitor.next is not None:
            self._busy[visitor] = None
        elif stream.broken:
            self._end(visitor)

    def _end(self, visitor: Visitor) -> None:
        del self._visitors[visitor.stream.fd]
        self._busy.pop(visitor, None)
        self._watch.remove(visitor.stream.fd)
        visitor.stream.close(LINGER_S)
        self._gate.forget(visitor)
        if self._full:
            self._full = False
            self._watch.add(self._socket.fileno(), self._accept)

    def _watch_sending(self, visitor: Visitor) -> None:
        if not visitor.stream.broken and visitor.stream.full != visitor.sending:
            visitor.sending = not visitor.sending
            self._watch.want_to_send(visitor.stream.fd, visitor.sending)


def remove_dead_socket(path: str) -> None:
    """Remove the socket file of a server that was killed; that of a living one stays."""
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


class TcpDoor:
    """Listens at a port. Its channels are the identities that ZeroMQ gives to connections."""

    def __init__(self, host: str, port: int, watch: Watch, take: Take) -> None:
        """`port` 0 takes a free one. Raises `ConnectionLost` if it cannot be bound."""
        self._take = take
        self._watch = watch
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        options = {
            zmq.ROUTER_MANDATORY: 1,
            zmq.LINGER: int(1000 * LINGER_S),
            zmq.SNDHWM: HIGH_WATER_MARK,
            zmq.RCVHWM: HIGH_WATER_MARK,
            zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
            zmq.HEARTBEAT_IVL: 5000,
            zmq.HEARTBEAT_TIMEOUT: 30000,
            zmq.IPV6: int(":" in host),
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        try:
            self.address = self._bind(host, port)
        except BaseException:
            self._end_sockets()
            raise
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self.stirred = True
        watch.add(self._fd, self._stir)

    def _stir(self) -> None:
        """Something changed, or the signal of it may have been swallowed by a `send`: `receive` has to look."""
        self.stirred = True

    def receive(self) -> None:
        """Take what has arrived, at most some hundred messages; `stirred` tells whether there may be more."""
        for _ in range(_BATCH):
            if not int(self._socket.getsockopt(zmq.EVENTS)) & _READABLE:
                self.stirred = False
                return
            identity = self._socket.recv(zmq.NOBLOCK)
            frames: list[Any] = []
            count = 0
            while self._socket.getsockopt(zmq.RCVMORE):  # frames of strangers and frames without number are dropped
                frame = self._socket.recv(copy=count < _COPIED_FRAMES)
                count += 1
                if count <= MAX_FRAMES + _COPIED_FRAMES:
                    frames.append(frame.buffer if isinstance(frame, zmq.Frame) else frame)
            if frames:
                self._take(identity, frames)

    def send(self, channel: bytes, frames: Sequence[Any]) -> bool:
        """Send at once; return whether the connection is there."""
        self._stir()
        try:
            small = len(frames) <= _COPIED_FRAMES
            self._socket.send_multipart([channel, *frames], zmq.NOBLOCK, copy=small)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        return True

    def close(self) -> None:
        self._watch.remove(self._fd)
        self._end_sockets()

    def _end_sockets(self) -> None:
        self._socket.close()
        self._context.term()

    def _bind(self, host: str, port: int) -> str:
        error: zmq.ZMQError | None = None
        for attempt in [port] if port else random_ports():
            try:
                self._socket.bind(tcp_address(host, attempt))
                return tcp_address(host, attempt)
            except zmq.ZMQError as refused:
                error = refused
                if refused.errno not in (errno.EADDRINUSE, errno.EACCES):
                    break
        tried = tcp_address(host, port) if port else f"any free port of {host}"
        raise ConnectionLost(f"cannot listen at {tried}: {error}; choose another host or port") from error
