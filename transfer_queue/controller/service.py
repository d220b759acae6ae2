"""Requests in, answers out: a thin shell around the ledger.

One lock guards the ledger. Requests come from the server thread and, in the embedded runtime and from actor methods,
from any thread of this process. A request is answered once: at once, or by the call that makes it possible.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeAlias, TypeVar

from transfer_queue.controller.units import Unit, UnitBook
from transfer_queue.errors import DeadlineExceeded, ProtocolMismatch, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.messages import (
    AbortGroup,
    Announce,
    Announced,
    Clear,
    Done,
    Draw,
    FreeBlocks,
    FreesDone,
    GetAudit,
    GetExplanation,
    GetStatus,
    ListPartitions,
    ListUnits,
    Locate,
    Names,
    Put,
    RegisterSampler,
    Reply,
    Report,
    Request,
    ResetConsumption,
    SealGroup,
    SetTags,
    Settle,
    Settled,
    Units,
)
from transfer_queue.samplers import create_sampler
from transfer_queue.wire.ticket import Ticket

T = TypeVar("T")
Push: TypeAlias = Callable[[Hashable, FreeBlocks], None]


_FREEING_S = 1.0
"""How long the answer to a clear waits for the units, so that old handles are refused everywhere when it comes."""


class _Freeing(NamedTuple):
    """A clear that is done but for what the units have to do."""

    deadline: float
    orders: list[tuple[Unit, int]]
    ticket: Ticket
    reply: Reply


class ControllerService:
    """Serves `ControllerRequest`s. `push` sends a one-way message to the channel of a unit."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._units = UnitBook()
        self._parked: dict[Hashable, Ticket] = {}
        self._waiting_for_units: list[tuple[float, Ticket]] = []
        self._freeing: list[_Freeing] = []
        self._push: Push = lambda channel, order: None

    def send_frees_by(self, push: Push) -> None:
        """Tell where one-way messages to units go, before the first unit announces itself."""
        self._push = push

    def inspect(self, read: Callable[[Ledger], T]) -> T:
        """Run a function on the ledger under the lock."""
        with self._lock:
            try:
                return read(self._ledger)
            finally:
                self._follow_up(self._clock())

    def ask(self, request: Request) -> Reply:
        """Serve a request that never waits, from within this process."""
        with self._lock:
            now = self._clock()
            try:
                return self._answer(request, now)
            finally:
                self._follow_up(now)

    # ------------------------------------------------------------ what a server calls

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Take one request; its ticket is answered now or later."""
        with self._lock:
            now = self._clock()
            try:
                reply: Reply | TransferQueueError | None = self._dispatch(request, ticket, now)
            except TransferQueueError as error:
                reply = error
            orders = self._follow_up(now)
            if orders and isinstance(reply, Done):
                self._freeing.append(_Freeing(now + _FREEING_S, orders, ticket, reply))
            elif reply is not None:
                ticket.answer(reply)

    def tick(self) -> float | None:
        """Do what is due; return the seconds until something is due again."""
        with self._lock:
            now = self._clock()
            self._follow_up(now)
            late = [ticket for deadline, ticket in self._waiting_for_units if deadline <= now]
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[0] > now]
            for ticket in late:
                ticket.answer(
                    DeadlineExceeded("no storage unit announced itself in time; start one, or `init` a session")
                )
            self._answer_freed(now)
            due = [deadline for deadline, _ in self._waiting_for_units] + [entry.deadline for entry in self._freeing]
            ledger_due = self._ledger.next_deadline()
            if ledger_due is not None:
                due.append(ledger_due)
            return max(min(due) - now, 0.0) if due else None

    def lost(self, ticket: Ticket, reply: Reply | BaseException | None) -> None:
        """The client of this ticket is gone: what it drew is given back, what it waits for is forgotten."""
        with self._lock:
            self._cancel((ticket.client_id, ticket.request_id))
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[1] is not ticket]
            self._freeing = [entry for entry in self._freeing if entry.ticket is not ticket]
            self._follow_up(self._clock())

    # ------------------------------------------------------------ inside

    def _follow_up(self, now: float) -> list[tuple[Unit, int]]:
        """Answer whom the last change satisfied, and tell units what they may reuse; returns what they have to do."""
        for key, answer in self._ledger.wake(now):
            self._parked.pop(key).answer(answer)
        orders = []
        for number, freed in self._ledger.blocks.take_freed().items():
            unit, order = self._units.free(number, freed)
            self._push(unit.channel, order)
            orders.append((unit, order.sequence))
        return orders

    def _answer_freed(self, now: float) -> None:
        """Answer the clears whose units refuse the cleared rows by now, or take too long to say so."""
        waiting, self._freeing = self._freeing, []
        for entry in waiting:
            if entry.deadline <= now or all(unit.done(sequence) for unit, sequence in entry.orders):
                entry.ticket.answer(entry.reply)
            else:
                self._freeing.append(entry)

    def _cancel(self, key: Hashable) -> None:
        self._parked.pop(key, None)
        self._ledger.cancel(key)

    def _park(self, ticket: Ticket, reply: T | None) -> T | None:
        if reply is None:
            self._parked[ticket.client_id, ticket.request_id] = ticket
        return reply

    def _dispatch(self, request: Request, ticket: Ticket, now: float) -> Reply | None:
        key = (ticket.client_id, ticket.request_id)
        match request:
            case Draw():
                return self._park(ticket, self._ledger.draw(request, key, now))
            case Put():
                self._units.check(request.block_id)
                return self._park(ticket, self._ledger.put(request, key, _shown(ticket.client_id), now))
            case ListUnits() if not len(self._units) and request.timeout_s > 0:
                self._waiting_for_units.append((now + request.timeout_s, ticket))
                return None
            case ListUnits():
                return Units(units=self._units.infos())
            case Announce():
                return self._announce(request, ticket)
            case FreesDone():
                self._units.confirm(request.unit_id, request.sequence)
                self._answer_freed(now)
                return None
            case _:
                return self._answer(request, now)

    def _answer(self, request: Request, now: float) -> Reply:
        """Requests that are answered at once, whoever asks."""
        ledger = self._ledger
        match request:
            case Locate():
                return ledger.locate(request)
            case Clear():
                return Done(count=ledger.clear(request))
            case SetTags():
                return Done(count=ledger.set_tags(request))
            case SealGroup():
                return Done(count=ledger.seal_group(request))
            case AbortGroup():
                return Done(count=ledger.abort_group(request))
            case ResetConsumption():
                return Done(count=ledger.reset(request))
            case RegisterSampler():
                ledger.register_sampler(request.task_name, create_sampler(request.sampler, **request.arguments))
                return Done()
            case Settle():
                return Settled(committed=ledger.blocks.settle(request.blocks))
            case GetStatus():
                return ledger.reports.status(request)
            case GetAudit():
                return Report(entries=ledger.reports.audit(request.partition_id))
            case GetExplanation():
                return Report(entries={"text": ledger.reports.explain(request, now)})
            case ListPartitions():
                return Names(names=ledger.reports.partitions())
            case _:
                raise ProtocolMismatch(f"{type(request).__name__} is not a request that a controller serves")

    def _announce(self, request: Announce, ticket: Ticket) -> Announced:
        unit = self._units.announce(request, ticket.channel)
        for order in unit.unconfirmed:
            self._push(ticket.channel, order)
        waiting, self._waiting_for_units = self._waiting_for_units, []
        for _, other in waiting:
            other.answer(Units(units=self._units.infos()))
        return Announced(number=unit.info.number)


def _shown(client_id: str) -> str:
    """The name that the user gave; what follows the last slash tells lives of one client apart."""
    return client_id.rpartition("/")[0] or client_id
