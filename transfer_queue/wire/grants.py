"""What a client has of a server, so that nothing stays granted because a message was lost.

Spans and pins are granted to requests and given back by one-way messages, which may get lost with a connection, with a
server, or with a request that was withdrawn. So the first message on each connection tells what is still held
(`StillHeld`); the server ends the rest. A message that certainly did not arrive, and the end of the client, are told
without waiting for the next use of a connection, by a `Courier`. What is lost unnoticed, because the server died with
the message already in its socket, is told with the next use. An abort names blocks that `StillHeld` may say nothing of;
over TCP, where no courier goes, a link keeps it and sends it on each new connection, until an answer shows that it
arrived.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import (
    AbortBlocks,
    GetUnitStats,
    Pin,
    Pinned,
    Reserve,
    Reserved,
    ReturnSpan,
    StillHeld,
    Unpin,
    int64s_of,
)
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.link import Link
from transfer_queue.wire.ports import is_unix_address, unix_path
from transfer_queue.wire.requests import RequestIds
from transfer_queue.wire.ticket import Answer

_WAIT_S = 1.0
_MORE_PAUSE_S = 0.01  # with each attempt: a server that stays away costs less and less
_LAST_TRIES_S = 60.0  # once the client is closed

GRANTED = (Reserve, Pin)
"""What these are answered with is held until it is given back, or until the server hears that it is not."""


class Grants:
    """What one client has of one server. Thread-safe.

    unput   blocks that it wrote or is writing, and that it may still put; added before the first byte is written
    """

    def __init__(self, ids: RequestIds) -> None:
        self.unput: set[int] = set()
        self._ids = ids
        self._held: dict[Hashable, int] = {}  # the request that it was granted to
        self._used = False
        self._lock = threading.Lock()

    @property
    def used(self) -> bool:
        """Whether there was ever anything to give back."""
        return self._used

    def concluded(self, request: Any, request_id: int, outcome: Any) -> None:
        """A request ends like this for who made it. To be called before its id is given up."""
        if isinstance(request, GRANTED):
            self._used = True
            with self._lock:
                match outcome:
                    case Reserved(span=number):
                        self._held[ReturnSpan, number] = request_id
                    case Pinned(pin=number):
                        self._held[Unpin, number] = request_id

    def given_back(self, request: Any) -> bool:
        """Note what is about to be given back; return whether this message does that."""
        match request:
            case ReturnSpan(span=number) | Unpin(pin=number):
                with self._lock:
                    self._held.pop((type(request), number), None)
            case AbortBlocks(blocks=blocks):
                self.unput.difference_update(blocks.tolist())
            case _:
                return False
        return True

    def preface(self) -> list[Any] | None:
        """Return the frames that say what is held at this moment; None if there never was anything."""
        if not self._used:
            return None
        # In this order: what is granted meanwhile was under way before, and what is asked meanwhile has a higher id.
        before, under_way = self._ids.under_way()
        with self._lock:
            requests = {*under_way, *self._held.values()}
        blocks = tuple(self.unput)
        told = StillHeld(before=before, requests=int64s_of(requests), blocks=int64s_of(blocks))
        return encode_message(told)


class Courier:
    """Tells a server of this host what a client has, in a thread, until it knows or is gone for good.

    Once the client is closed it tries for one minute more after each thing to tell. A server that comes back later
    learns it when this process ends. For a server elsewhere this is not needed: it notices who has no connection.
    """

    def __init__(self, address: str, ids: RequestIds, open_link: Callable[[int], Link]) -> None:
        """`open_link` makes a link with a preface, under the name of the client."""
        self._folder = os.path.dirname(unix_path(address)) if is_unix_address(address) else None
        self._ids = ids
        self._open_link = open_link
        self._lock = threading.Lock()
        self._running = False
        self._messages: list[list[Any]] = []
        self._told = True
        self._closed = False
        self._asked_at = 0.0  # when there was something to tell last

    def send(self, frames: list[Any] | None = None) -> None:
        """Tell soon what is held then, and deliver a message that could not be sent. May be called at any time."""
        if self._folder is None:
            return
        with self._lock:
            self._told = False
            self._asked_at = time.monotonic()
            if frames is not None:
                self._messages.append(frames)
            if self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._run, name="tq-courier", daemon=True).start()
        except RuntimeError:  # the interpreter ends, and with this process all that it holds
            self._running = False

    def close(self) -> None:
        """The client is closed: it is not worth while to try for ever any more."""
        self._closed = True

    @property
    def _too_late(self) -> bool:
        return self._closed and time.monotonic() - self._asked_at > _LAST_TRIES_S

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._told or self._too_late:
                    self._running = False
                    self._messages.clear()
                    return
                self._told = True
                messages, self._messages = self._messages, []
            try:
                self._deliver(messages)
            except (ConnectionLost, OSError):  # this process has no descriptor left now
                time.sleep(_WAIT_S)
                with self._lock:
                    self._told = False
                    self._messages = messages + self._messages

    def _deliver(self, messages: list[list[Any]]) -> None:
        bell = Bell()
        number, floor = self._ids.take()
        try:
            with contextlib.closing(self._open_link(bell.fd)) as link:
                while not self._delivered(link, messages, encode_message(GetUnitStats(), number, floor), number):
                    pass
        finally:
            self._ids.answered(number)
            bell.close()

    def _delivered(self, link: Link, messages: list[list[Any]], question: list[Any], number: int) -> bool:
        """Try once. The answer to a question that comes last shows that all of it arrived."""
        pause_s = 0.0
        while not link.introduced:
            if self._too_late or not os.path.exists(self._folder or ""):
                return True
            link.wait(_WAIT_S)
            time.sleep(pause_s)
            pause_s = min(pause_s + _MORE_PAUSE_S, _WAIT_S)
        answers: list[Answer] = []
        for frames in messages:
            link.notify(frames)
        link.post(number, question, answers.append)
        while link.introduced and not answers:
            link.wait(_WAIT_S)
        link.drop(number, cancel=False)
        return bool(answers)
