"""A server: one thread, one ROUTER socket, one handler.

Each turn of the loop does what is due, reads what arrived, hands requests to the handler and sends what was answered.
The handler decides everything; answers may come from any thread. What is sent to a peer that is gone comes back to the
handler as `lost`. Clients that wait longer than a second are pinged, so that their death is noticed.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import zmq

from transfer_queue.errors import ConnectionLost
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.codec import MAX_FRAME_BYTES, MAX_FRAMES, encode_message
from transfer_queue.wire.desk import Desk
from transfer_queue.wire.ports import ipc_address, random_ports, tcp_address
from transfer_queue.wire.ticket import Answer, Handler, Ticket

__all__ = ["Handler", "Server", "Ticket"]

HIGH_WATER_MARK = 16384
PING_INTERVAL_S = 1.0
LINGER_MS = 250

_BATCH = 256
_IDLE_S = 5.0
_COPIED_FRAMES = 2  # header and body; the buffers behind them are handed on as they are


class Server:
    """Serves `handler` from `start()` to `close()`.

    `local_path`   socket file, at most 100 bytes, in a folder of the session; None: no ipc
    `tcp_host`     address to listen at and to tell others; None: no tcp
    `tcp_port`     0 takes a free one outside the range of outgoing connections
    """

    def __init__(
        self,
        handler: Handler,
        token: bytes,
        *,
        local_path: str | None,
        tcp_host: str | None = "127.0.0.1",
        tcp_port: int = 0,
        name: str = "server",
    ) -> None:
        self._desk = Desk(handler, token, self._send, self._deliver)
        self._outbox: deque[Callable[[], None]] = deque()
        self._next_ping = time.monotonic() + PING_INTERVAL_S
        self._bell = Bell()
        self._closing = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._thread = threading.Thread(target=self._serve, name=f"transfer_queue {name}", daemon=True)
        try:
            self.local_address, self.address = self._bind(local_path, tcp_host, tcp_port)
        except BaseException:
            self._end_sockets()
            raise

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
        """How often a connection failed to prove the token."""
        return self._desk.gate.auth_failures

    @property
    def malformed(self) -> int:
        """How many messages could not be decoded."""
        return self._desk.malformed

    @property
    def failures(self) -> int:
        """How often the handler raised what it should not."""
        return self._desk.failures

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
            self._end_sockets()
        else:
            self._bell.ring()
            self._thread.join(timeout_s)

    # ------------------------------------------------------------ sockets

    def _bind(self, local_path: str | None, tcp_host: str | None, tcp_port: int) -> tuple[str, str]:
        options = {
            zmq.ROUTER_MANDATORY: 1,
            zmq.LINGER: LINGER_MS,
            zmq.SNDHWM: HIGH_WATER_MARK,
            zmq.RCVHWM: HIGH_WATER_MARK,
            zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
            zmq.HEARTBEAT_IVL: 5000,
            zmq.HEARTBEAT_TIMEOUT: 30000,
            zmq.IPV6: int(tcp_host is not None and ":" in tcp_host),
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        local_address = "" if local_path is None else self._bind_ipc(local_path)
        return local_address, "" if tcp_host is None else self._bind_tcp(tcp_host, tcp_port)

    def _bind_ipc(self, path: str) -> str:
        address = ipc_address(path)
        try:
            self._socket.bind(address)
            os.chmod(path, 0o600)
        except (zmq.ZMQError, OSError) as error:
            raise ConnectionLost(f"cannot listen at {address}: {error}; its folder has to exist") from error
        return address

    def _bind_tcp(self, host: str, port: int) -> str:
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

    def _end_sockets(self) -> None:
        self._socket.close()
        self._context.term()
        self._bell.close()

    # ------------------------------------------------------------ the loop

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._bell.fd, zmq.POLLIN)
        while not self._closing:
            wait_s = self._do_what_is_due()
            self._flush()
            poller.poll(math.ceil(1000 * wait_s))
            self._bell.hush()
            for _ in range(_BATCH):
                if not self._receive():
                    break
                self._flush()
        self._flush()
        self._end_sockets()

    def _do_what_is_due(self) -> float:
        """Return the seconds until something is due again."""
        due_s = self._desk.due()
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + PING_INTERVAL_S
            self._desk.ping(PING_INTERVAL_S)
        wait_s = self._next_ping - now if self._desk.waiting else _IDLE_S
        return max(0.0, wait_s if due_s is None else min(wait_s, due_s))

    def _receive(self) -> bool:
        """Read one message, if there is one. Frames of strangers and frames without number are read and dropped."""
        if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            return False
        identity = self._socket.recv(zmq.NOBLOCK)
        frames: list[Any] = []
        count = 0
        while self._socket.getsockopt(zmq.RCVMORE):
            frame = self._socket.recv(copy=count < _COPIED_FRAMES)
            count += 1
            if count <= MAX_FRAMES + _COPIED_FRAMES:
                frames.append(frame.buffer if isinstance(frame, zmq.Frame) else frame)
        if frames:
            self._desk.receive(identity, frames)
        return True

    def _send(self, channel: Hashable, frames: Sequence[Any]) -> bool:
        try:
            small = len(frames) <= _COPIED_FRAMES
            self._socket.send_multipart([cast("bytes", channel), *frames], zmq.NOBLOCK, copy=small)
        except zmq.ZMQError as error:
            if error.errno in (errno.EHOSTUNREACH, errno.EAGAIN):
                return False
            raise
        return True

    def _send_push(self, channel: Hashable, message: Any) -> None:
        if callable(channel):
            channel(message)
        else:
            self._send(channel, encode_message(message))

    def _deliver(self, ticket: Ticket, answer: Answer) -> None:
        self._post(lambda: self._desk.settle(ticket, answer))

    def _post(self, action: Callable[[], None]) -> None:
        """Let the thread of the server do something; from any thread."""
        self._outbox.append(action)
        if threading.get_ident() != self._thread.ident:
            self._bell.ring()

    def _flush(self) -> None:
        while self._outbox:
            self._outbox.popleft()()
