"""Parked requests: who waits for what, in order of arrival, until when."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from transfer_queue.ledger.partition import ready_key
from transfer_queue.ledger.selection import Plan
from transfer_queue.messages import Admit, Draw, Put, WaitKeys

Ticket: TypeAlias = Hashable
Watched: TypeAlias = tuple[str, tuple[str, ...]]


@dataclass(eq=False)
class WaitingDraw:
    """A draw that could not be served yet. Draws with equal `signature` are served or not by the same state."""

    ticket: Ticket
    draw: Draw
    client: str
    plan: Plan
    partition: str
    since: float
    deadline: float
    order: int

    @property
    def watches(self) -> Watched:
        """The task, and the fields of which one has to come before more can be served; no fields: whatever comes."""
        return self.draw.task_name, () if self.plan.filters else self.draw.fields

    @cached_property
    def signature(self) -> Hashable:
        alike = (self.draw.batch_size, self.draw.get_n_samples)
        key = ready_key(self.draw.task_name, self.draw.fields)
        return key, self.order if self.draw.sampler_params else alike


@dataclass(eq=False)
class WaitingPut:
    """A put of new rows, or a request to admit one, that the window of its step or a limit keeps out."""

    ticket: Ticket
    put: Put | Admit
    client: str
    partition: str
    since: float
    deadline: float
    order: int


@dataclass(eq=False)
class WaitingKeys:
    """Somebody who waits for keys. `forget` is called when that is over, however it ended."""

    ticket: Ticket
    request: WaitKeys
    since: float
    deadline: float
    order: int
    forget: Callable[[WaitingKeys], None]


Waiting: TypeAlias = WaitingDraw | WaitingPut | WaitingKeys


class WaitingRoom:
    """Parked requests by what they wait for, and their deadlines."""

    def __init__(self) -> None:
        self._by_ticket: dict[Ticket, Waiting] = {}
        self._draws: dict[tuple[str, str], dict[int, WaitingDraw]] = {}
        self._watched: dict[str, Counter[Watched]] = {}  # by partition
        self._puts: dict[int, WaitingPut] = {}
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._by_ticket)

    def park_draw(self, ticket: Ticket, draw: Draw, client: str, plan: Plan, partition: str, now: float) -> None:
        waiting = WaitingDraw(ticket, draw, client, plan, partition, now, now + draw.timeout_s, next(self._order))
        self._draws.setdefault((partition, draw.task_name), {})[waiting.order] = waiting
        self._watch(waiting)
        self._note(waiting)

    def park_put(self, ticket: Ticket, put: Put | Admit, client: str, partition: str, now: float) -> None:
        waiting = WaitingPut(ticket, put, client, partition, now, now + put.timeout_s, next(self._order))
        self._puts[waiting.order] = waiting
        self._note(waiting)

    def park_keys(
        self, ticket: Ticket, request: WaitKeys, forget: Callable[[WaitingKeys], None], now: float
    ) -> WaitingKeys:
        waiting = WaitingKeys(ticket, request, now, now + request.timeout_s, next(self._order), forget)
        self._note(waiting)
        return waiting

    def remove(self, ticket: Ticket) -> Waiting | None:
        """Take a request out; None if it is not here (any more)."""
        waiting = self._by_ticket.pop(ticket, None)
        if isinstance(waiting, WaitingDraw):
            room = self._draws[waiting.partition, waiting.draw.task_name]
            del room[waiting.order]
            if not room:
                del self._draws[waiting.partition, waiting.draw.task_name]
            self._unwatch(waiting)
        elif isinstance(waiting, WaitingPut):
            del self._puts[waiting.order]
        elif waiting is not None:
            waiting.forget(waiting)
        return waiting

    def draws(self, partition: str, task: str) -> list[WaitingDraw]:
        """Draws of one task, in order of arrival."""
        return list(self._draws.get((partition, task), {}).values())

    def tasks(self, partition: str, fields: Collection[str] | None = None) -> set[str]:
        """The tasks whose draws wait for this partition (and for one of `fields`, if given)."""
        watched = self._watched.get(partition, ())
        if fields is None:
            return {task for task, _ in watched}
        return {task for task, wanted in watched if not wanted or not set(wanted).isdisjoint(fields)}

    def replan(self, waiting: WaitingDraw, plan: Plan) -> None:
        """The draw is served by another sampler from now on."""
        self._unwatch(waiting)
        waiting.plan = plan
        self._watch(waiting)

    def all_draws(self) -> list[WaitingDraw]:
        return [waiting for room in self._draws.values() for waiting in room.values()]

    def puts(self) -> list[WaitingPut]:
        """Puts in order of arrival."""
        return list(self._puts.values())

    def next_deadline(self) -> float | None:
        while self._deadlines and self._deadlines[0][2] not in self._by_ticket:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def overdue(self, now: float) -> list[Waiting]:
        """Take out the requests whose deadline has come."""
        late = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            waiting = self.remove(heapq.heappop(self._deadlines)[2])
            assert waiting is not None
            late.append(waiting)
        return late

    def _watch(self, waiting: WaitingDraw) -> None:
        self._watched.setdefault(waiting.partition, Counter())[waiting.watches] += 1

    def _unwatch(self, waiting: WaitingDraw) -> None:
        watched = self._watched[waiting.partition]
        watched[waiting.watches] -= 1
        if not watched[waiting.watches]:
            del watched[waiting.watches]
        if not watched:
            del self._watched[waiting.partition]

    def _note(self, waiting: Waiting) -> None:
        assert waiting.ticket not in self._by_ticket, f"ticket {waiting.ticket!r} waits already"
        self._by_ticket[waiting.ticket] = waiting
        if waiting.deadline < math.inf:
            heapq.heappush(self._deadlines, (waiting.deadline, waiting.order, waiting.ticket))
