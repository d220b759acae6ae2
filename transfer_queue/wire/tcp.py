"""The way into a server for other hosts: a ROUTER socket of ZeroMQ. The one for its own host is `wire.doors`."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from transfer_queue.errors import ConnectionLost
from transfer_queue.wire import zeromq
from transfer_queue.wire.curve import CurveKeys, serve_encrypted
from transfer_queue.wire.doors import Take, Watch
from transfer_queue.wire.ports import random_ports, tcp_address
from transfer_queue.wire.security import Gate, Kind, signal
from transfer_queue.wire.strangers import Strangers

_BATCH = 256


class TcpDoor:
    """Listens at a port. Its channels are the identities that ZeroMQ gives to connections."""

    def __init__(
        self, host: str, port: int, watch: Watch, take: Take, gate: Gate, curve: CurveKeys | None = None
    ) -> None:
        """`port` 0 takes a free one, `curve` encrypts. Raises `ConnectionLost` if it cannot be bound."""
        self._take = take
        self._watch = watch
        self._gate = gate
        self._context = zmq.Context()
        self._watched: list[int] = []
        with contextlib.ExitStack() as half_made:
            half_made.callback(self._context.destroy, linger=0)
            self._socket = self._context.socket(zmq.ROUTER)
            zeromq.configure(self._socket, ipv6=":" in host)
            self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._socket.setsockopt(zmq.PROBE_ROUTER, 1)  # says `Kind.WHO` to each new connection, in ZeroMQ's own form
            if curve is not None:
                serve_encrypted(self._socket, curve)
            self._strangers = Strangers(self._socket)
            half_made.callback(self._strangers.close)
            self.address = self._bind(host, port)
            half_made.callback(self._unwatch)
            self.stirred = True
            self._watch_for(int(self._socket.getsockopt(zmq.FD)), self._stir)
            for fd in self._strangers.fds:
                self._watch_for(fd, self._strangers.note)
            half_made.pop_all()

    @property
    def refused(self) -> int:
        """How many connections did not speak ZeroMQ's protocol, or did not have the key."""
        return self._strangers.refused

    def _stir(self) -> None:
        """Something changed, or the signal of it may have been swallowed by a `send`: `receive` has to look."""
        self.stirred = True

    def receive(self) -> None:
        """Take what has arrived, at most some hundred messages; `stirred` tells whether there may be more."""
        for _ in range(_BATCH):
            if not zeromq.is_readable(self._socket):
                self.stirred = False
                return
            if self._strangers:
                self._receive_watchfully()
            else:
                identity, *frames = zeromq.receive(self._socket, envelope=1)
                if frames:
                    self._take(identity, frames)

    def look_round(self) -> float | None:
        """End connections of strangers that go too far; return the seconds until this is due again."""
        return self._strangers.look_round()

    def send(self, channel: bytes, frames: Sequence[Any]) -> bool:
        """Send at once; return whether the connection is there, and takes it."""
        return self._try_to_send(channel, frames) is None

    def reaches(self, channel: bytes) -> bool:
        """Whether the connection is there, though the other end may not read."""
        return self._try_to_send(channel, [signal(Kind.PING)]) != errno.EHOSTUNREACH

    def close(self) -> None:
        self._unwatch()
        self._strangers.close()
        self._socket.close()
        self._context.term()

    def _receive_watchfully(self) -> None:
        """Take a message, and note whether it made a stranger a client."""
        identity, fd = zeromq.receive_first(self._socket)
        _, *frames = zeromq.receive(self._socket, envelope=1, first=identity)
        if frames:
            self._take(identity, frames)
        if self._gate.client_of(identity) is not None:
            self._strangers.proved(fd)

    def _try_to_send(self, channel: bytes, frames: Sequence[Any]) -> int | None:
        """Send, or return the error number that says why not."""
        self._stir()
        try:
            zeromq.send(self._socket, [channel, *frames], envelope=1)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return error.errno
            raise
        return None

    def _watch_for(self, fd: int, ready: Callable[[], None]) -> None:
        self._watch.add(fd, ready)
        self._watched.append(fd)

    def _unwatch(self) -> None:
        while self._watched:
            self._watch.remove(self._watched.pop())

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
