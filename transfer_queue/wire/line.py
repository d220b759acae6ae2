"""The two ways to a server: a Unix socket on its host, ZeroMQ over TCP from elsewhere.

A line carries messages of several frames. It is made at once, also where no server listens yet, and outlives a server
that is gone for a while: while it is not `connected`, its owner calls `reconnect` now and then.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import zmq

from transfer_queue.errors import ConnectionLost
from transfer_queue.wire import zeromq
from transfer_queue.wire.curve import connect_encrypted
from transfer_queue.wire.holders import lives, pid_behind
from transfer_queue.wire.ports import is_unix_address, unix_path
from transfer_queue.wire.stream import LINGER_S, Stream

_AGREEMENT_EVENTS = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zeromq.REFUSED_EVENTS
_MOST_FAILED = 3  # one may come from a server that was stopped just then
_ENCRYPTED = "the server encrypts (security.encrypt): connect with the `curve_key` of its endpoint information"
_NOT_ENCRYPTED = "the server does not encrypt, though its endpoint information has a `curve_key`: take the present one"
_WRONG_KEY = (  # it hangs up, and may do so before it has said that it does not encrypt
    "the server does not have the key of the endpoint information, or does not encrypt: take address, token and key "
    "from one source"
)


class Line(Protocol):
    """One connection. A line has one owner at a time, and only the owner calls it."""

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known; False: `reconnect` has to be called until it succeeds."""

    @property
    def sending(self) -> bool:
        """Whether the connection could not take yet all that was sent."""

    @property
    def fd(self) -> int:
        """The descriptor that an event loop watches; the same one as long as the line lives."""

    @property
    def edge_triggered(self) -> bool:
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

    @property
    def orphaned(self) -> bool:
        """Whether the process at the other end is known to be dead. A forked child of it may hold the connection."""

    def give_up(self) -> None:
        """End a connection whose other end does not answer any more."""

    @property
    def examining(self) -> bool:
        """Whether `examine` was called and has to be called again soon."""

    def examine(self) -> str | None:
        """Find out, over some calls, whether the server refuses the connection as such; return what to do then."""

    def close(self, *, linger: bool = True) -> None:
        """End it for good; `linger`: after a moment for what could not be sent yet."""


def open_line(address: str, bell_fd: int, curve_key: str = "") -> Line:
    """Return a line to an address. `bell_fd` ends a wait when it becomes readable.

    `curve_key` encrypts TCP, see `wire.curve`. Raises `ConnectionLost` if the process has no descriptor left.
    """
    try:
        if is_unix_address(address):
            return UnixLine(unix_path(address), bell_fd)
        return ZmqLine(address, bell_fd, curve_key)
    except (zmq.ZMQError, OSError) as error:
        raise ConnectionLost(f"cannot connect to {address}: {error}") from error


class UnixLine:
    """To a server of this host."""

    edge_triggered = False
    examining = False

    def __init__(self, path: str, bell_fd: int) -> None:
        self._path = path
        self._watch = select.epoll()  # of its own, so that `fd` outlives a connection
        self._watch.register(bell_fd, select.EPOLLIN)
        self._stream: Stream | None = None
        self._server_pid = 0
        self.sending = False
        self.reconnect()

    @property
    def connected(self) -> bool:
        return self._stream is not None

    @property
    def fd(self) -> int:
        return self._watch.fileno()

    def reconnect(self) -> bool:
        if self._stream is not None:
            return True
        try:
            made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError:  # no descriptor is left
            return False
        made.setblocking(False)
        try:
            made.connect(self._path)
        except OSError:  # nobody listens, or too many want to
            made.close()
            return False
        self._watch.register(made.fileno(), select.EPOLLIN)
        self._stream, self._server_pid = Stream(made), pid_behind(made)
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
        if self.sending:
            self.flush()
        self._stream.read()
        if self._stream.broken:
            self._end(self._stream)

    def next(self) -> list[Any] | None:
        frames = None if self._stream is None else self._stream.next()
        if self._stream is not None and self._stream.broken:
            self._end(self._stream)
        return frames

    @property
    def orphaned(self) -> bool:
        return self._stream is not None and not lives(self._server_pid)

    def give_up(self) -> None:
        if self._stream is not None:
            self._end(self._stream)

    def examine(self) -> str | None:
        return None

    def close(self, *, linger: bool = True) -> None:
        if self._stream is not None:
            self._end(self._stream, LINGER_S if linger else 0.0)
        self._watch.close()

    def _end(self, stream: Stream, linger_s: float = 0.0) -> None:
        self._watch.unregister(stream.fd)  # a forked child may hold the socket, so closing it is not enough
        stream.close(linger_s)
        self._stream, self.sending = None, False

    def _watch_sending(self, stream: Stream) -> None:
        if stream.full != self.sending:
            self.sending = not self.sending
            self._watch.modify(stream.fd, select.EPOLLIN | (select.EPOLLOUT if self.sending else 0))


class ZmqLine:
    """To a server anywhere; ZeroMQ reconnects by itself."""

    connected = True
    edge_triggered = True
    sending = False
    orphaned = False

    def __init__(self, address: str, bell_fd: int, curve_key: str = "") -> None:
        self._address = address
        self._encrypted = bool(curve_key)
        self._monitor: zeromq.Monitor | None = None
        self._failed = 0  # attempts in a row that ended before the two sides agreed
        self._socket: zmq.Socket[bytes] = zeromq.client_context().socket(zmq.DEALER)
        zeromq.configure(self._socket, ipv6="[" in address)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 250)
        if curve_key:
            connect_encrypted(self._socket, curve_key)
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
            zeromq.send(self._socket, frames)
        except zmq.Again:
            return False
        return True

    def flush(self) -> None: ...

    def wait(self, timeout_s: float) -> bool:
        return bool(self._poller.poll(int(1000 * timeout_s) + 1))

    def read(self) -> None: ...

    def next(self) -> list[Any] | None:
        return zeromq.receive(self._socket) if zeromq.is_readable(self._socket) else None

    def give_up(self) -> None:
        """Connect anew. ZeroMQ does so by itself, but never again after something that was not ZeroMQ answered."""
        self._socket.disconnect(self._address)
        self._socket.connect(self._address)

    @property
    def examining(self) -> bool:
        return self._monitor is not None

    def examine(self) -> str | None:
        if self._monitor is None:
            self._monitor = zeromq.Monitor(self._socket, _AGREEMENT_EVENTS)
            self.give_up()
            return None
        for event, _ in self._monitor.take():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._failed = 0
            elif event != zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                return self._mismatch()
            else:
                self._failed += 1
        return _WRONG_KEY if self._encrypted and self._failed >= _MOST_FAILED else None

    def close(self, *, linger: bool = True) -> None:
        if self._monitor is not None:
            self._monitor.close()
        self._socket.close(linger=None if linger else 0)

    def _mismatch(self) -> str:
        return _NOT_ENCRYPTED if self._encrypted else _ENCRYPTED
