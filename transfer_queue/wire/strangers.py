"""TCP connections that have not proved the token: few, for a short time, and with few bytes.

ZeroMQ reads what a connection sends before anybody knows who it is, and has no call that ends one. So its events tell
which descriptors were accepted, the system tells how much came over each, and a connection that goes too far is shut
down underneath. A client that is hit connects again by itself.
"""

from __future__ import annotations

import contextlib
import resource
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import NamedTuple

import zmq

from transfer_queue.wire.zeromq import REFUSED_EVENTS, Monitor

PROVE_WITHIN_S = 10.0
MOST_STRANGERS = 512  # at a Unix socket
YOUNG_S = 2.0  # there, whoever came so recently is not ended for others; they wait

_MOST_BYTES = 1 << 20  # messages that a client had sent to the last life of a server may come before its proof
_TCP_INFO_BYTES = 192
_BYTES_RECEIVED = 128  # offset in struct tcp_info of Linux
_BATCH = 256
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | REFUSED_EVENTS


class _Stranger(NamedTuple):
    since: float
    peer: object


class Strangers:
    """Watches a listening ZeroMQ socket, in the thread of the server: `note` is due when one of `fds` is readable.

    `most` may be there at once, by default half as many as there are descriptors: connections of idle clients count
    after a restart, because ZeroMQ makes them anew and the clients prove the token only when they are used again.
    """

    def __init__(
        self, listening: zmq.Socket[bytes], *, most: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.refused = 0  # connections that failed to agree on a protocol or a key
        self.ended = 0  # connections that were shut down here
        self._clock = clock
        self._most = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 if most is None else most
        self._monitor = Monitor(listening, _EVENTS)
        self._arrivals = select.epoll()  # tells of what comes over which descriptor, though ZeroMQ reads it
        self._strangers: dict[int, _Stranger] = {}  # by descriptor, the oldest first
        self.fds = (self._monitor.fd, self._arrivals.fileno())

    def __len__(self) -> int:
        return len(self._strangers)

    def note(self) -> None:
        """Note who came and who left, and end the connections that send too much or are too many."""
        now = self._clock()
        for event, value in self._monitor.take():
            if event == zmq.EVENT_ACCEPTED:
                self._come(value, now)
            elif event == zmq.EVENT_DISCONNECTED:
                self.proved(value)
            else:
                self.refused += 1
        for fd, _ in self._arrivals.poll(0, _BATCH):
            if _received(fd) > _MOST_BYTES:
                self._end(fd)
        while len(self._strangers) > self._most:
            self._end(next(iter(self._strangers)))

    def look_round(self) -> float | None:
        """End the connections that are due; return the seconds until one is again, None for never."""
        while self._strangers:
            fd, oldest = next(iter(self._strangers.items()))
            left_s = oldest.since + PROVE_WITHIN_S - self._clock()
            if left_s > 0:
                return left_s
            self._end(fd)
        return None

    def proved(self, fd: int) -> None:
        """The connection of this descriptor is one of a client, or ended."""
        if self._strangers.pop(fd, None) is not None:
            with contextlib.suppress(OSError):  # what ZeroMQ closed is not there any more
                self._arrivals.unregister(fd)

    def close(self) -> None:
        self._monitor.close()
        self._arrivals.close()

    def _come(self, fd: int, now: float) -> None:
        self.proved(fd)
        with contextlib.suppress(OSError):
            self._arrivals.register(fd, select.EPOLLIN | select.EPOLLET)
            self._strangers[fd] = _Stranger(now, _peer_of(fd))

    def _end(self, fd: int) -> None:
        stranger = self._strangers.get(fd)
        self.proved(fd)
        if stranger is not None:
            self.ended += _shut_down(fd, stranger.peer)


def _peer_of(fd: int) -> object:
    """Return the address at the other end, which names a connection better than its descriptor does."""
    with contextlib.suppress(OSError), _Borrowed(fd) as connected:
        return connected.getpeername()
    return None


def _received(fd: int) -> int:
    with contextlib.suppress(OSError), _Borrowed(fd) as connected:
        info = connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        if len(info) >= _BYTES_RECEIVED + 8:
            count: int = struct.unpack_from("<Q", info, _BYTES_RECEIVED)[0]
            return count
    return 0


def _shut_down(fd: int, peer: object) -> bool:
    """End a connection, unless ZeroMQ did so meanwhile and the descriptor is another one's."""
    with contextlib.suppress(OSError), _Borrowed(fd) as connected:
        if connected.getpeername() == peer:
            connected.shutdown(socket.SHUT_RDWR)
            return True
    return False


class _Borrowed:
    """A descriptor of ZeroMQ's as a socket, which is not closed at the end."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)

    def __enter__(self) -> socket.socket:
        return self._socket

    def __exit__(self, *error: object) -> None:
        self._socket.detach()
