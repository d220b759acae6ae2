"""The way into a server for its host: a Unix socket. The one for others is `wire.tcp`.

Both belong to the thread of the server. `Watch` tells it which descriptor is ready; what arrived goes to `take` as
(channel, frames), and a channel is what `send` wants to have back.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

from transfer_queue.errors import ConnectionLost
from transfer_queue.wire import strangers
from transfer_queue.wire.holders import lives, pid_behind
from transfer_queue.wire.ports import unix_address
from transfer_queue.wire.security import Gate
from transfer_queue.wire.stream import LINGER_S, MOST_BYTES, Stream

Take: TypeAlias = Callable[[Hashable, Sequence[Any]], None]

_BATCH = 256
_TURN = 8  # messages: half a millisecond of work
_WAITING_CONNECTIONS = 4096
_STRANGER_BYTES = 4096  # of a message, from a connection that has not proved the token


class Watch:
    """Descriptors, and what to call when they are ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, ready: Callable[[], None]) -> None:
        self._epoll.register(fd, select.EPOLLIN)
        self._ready[fd] = ready

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

    __slots__ = ("more", "next", "pid", "sending", "stream", "trusted")

    def __init__(self, stream: Stream, pid: int) -> None:
        self.stream = stream
        self.pid = pid  # of the process that connected
        self.trusted = False  # it has proved the token
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
        self._strangers: dict[Visitor, float] = {}  # since when; they have not proved the token
        self._busy: dict[Visitor, None] = {}
        self.paused = False  # no new connections: too many strangers, or no descriptor or no memory is left
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        bound = False
        try:
            _remove_dead_socket(path)
            self._socket.bind(path)
            bound = True
            os.chmod(path, 0o600)
            self._socket.listen(_WAITING_CONNECTIONS)
            watch.add(self._socket.fileno(), self._accept)
        except OSError as error:
            self._socket.close()
            if bound:  # else the file is another server's
                os.unlink(path)
            raise ConnectionLost(
                f"cannot listen at {self.address}: {error}; is there such a folder, and no other server?"
            ) from error

    def send(self, channel: Visitor, frames: Sequence[Any]) -> bool:
        """Send, together with the answers to what else the channel has asked by now; return whether it is there."""
        sent = channel.stream.send(frames, hold=channel.more)
        self._watch_sending(channel)
        return sent

    def close(self) -> None:
        """Send what is left, for a moment, and end all connections."""
        deadline = time.monotonic() + LINGER_S
        for visitor in list(self._visitors.values()):
            self._end(visitor, max(0.0, deadline - time.monotonic()))
        if not self.paused:
            self._watch.remove(self._socket.fileno())
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self._socket.close()

    def go_on(self) -> bool:
        """Give a turn to each connection with messages left over from its last one; return whether there was any."""
        busy, self._busy = self._busy, {}
        for visitor in busy:
            self._take_turn(visitor)
        return bool(busy)

    def look_round(self) -> None:
        """Now and then: end the connections of dead processes, and listen again if that had to stop.

        A forked child that outlives its parent holds the parent's sockets, so the system does not tell. What the parent
        sent before it died is taken first.
        """
        dead = {pid for pid in {visitor.pid for visitor in self._visitors.values()} if not lives(pid)}
        for visitor in [one for one in self._visitors.values() if one.pid in dead and one.next is None]:
            if visitor.stream.read():
                self._take_turn(visitor)
            else:
                self._end(visitor)
        before = time.monotonic() - strangers.PROVE_WITHIN_S
        for visitor in [one for one, since in self._strangers.items() if since < before]:
            self._end(visitor)
        self._resume()

    @property
    def expecting(self) -> bool:
        """Whether `look_round` has something to wait for."""
        return self.paused or bool(self._strangers)

    def _accept(self) -> None:
        if not self._has_room():
            self._pause()
            return
        try:
            connected, _ = self._socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            self._pause()
            return
        visitor = Visitor(Stream(connected, _STRANGER_BYTES), pid_behind(connected))
        self._watch.add(visitor.stream.fd, lambda: self._receive(visitor))
        self._visitors[visitor.stream.fd] = visitor
        self._strangers[visitor] = time.monotonic()

    def _has_room(self) -> bool:
        """Whether another stranger may come; the oldest one makes room, if it had time enough to prove the token."""
        if len(self._strangers) < strangers.MOST_STRANGERS:
            return True
        oldest, since = next(iter(self._strangers.items()))
        if time.monotonic() - since < strangers.YOUNG_S:
            return False
        self._end(oldest)
        return True

    def _pause(self) -> None:
        if not self.paused:
            self.paused = True
            self._watch.remove(self._socket.fileno())

    def _resume(self) -> None:
        if self.paused:
            self._watch.add(self._socket.fileno(), self._accept)
            self.paused = False

    def _receive(self, visitor: Visitor) -> None:
        if visitor.next is None:  # else there is no hurry to read more
            visitor.stream.read()
            self._take_turn(visitor)

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
            if not visitor.trusted and self._gate.client_of(visitor) is not None:
                visitor.trusted, stream.limit_bytes = True, MOST_BYTES
                del self._strangers[visitor]
                self._resume()
        stream.flush()
        self._watch_sending(visitor)
        if visitor.next is not None:
            self._busy[visitor] = None
        elif stream.broken:
            self._end(visitor)

    def _end(self, visitor: Visitor, linger_s: float = 0.0) -> None:
        del self._visitors[visitor.stream.fd]
        self._busy.pop(visitor, None)
        self._strangers.pop(visitor, None)
        self._watch.remove(visitor.stream.fd)
        visitor.stream.close(linger_s)
        self._gate.forget(visitor, visitor.pid)
        self._resume()

    def _watch_sending(self, visitor: Visitor) -> None:
        if not visitor.stream.broken and visitor.stream.full != visitor.sending:
            visitor.sending = not visitor.sending
            self._watch.want_to_send(visitor.stream.fd, visitor.sending)


def _remove_dead_socket(path: str) -> None:
    """Remove the socket file of a server that was killed; that of a living one stays."""
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
        else:
            if not lives(pid_behind(probe)):
                os.unlink(path)
