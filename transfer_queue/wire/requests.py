"""Which requests are under way or were answered, so that sending one again gives its one true outcome.

The client numbers its requests upwards and tells with each the lowest number it still waits for (`RequestIds`); below
it, the server may forget (`RequestTable`).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from typing import NamedTuple

from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import (
    AbortGroup,
    Clear,
    Draw,
    Pin,
    Put,
    RegisterSampler,
    Reply,
    Reserve,
    ResetConsumption,
    SealGroup,
    SetTags,
)
from transfer_queue.wire.security import Bounded
from transfer_queue.wire.ticket import Ticket

GIVEN_BACK = (Draw, Reserve, Pin)  # an answer that nobody gets is taken back, so the request may run again
REMEMBERED = (*GIVEN_BACK, Put, SetTags, Clear, ResetConsumption, SealGroup, AbortGroup, RegisterSampler)


def name_on_wire(client_id: str) -> str:
    """Return a client id that no other peer, process or forked child has ever had: request ids belong to it."""
    return f"{client_id}/{secrets.token_hex(SUFFIX_BYTES)}"


class RequestIds:
    """The numbers of one client's requests. They start anywhere and go up; thread safe."""

    def __init__(self, *, open_outcomes: int = 256) -> None:
        self._next = 1 + secrets.randbits(40)
        self._unanswered: OrderedDict[int, None] = OrderedDict()
        self._unresolved: OrderedDict[int, None] = OrderedDict()
        self._open_outcomes = open_outcomes
        self._lock = threading.Lock()

    def take(self, again: int | None = None) -> tuple[int, int]:
        """Return (request id, floor). `again`: an id whose outcome is open."""
        with self._lock:
            if again is None:
                again = self._next
                self._next += 1
            self._unresolved.pop(again, None)
            self._unanswered.setdefault(again)
            return again, min(again, next(iter(self._unanswered)))

    def answered(self, request_id: int) -> None:
        with self._lock:
            self._unanswered.pop(request_id, None)

    def unresolved(self, request_id: int) -> None:
        """No answer came; keep the id, because the caller may ask for the outcome. The oldest such are given up."""
        with self._lock:
            self._unresolved[request_id] = None
            if len(self._unresolved) > self._open_outcomes:
                self._unanswered.pop(self._unresolved.popitem(last=False)[0], None)


SUFFIX_BYTES = 6

_IDLE_S = 600.0
_SWEEP_S = 10.0


class Answered(NamedTuple):
    """An answer that was sent, and to which request."""

    ticket: Ticket
    reply: Reply


class _Client:
    __slots__ = ("answers", "floor", "forgotten", "heard", "waiting")

    def __init__(self) -> None:
        self.heard = 0.0
        self.floor = 0
        self.forgotten = 0  # highest id whose answer had to make room for others
        self.waiting: dict[int, Ticket] = {}
        self.answers: OrderedDict[int, Answered] = OrderedDict()


class RequestTable:
    """The requests of all clients, used by the server thread alone.

    Bounded in clients and in answers of each; clients without requests under way are forgotten after ten minutes.
    """

    def __init__(self, *, clients: int = 4096, answers: int = 4096) -> None:
        self._clients: Bounded[str, _Client] = Bounded(clients)
        self._answers = answers
        self._next_sweep = 0.0

    def find(self, client_id: str, request_id: int, floor: int) -> Ticket | Answered | None:
        """Return what is known of a request: its ticket if it waits, its answer if it had one, None if it is new.

        Raises `ConnectionLost` if it may have been answered, but the answer is not known any more.
        """
        client = self._clients.get(client_id)
        if client is None:
            client = _Client()
            self._clients.put(client_id, client)
        client.heard = time.monotonic()
        if client.heard >= self._next_sweep:
            self._next_sweep = client.heard + _SWEEP_S
            self._forget_idle(client.heard - _IDLE_S)
        client.floor = max(client.floor, floor)
        while client.answers and next(iter(client.answers)) < client.floor:
            client.answers.popitem(last=False)
        found = client.waiting.get(request_id) or client.answers.get(request_id)
        if found is None and (request_id < client.floor or request_id <= client.forgotten):
            raise ConnectionLost(
                f"the outcome of request {request_id} of client {client_id!r} is not known any more: look at the data",
                request_id=request_id,
            )
        return found

    def wait(self, ticket: Ticket) -> None:
        """Note a new request."""
        client = self._clients.get(ticket.client_id)
        if client is not None:
            client.waiting[ticket.request_id] = ticket

    def answered(self, ticket: Ticket, reply: Reply) -> None:
        """Note the answer, if sending the request again must not do it again."""
        client = self._clients.get(ticket.client_id)
        if client is None:
            return
        client.waiting.pop(ticket.request_id, None)
        if isinstance(ticket.request, REMEMBERED) and ticket.request_id >= client.floor:
            client.answers[ticket.request_id] = Answered(ticket, reply)
            if len(client.answers) > self._answers:
                client.forgotten = max(client.forgotten, client.answers.popitem(last=False)[0])

    def withdraw(self, client_id: str, request_id: int) -> Ticket | Answered | None:
        """Return what has to be taken back when nobody waits for a request any more, and forget it.

        That is its ticket if it waits, its answer if it is of a kind that is given back, else None.
        """
        client = self._clients.get(client_id)
        if client is None:
            return None
        answered = client.answers.get(request_id)
        if answered is None:
            return client.waiting.pop(request_id, None)
        if not isinstance(answered.ticket.request, GIVEN_BACK):
            return None
        return client.answers.pop(request_id)

    def _forget_idle(self, before: float) -> None:
        while (oldest := self._clients.oldest()) is not None and oldest[1].heard < before and not oldest[1].waiting:
            self._clients.pop(oldest[0])
