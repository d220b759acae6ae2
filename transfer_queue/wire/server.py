"""A server: one thread, one door for its host and one for others, one handler.

Each turn of the loop does what is due, reads what arrived, hands requests to the handler and sends what was answered.
The handler decides everything; answers may come from any thread. What is sent to a peer that is gone comes back to the
handler as `lost`. Clients that wait longer than a second, or hold what goes back when they are gone, are looked at each
second, so that their death is noticed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from transfer_queue.messages import Reply
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.desk import Desk
from transfer_queue.wire.doors import UnixDoor, Visitor, Watch
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.tcp import TcpDoor
from transfer_queue.wire.ticket import Handler, Ticket, guarded

__all__ = ["Handler", "Server", "Ticket"]

PING_INTERVAL_S = 1.0

_IDLE_S = 5.0


class Server:
    """Serves `handler` from `start()` to `close()`.

    `local_path`   socket file, at most 100 bytes, in a folder of the session; None: none
    `tcp_host`     address to listen at and to tell others; None: no tcp
    `tcp_port`     0 takes a free one outside the range of outgoing connections
    `curve`        keys that encrypt tcp; a server that is started again needs the same; None: no encryption
    `requests`     what an earlier life of this server answered
    """

    def __init__(
        self,
        handler: Handler,
        token: bytes,
        *,
        local_path: str | None,
        tcp_host: str | None = "127.0.0.1",
        tcp_port: int = 0,
        curve: CurveKeys | None = None,
        requests: RequestTable | None = None,
        name: str = "server",
    ) -> None:
        self._desk = Desk(handler, token, self._send, self._reaches, self._deliver, requests, settle_all=self._settle)
        self._outbox: deque[Callable[[], None]] = deque()
        self._next_ping = time.monotonic() + PING_INTERVAL_S
        self._active = False  # something came since the last round of pings
        self._bell = Bell()
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name=f"transfer_queue {name}", daemon=True)
        self._watch = Watch()
        self._watch.add(self._bell.fd, self._bell.hush)
        self._unix: UnixDoor | None = None
        self._tcp: TcpDoor | None = None
        self._encrypted = curve is not None
        self._refused = 0
        try:
            if local_path is not None:
                self._unix = UnixDoor(local_path, self._watch, self._take, self._desk.gate)
            if tcp_host is not None:
                self._tcp = TcpDoor(tcp_host, tcp_port, self._watch, self._take, self._desk.gate, curve)
        except BaseException:
            self._end()
            raise
        self.local_address = "" if self._unix is None else self._unix.address
        self.address = "" if self._tcp is None else self._tcp.address

    def __repr__(self) -> str:
        state = "closed" if self._closing else "serving" if self._thread.is_alive() else "not started"
        where = " and ".join(filter(None, (self.local_address, self.address)))
        return f"<Server at {where}: {state}, {len(self._desk.waiting)} requests waiting>"

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def auth_failures(self) -> int:
        """How often a connection failed to prove the token, or did not have the key."""
        return self._desk.gate.auth_failures + (self._refused_by_zeromq() if self._encrypted else 0)

    @property
    def malformed(self) -> int:
        """How many messages could not be decoded, and connections that did not speak ZeroMQ's protocol."""
        return self._desk.malformed + (0 if self._encrypted else self._refused_by_zeromq())

    @property
    def failures(self) -> int:
        """How often the handler raised what it should not."""
        return self._desk.failures

    def serve_by(self, handler: Handler) -> None:
        """Give requests to another handler from now on, one that works on the same as the handler so far."""
        self._desk.serve_by(handler)

    def start(self) -> Server:
        self._thread.start()
        return self

    def push(self, channel: Hashable, message: Any) -> None:
        """Send a one-way message to the channel that a ticket named, from any thread; lost if it is gone.

        A channel of this process is a callable: it is called in the thread of the server.
        """
        self._post(lambda: self._send_push(channel, message))

    def wake(self) -> None:
        """Make the server ask the handler again what is due; from any thread."""
        self._bell.ring()

    def close(self, timeout_s: float = 5.0) -> None:
        """Send what was answered and stop. Requests that wait get no answer. May be called twice."""
        self._closing = True
        if self._thread.ident is None:
            self._end()
        else:
            self._bell.ring()
            self._thread.join(timeout_s)

    # ------------------------------------------------------------ the loop

    def _serve(self) -> None:
        while not self._closing:
            _, error = guarded(self._take_turn)  # whatever it is, the others are served
            self._desk.failures += error is not None
        guarded(self._settle)
        self._end()

    def _take_turn(self) -> None:
        wait_s = self._do_what_is_due()
        self._settle()
        if self._unix is not None and self._unix.go_on():
            wait_s = 0.0
        if self._tcp is not None and self._tcp.stirred:
            self._tcp.receive()
            wait_s = 0.0
        self._watch.wait(wait_s)
        self._settle()

    def _end(self) -> None:
        self._refused = self._refused_by_zeromq()
        doors, self._unix, self._tcp = (self._unix, self._tcp), None, None
        for door in doors:
            if door is not None:
                door.close()
        self._watch.close()
        self._bell.close()

    def _do_what_is_due(self) -> float:
        """Return the seconds until something is due again."""
        due_s = self._desk.due()
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + PING_INTERVAL_S
            self._active = False
            self._desk.ping(PING_INTERVAL_S)
            if self._unix is not None:
                self._unix.look_round()
        strangers_s = None if self._tcp is None else self._tcp.look_round()
        hurry = self._active or self._desk.watching or (self._unix is not None and self._unix.expecting)
        wait_s = self._next_ping - now if hurry else _IDLE_S
        return max(0.0, min(each for each in (wait_s, due_s, strangers_s) if each is not None))

    def _refused_by_zeromq(self) -> int:
        return self._refused if self._tcp is None else self._tcp.refused

    def _take(self, channel: Hashable, frames: Sequence[Any]) -> None:
        self._active = True
        self._desk.receive(channel, frames)
        self._settle()

    def _send(self, channel: Hashable, frames: Sequence[Any]) -> bool:
        if isinstance(channel, Visitor):
            return self._unix is not None and self._unix.send(channel, frames)
        return isinstance(channel, bytes) and self._tcp is not None and self._tcp.send(channel, frames)

    def _reaches(self, channel: Hashable) -> bool:
        if isinstance(channel, Visitor):
            return True  # the end of one shows by itself
        return isinstance(channel, bytes) and self._tcp is not None and self._tcp.reaches(channel)

    def _send_push(self, channel: Hashable, message: Any) -> None:
        if callable(channel):
            channel(message)
        else:
            self._send(channel, encode_message(message))

    def _deliver(self, ticket: Ticket, reply: Reply) -> None:
        self._post(lambda: self._desk.settle(ticket, reply))

    def _post(self, action: Callable[[], None]) -> None:
        """Let the thread of the server do something; from any thread."""
        self._outbox.append(action)
        if threading.get_ident() != self._thread.ident:
            self._bell.ring()

    def _settle(self) -> None:
        """Do what was posted."""
        while self._outbox:
            self._outbox.popleft()()
