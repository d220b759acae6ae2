"""Requests in, answers out: a thin shell around the ledger.

One lock guards the ledger. Requests come from the server thread and, in the embedded runtime and from actor methods,
from any thread of this process. A request is answered once: at once, or by the call that makes it possible.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeAlias, TypeVar

from transfer_queue.controller.units import UnitBook
from transfer_queue.errors import DeadlineExceeded, ProtocolMismatch, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.leases import shown
from transfer_queue.messages import (
    AbortGroup,
    Ack,
    Announce,
    Announced,
    Clear,
    Done,
    Draw,
    Drop,
    FreeBlocks,
    FreesDone,
    GetAudit,
    GetExplanation,
    GetStatus,
    Leased,
    ListPartitions,
    ListUnits,
    Locate,
    Names,
    Put,
    Reconcile,
    RegisterSampler,
    Release,
    Renew,
    Reply,
    Report,
    Request,
    ResetConsumption,
    SealGroup,
    SetTags,
    Settle,
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
    orders: list[tuple[int, int]]  # (unit number, sequence)
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
            now = self._clock()
            self._cancel((ticket.client_id, ticket.request_id), now)
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[1] is not ticket]
            self._freeing = [entry for entry in self._freeing if entry.ticket is not ticket]
            self._follow_up(now)

    def gone(self, client_id: str) -> None:
        """A client is dead or has left: what it holds goes back at once."""
        with self._lock:
            now = self._clock()
            self._ledger.client_gone(client_id, now)
            self._follow_up(now)

    def holding(self) -> set[str]:
        """The clients that hold leases."""
        with self._lock:
            return self._ledger.leases.clients()

    # ------------------------------------------------------------ inside

    def _follow_up(self, now: float) -> list[tuple[int, int]]:
        """Answer whom the last change satisfied, and tell units what they may reuse; returns what they have to do."""
        for key, answer in self._ledger.wake(now):
            self._parked.pop(key).answer(answer)
        orders = []
        for number, order in self._ledger.blocks.take_orders():
            channel = self._units.channel_of(number)
            if channel is not None:
                self._push(channel, order)
                orders.append((number, order.sequence))
        return orders

    def _answer_freed(self, now: float) -> None:
        """Answer the clears whose units refuse the cleared rows by now, or take too long to say so."""
        waiting, self._freeing = self._freeing, []
        for entry in waiting:
            if entry.deadline <= now or all(self._ledger.blocks.confirmed(*order) for order in entry.orders):
                entry.ticket.answer(entry.reply)
            else:
                self._freeing.append(entry)

    def _cancel(self, key: Hashable, now: float) -> None:
        self._parked.pop(key, None)
        self._ledger.cancel(key, now)

    def _park(self, ticket: Ticket, reply: T | None) -> T | None:
        if reply is None:
            self._parked[ticket.client_id, ticket.request_id] = ticket
        return reply

    def _dispatch(self, request: Request, ticket: Ticket, now: float) -> Reply | None:
        key = (ticket.client_id, ticket.request_id)
        match request:
            case Draw():
                return self._park(ticket, self._ledger.draw(request, key, now, ticket.client_id))
            case Put():
                self._units.check(request.block_id)
                return self._park(ticket, self._ledger.put(request, key, shown(ticket.client_id), now))
            case ListUnits() if not len(self._units) and request.timeout_s > 0:
                self._waiting_for_units.append((now + request.timeout_s, ticket))
                return None
            case ListUnits():
                return Units(units=self._units.infos())
            case Announce():
                return self._announce(request, ticket)
            case FreesDone():
                number = self._units.number_of(request.unit_id)
                if number is not None:
                    self._ledger.blocks.confirm(number, request.sequence)
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
                return Done(count=ledger.clear(request, now))
            case SetTags():
                return Done(count=ledger.set_tags(request, now))
            case SealGroup():
                return Done(count=ledger.seal_group(request, now))
            case AbortGroup():
                return Done(count=ledger.abort_group(request, now))
            case ResetConsumption():
                return Done(count=ledger.reset(request, now))
            case Ack():
                return Done(count=ledger.ack(request, now))
            case Release():
                return Done(count=ledger.release(request, now))
            case Renew():
                return Leased(lease_s=ledger.renew(request, now))
            case Drop():
                return Done(count=ledger.drop(request, now))
            case RegisterSampler():
                sampler = create_sampler(request.sampler, **request.arguments)
                ledger.register_sampler(request.task_name, sampler, now, request)
                return Done()
            case Settle():
                return ledger.settle(request, now)
            case Reconcile():
                return ledger.reconcile(request, self._units.known_number(request.unit_id), now)
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
        for order in self._ledger.blocks.unconfirmed(unit.info.number):
            self._push(ticket.channel, order)
        waiting, self._waiting_for_units = self._waiting_for_units, []
        for _, other in waiting:
            other.answer(Units(units=self._units.infos()))
        return Announced(number=unit.info.number)
