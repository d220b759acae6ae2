"""Which requests are under way or were answered, so that sending one again gives its one true outcome.

The client numbers its requests upwards and tells with each the lowest number it still waits for (`RequestIds`); below
it, the server may forget (`RequestTable`).
"""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from transfer_queue.errors import ConnectionLost, DecodeError, InvalidArgument
from transfer_queue.messages import (
    MESSAGE_TYPES,
    AbortGroup,
    Ack,
    AckMany,
    Admit,
    Clear,
    Draw,
    Drop,
    Pin,
    Put,
    RegisterSampler,
    Release,
    Renew,
    Reply,
    Reserve,
    ResetConsumption,
    Restore,
    SealGroup,
    SetTags,
)
from transfer_queue.wire.security import MAX_CLIENT_ID_BYTES, Bounded
from transfer_queue.wire.ticket import Ticket

GIVEN_BACK = (Draw, Reserve, Pin, Admit)  # an answer that nobody gets is taken back, so the request may run again
_LASTING = (
    *(Put, SetTags, Clear, ResetConsumption, SealGroup, AbortGroup, RegisterSampler, Restore),
    *(Ack, AckMany, Release, Renew, Drop),
)
REMEMBERED = (*GIVEN_BACK, *_LASTING)

_CODES = {cls: code for code, cls in MESSAGE_TYPES.items()}


def name_on_wire(client_id: str) -> str:
    """Return a client id that no other peer, process or forked child has ever had: request ids belong to it.

    Raises `InvalidArgument` for a client id that no server would take.
    """
    size, most = len(client_id.encode()), MAX_CLIENT_ID_BYTES - 2 * SUFFIX_BYTES - 1
    if size > most:
        raise InvalidArgument(
            f"a client id has at most {most} bytes, not {size}: choose a shorter one than {client_id!r}"
        )
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

    def under_way(self) -> tuple[int, tuple[int, ...]]:
        """Return an id above all that were taken, and those that are not answered."""
        with self._lock:
            return self._next, tuple(self._unanswered)

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
_PASSED = 1 << 14  # clients of which only the last request is remembered; some 4 MB


Dumped: TypeAlias = tuple[str, int, int, list[tuple[int, int, Reply]]]
"""Client id, floor, forgotten, [(request id, code of the request's type, reply)]."""


class Answered(NamedTuple):
    """An answer that was given, and to which request. The ticket has no request any more once the answer was sent."""

    ticket: Ticket
    kind: type[Any]
    reply: Reply


class _Client:
    __slots__ = ("answers", "floor", "forgotten", "heard", "waiting")

    def __init__(self, floor: int = 0, forgotten: int = 0) -> None:
        self.heard = time.monotonic()
        self.floor = floor
        self.forgotten = forgotten  # highest id whose answer had to make room for others
        self.waiting: dict[int, Ticket] = {}
        self.answers: OrderedDict[int, Answered] = OrderedDict()

    def keep(self, answered: Answered, most: int) -> None:
        """Note an answer; the one that was given first makes room if there are too many."""
        if answered.ticket.request_id < self.floor:
            return
        self.answers[answered.ticket.request_id] = answered
        if len(self.answers) > most:
            self.forgotten = max(self.forgotten, self.answers.popitem(last=False)[0])

    def raise_floor(self, floor: int) -> None:
        """Forget what the client does not wait for any more."""
        self.floor = max(self.floor, floor)
        while self.answers and next(iter(self.answers)) < self.floor:
            self.answers.popitem(last=False)

    def last(self) -> int:
        """The highest id that may have been answered."""
        return max(self.floor - 1, self.forgotten, max(self.answers, default=0))


class RequestTable:
    """The requests of all clients. Thread safe: answers are noted by whoever gives them.

    Bounded in clients and in answers of each. The answers of clients without requests under way are forgotten after ten
    minutes; of the last 16384 such clients it is remembered up to which id they are, so that none runs again: sent
    again, it is refused. What was answered outlives the server by `dump` and `load`, and by `restore` for what came
    after the dump.
    """

    def __init__(self, *, clients: int = 4096, answers: int = 4096, passed: int = _PASSED) -> None:
        self._most_clients = clients
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # the one that was not heard of for longest first
        self._passed: Bounded[str, int] = Bounded(passed)  # highest id of clients whose answers are forgotten
        self._answers = answers
        self._next_sweep = 0.0
        self._lock = threading.Lock()

    def find(self, client_id: str, request_id: int, floor: int) -> Ticket | Answered | None:
        """Return what is known of a request: its ticket if it waits, its answer if it had one, None if it is new.

        Raises `ConnectionLost` if it may have been answered, but the answer is not known any more.
        """
        with self._lock:
            client = self._client(client_id)
            client.heard = time.monotonic()
            if client.heard >= self._next_sweep:
                self._next_sweep = client.heard + _SWEEP_S
                self._forget_idle(client.heard - _IDLE_S)
            client.raise_floor(floor)
            found = client.waiting.get(request_id) or client.answers.get(request_id)
            if found is None and (request_id < client.floor or request_id <= client.forgotten):
                raise ConnectionLost(
                    f"the outcome of request {request_id} of client {client_id!r} is not known any more: look at the "
                    "data",
                    request_id=request_id,
                )
            return found

    def wait(self, ticket: Ticket) -> None:
        """Note a new request."""
        with self._lock:
            self._client(ticket.client_id).waiting[ticket.request_id] = ticket

    def answered(self, ticket: Ticket, reply: Reply) -> None:
        """Note the answer, if sending the request again must not do it again."""
        with self._lock:
            client, kind = self._client(ticket.client_id), type(ticket.request)
            waited = client.waiting.get(ticket.request_id) is ticket
            if waited:
                del client.waiting[ticket.request_id]
            if kind in (REMEMBERED if waited else _LASTING):
                client.keep(Answered(ticket, kind, reply), self._answers)

    def withdraw(self, client_id: str, request_id: int) -> Ticket | Answered | None:
        """Return what has to be taken back when nobody waits for a request any more, and forget it.

        That is its ticket if it waits, its answer if it is of a kind that is given back, else None.
        """
        with self._lock:
            client = self._clients.get(client_id)
            if client is None:
                return None
            answered = client.answers.get(request_id)
            if answered is None:
                return client.waiting.pop(request_id, None)
            return client.answers.pop(request_id) if answered.kind in GIVEN_BACK else None

    def discard(self, ticket: Ticket) -> None:
        """Forget that this request waits, or its answer if that was given back."""
        with self._lock:
            client = self._clients.get(ticket.client_id)
            if client is None:
                return
            if client.waiting.get(ticket.request_id) is ticket:
                del client.waiting[ticket.request_id]
            answered = client.answers.get(ticket.request_id)
            if answered is not None and answered.ticket is ticket and answered.kind in GIVEN_BACK:
                del client.answers[ticket.request_id]

    # ------------------------------------------------------------ over a restart

    def dump(self) -> list[Dumped]:
        """Return all that was answered; requests under way are sent again by their clients."""
        with self._lock:
            passed: list[Dumped] = [(client_id, 0, last, []) for client_id, last in self._passed.items()]
            return passed + [
                (client_id, client.floor, client.forgotten, [_dumped(each) for each in client.answers.values()])
                for client_id, client in self._clients.items()
            ]

    def load(self, dumped: Iterable[Sequence[Any]]) -> None:
        """Take over what another table dumped. Raises `DecodeError` for what no table can have dumped."""
        with self._lock:
            for client_id, floor, forgotten, answers in dumped:
                if not answers:
                    self._pass(client_id, max(floor - 1, forgotten))
                    continue
                client = self._client(client_id)
                client.floor, client.forgotten = floor, forgotten
                for request_id, code, reply in answers:
                    if code not in MESSAGE_TYPES:
                        raise DecodeError(f"request {request_id} of client {client_id!r} has the unknown type {code}")
                    client.keep(_restored(client_id, request_id, MESSAGE_TYPES[code], reply), self._answers)

    def restore(self, client_id: str, request_id: int, request: Any, reply: Reply) -> None:
        """Note that a request (or a request of this type) was answered. The floor comes with the next message."""
        kind = request if isinstance(request, type) else type(request)
        if request_id and kind in REMEMBERED:
            with self._lock:
                restored = _restored(client_id, request_id, kind, reply)
                self._client(client_id).keep(restored, self._answers)

    # ------------------------------------------------------------ inside, under the lock

    def _client(self, client_id: str) -> _Client:
        client = self._clients.get(client_id)
        if client is None:
            client = self._clients[client_id] = _Client(forgotten=self._passed.pop(client_id) or 0)
            if len(self._clients) > self._most_clients:
                idle = (name for name, other in self._clients.items() if not other.waiting and name != client_id)
                if (oldest := next(idle, None)) is not None:
                    self._forget(oldest)
        else:
            self._clients.move_to_end(client_id)
        return client

    def _forget_idle(self, before: float) -> None:
        while self._clients:
            client_id, client = next(iter(self._clients.items()))
            if client.heard >= before or client.waiting:
                return
            self._forget(client_id)

    def _forget(self, client_id: str) -> None:
        self._pass(client_id, self._clients.pop(client_id).last())

    def _pass(self, client_id: str, last: int) -> None:
        """Of this client nothing is known but its last request."""
        if last:
            self._passed.put(client_id, last)


def _restored(client_id: str, request_id: int, kind: type[Any], reply: Reply) -> Answered:
    ticket = Ticket(client_id, request_id, None, None, lambda ticket, answer: None)
    ticket.answered = True
    return Answered(ticket, kind, reply)


def _dumped(answered: Answered) -> tuple[int, int, Reply]:
    return answered.ticket.request_id, _CODES[answered.kind], answered.reply
