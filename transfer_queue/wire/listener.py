"""A connection that stays, for one whom a server tells things unasked."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable
from typing import Any

from transfer_queue.errors import ConnectionLost, NotAuthorized, ProtocolMismatch, from_wire
from transfer_queue.messages import ErrorReply, Reply, Request
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.link import Link
from transfer_queue.wire.requests import RequestIds
from transfer_queue.wire.ticket import Answer, guarded

_WAIT_S = 60.0
_PAUSE_S = 1.0  # after an announcement that was refused


class Listener:
    """Sends `announcement` whenever the server meets it, also after the server was restarted, and takes what it pushes.

    Where the announcement is refused, as by a server that has no room to note it down, it is made again and again.
    `receive` gets each reply to the announcement and each one-way message, in the thread of the listener; a one-way
    message that it returns is sent to the server.
    """

    def __init__(self, peer: Peer, announcement: Request, receive: Callable[[Any], Request | None]) -> None:
        self._announcement = announcement
        self._receive = receive
        self._bell = Bell()
        self._ids = RequestIds()
        self._closed = False
        self._first: Answer | None = None
        self._answered = threading.Event()
        self._again_at: float | None = None
        self._peer = peer
        self._link = self._open()
        self._thread = threading.Thread(target=self._listen, name="transfer_queue listener", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Listener to {self._peer.address}: {'closed' if self._closed else 'listening'}>"

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def announced(self, timeout_s: float) -> Reply:
        """Wait for the first answer to the announcement. Raises what it was refused with, else `ConnectionLost`."""
        if not self._answered.wait(timeout_s):
            raise ConnectionLost(f"{self._peer.address} did not answer within {timeout_s:.1f} s: is the server alive?")
        match self._first:
            case BaseException() as error:
                raise error
            case ErrorReply(name=name, message=message, details=details):
                raise from_wire(name, message, details)
            case reply:
                assert reply is not None
                return reply

    def close(self, timeout_s: float = 5.0) -> None:
        """Stop listening. May be called twice."""
        self._closed = True
        self._bell.ring()
        if threading.get_ident() != self._thread.ident:
            self._thread.join(timeout_s)

    # ------------------------------------------------------------ in the thread of the listener

    def _listen(self) -> None:
        while not self._closed and not isinstance(self._link.failure, NotAuthorized | ProtocolMismatch):
            if self._link.failure is not None:
                self._link.close()
                self._link = self._open()
            self._link.wait(_WAIT_S if self._again_at is None else self._again_at - time.monotonic())
            if self._again_at is not None and time.monotonic() >= self._again_at:
                self._again_at = None
                if self._link.introduced:  # else it is made with the next welcome
                    self._announce()
        self._note(self._link.failure or ConnectionLost(f"the listener to {self._peer.address} was closed"))
        self._link.close()
        self._bell.close()

    def _open(self) -> Link:
        return self._peer.open_link(self._bell.fd, self._take, self._announce)

    def _announce(self) -> None:
        self._again_at = None
        number, floor = self._ids.take()
        frames = encode_message(self._announcement, number, floor)
        self._link.post(number, frames, functools.partial(self._reply, number))

    def _reply(self, number: int, answer: Answer) -> None:
        self._ids.answered(number)
        if isinstance(answer, ErrorReply):
            self._again_at = time.monotonic() + _PAUSE_S
        elif not isinstance(answer, BaseException):
            self._take(answer)
        self._note(answer)

    def _take(self, message: Any) -> None:
        back, _ = guarded(self._receive, message)
        if back is not None:
            self._link.notify(encode_message(back))

    def _note(self, answer: Answer) -> None:
        if self._first is None:
            self._first = answer
            self._answered.set()
