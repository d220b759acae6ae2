"""The place where a server and what it serves meet: requests go in with a ticket, answers come back through it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

from transfer_queue.messages import Reply, Request

log = logging.getLogger(__name__)

T = TypeVar("T")
Answer: TypeAlias = Reply | BaseException


class Ticket:
    """One request that waits for its answer. `channel` names the connection that asked; it may change when the
    client reconnects. `abandoned`: nobody waits any more, so an answer would be lost. While it is handed in: `frames`,
    the request as it came, if it did; `send`, to be called without locks, lets answers go out before `submit` returns,
    None where they do by themselves."""

    __slots__ = (
        "_deliver",
        "_lock",
        "abandoned",
        "answered",
        "channel",
        "client_id",
        "frames",
        "request",
        "request_id",
        "send",
    )

    def __init__(
        self,
        client_id: str,
        request_id: int,
        channel: Hashable,
        request: Any,
        deliver: Callable[[Ticket, Answer], None],
    ) -> None:
        self.client_id = client_id
        self.request_id = request_id
        self.channel = channel
        self.request = request
        self.frames: Sequence[Any] | None = None
        self.send: Callable[[], None] | None = None
        self.answered = False
        self.abandoned = False
        self._deliver = deliver
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        state = "answered" if self.answered else "abandoned" if self.abandoned else "waiting"
        return f"<Ticket {type(self.request).__name__} {self.request_id} of client {self.client_id!r}: {state}>"

    def answer(self, answer: Answer) -> None:
        """Answer, exactly once, from any thread. Returns at once and calls nothing of the handler."""
        with self._lock:
            assert not self.answered, f"{self!r} was answered twice"
            self.answered = True
        self._deliver(self, answer)

    def watch(self, seen: Callable[[Answer], None]) -> None:
        """Show the answer to somebody before it goes out, in the thread that gives it. Before the request is taken."""
        deliver = self._deliver

        def deliver_both(ticket: Ticket, answer: Answer) -> None:
            self._deliver = deliver  # a ticket may be kept for long after its answer
            seen(answer)
            deliver(ticket, answer)

        self._deliver = deliver_both


class Handler(Protocol):
    """What is served. Called by the server thread and, in process, by any thread; never re-entered from `answer`."""

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Take a request; its ticket is answered now or later. For one-way messages the ticket is ignored."""

    def tick(self) -> float | None:
        """Do what is due; return the seconds until something is due again, None for nothing."""

    def lost(self, ticket: Ticket, reply: Reply | None) -> None:
        """Nobody gets this answer (None: nobody waits for one): the client is gone or withdrew the request.

        What only the receiver of the reply could give back has to be taken back now. The request of a ticket is None
        if its answer was sent before, or in an earlier life of the server.
        """

    def gone(self, client_id: str) -> None:
        """Every connection of this client ended, and it did not come back."""

    def holding(self) -> Collection[str]:
        """Return the clients that hold what goes back when they are gone: the connections of these are looked at."""


def guarded(function: Callable[..., T], *args: Any) -> tuple[T | None, Exception | None]:
    """Call into a handler; return (result, error). A bug in there must end neither the server nor other requests."""
    try:
        return function(*args), None
    except Exception as error:
        log.exception("%s failed", getattr(function, "__qualname__", function))
        return None, error
