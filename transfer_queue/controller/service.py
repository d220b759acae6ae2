"""Requests in, answers out: a thin shell around the ledger.

One lock guards the ledger. Requests come from the server thread and, in the embedded runtime and from actor methods,
from any thread of this process. A request is answered once: at once, or by the call that makes it possible. Where a
journal is kept, what changed is written down before anybody is answered; what cannot be written down is refused first.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np

from transfer_queue.controller.checkpoint import Cuts, restore
from transfer_queue.controller.counts import check_counts
from transfer_queue.controller.keeping import Keeper
from transfer_queue.controller.units import UnitBook
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.asking import ask
from transfer_queue.ledger.leases import shown
from transfer_queue.ledger.records import Record
from transfer_queue.messages import (
    Admit,
    Admitted,
    Announce,
    Announced,
    Cut,
    Done,
    Draw,
    EndCut,
    FreeBlocks,
    FreesDone,
    GetAdmission,
    ListUnits,
    Put,
    Reconcile,
    Reply,
    Report,
    Request,
    Restore,
    Units,
    Withdraw,
)
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.ticket import Ticket

log = logging.getLogger(__name__)

T = TypeVar("T")
Push: TypeAlias = Callable[[Hashable, FreeBlocks], None]


_RETRY_S = 1.0
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

    def __init__(
        self, ledger: Ledger, clock: Callable[[], float] = time.monotonic, *, unit_return_s: float = 30.0
    ) -> None:
        """`unit_return_s`: how long a storage unit that is gone may stay away before its data counts as lost."""
        self.requests = RequestTable()
        self._ledger = ledger
        self._clock = clock
        self._lock = threading.Lock()
        self._units = UnitBook()
        self._unit_return_s = unit_return_s
        self._cuts = Cuts(ledger)
        self._keeper: Keeper | None = None
        self._broken: TransferQueueError | None = None  # a change could not be written down: nothing is true any more
        self._parked: dict[Hashable, Ticket] = {}
        self._waiting_for_units: list[tuple[float, Ticket]] = []
        self._freeing: list[_Freeing] = []
        self._push: Push = lambda channel, order: None

    def send_frees_by(self, push: Push) -> None:
        """Tell where one-way messages to units go, before the first unit announces itself."""
        self._push = push

    def keep_in(self, folder: Path, *, sync: bool = False) -> None:
        """Go on where the journal in this folder ends, and write to it. Before anything is served.

        sync   make every change durable on the disk before it is answered; else it outlives the process only

        Raises `JournalDamaged` or `JournalUnavailable`.
        """
        with self._lock:
            self._keeper = Keeper.open(folder, self._ledger, self._units, self.requests, sync=sync, now=self._clock())
            self._units.all_away(self._clock())

    def close(self) -> None:
        """Let go of the journal; what is in it stays. May be called twice."""
        with self._lock:
            keeper, self._keeper = self._keeper, None
            if keeper is not None:
                self._broken = ConnectionLost("the controller was closed")
        if keeper is not None:
            keeper.close()

    def inspect(self, read: Callable[[Ledger], T]) -> T:
        """Run a function on the ledger under the lock."""
        with self._lock:
            self._check()
            try:
                return read(self._ledger)
            finally:
                self._follow_up(self._clock())
                self._flush()
                self._check()

    def ask(self, request: Request) -> Reply:
        """Serve a request that never waits, from within this process."""
        with self._lock:
            now = self._clock()
            self._check(request)
            try:
                return ask(self._ledger, request, now)
            finally:
                self._follow_up(now)
                self._flush()
                self._check()

    # ------------------------------------------------------------ what a server calls

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Take one request; its ticket is answered now or later."""
        with self._lock:
            now = self._clock()
            try:
                self._check(request, ticket.frames)
                reply: Reply | TransferQueueError | None = self._dispatch(request, ticket, now)
            except TransferQueueError as error:
                reply = error
            self._note(ticket, reply)
            orders = self._follow_up(now, ticket)
            if orders and isinstance(reply, Done) and self._broken is None:
                self._freeing.append(_Freeing(now + _FREEING_S, orders, ticket, reply))
            elif reply is not None:
                self._reply(ticket, reply)

    def tick(self) -> float | None:
        """Do what is due; return the seconds until something is due again."""
        with self._lock:
            now = self._clock()
            self._follow_up(now)
            self._reuse(self._cuts.end_overdue(now))
            self._give_up_units(now)
            self._snapshot_if_due()
            late = [ticket for deadline, ticket in self._waiting_for_units if deadline <= now]
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[0] > now]
            for ticket in late:
                ticket.answer(
                    DeadlineExceeded("no storage unit announced itself in time; start one, or `init` a session")
                )
            self._answer_freed(now)
            due = [deadline for deadline, _ in self._waiting_for_units] + [entry.deadline for entry in self._freeing]
            due += filter(None, (self._ledger.next_deadline(), self._cuts.next_deadline()))
            if self._keeper is not None and self._keeper.held_back:
                due.append(now + _RETRY_S)
            away = self._units.away_since()
            if away is not None:
                due.append(away + self._unit_return_s)
            return max(min(due) - now, 0.0) if due else None

    def lost(self, ticket: Ticket, reply: Reply | BaseException | None) -> None:
        """The client of this ticket is gone: what it drew is given back, what it waits for is forgotten."""
        with self._lock:
            now = self._clock()
            self._cancel((ticket.client_id, ticket.request_id), now)
            self._reuse(self._cuts.end_of_request(ticket.client_id, ticket.request_id))
            if isinstance(reply, Admitted):
                self._ledger.gate.withdraw(reply.admission)
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[1] is not ticket]
            self._freeing = [entry for entry in self._freeing if entry.ticket is not ticket]
            self._follow_up(now)

    def gone(self, client_id: str) -> None:
        """A client is dead or has left: what it holds goes back at once."""
        with self._lock:
            now = self._clock()
            self._ledger.client_gone(client_id, now)
            self._reuse(self._cuts.end_of(client_id))
            self._units.leave(client_id, now)
            self._follow_up(now)

    def holding(self) -> set[str]:
        """The clients that hold leases."""
        with self._lock:
            return self._ledger.leases.clients()

    # ------------------------------------------------------------ inside

    def _check(self, request: Request | None = None, frames: Sequence[Any] | None = None) -> None:
        """Raise if this request is about too much, or what it changes could not be written down."""
        if request is not None:
            check_counts(request)
        if self._broken is not None:
            raise type(self._broken)(self._broken.message, **self._broken.details)
        if self._keeper is not None and request is not None:
            self._keeper.admit(request, frames)

    def _keep(self, ticket: Ticket | None) -> None:
        if self._keeper is None or self._broken is not None:
            return
        try:
            self._keeper.keep(self._ledger.records.take(), ticket)
        except TransferQueueError as error:
            log.error("the journal of the controller failed; nothing is served until it is started again: %s", error)
            self._broken = error

    def _snapshot_if_due(self) -> None:
        if self._keeper is not None and self._broken is None:
            self._keeper.snapshot_if_due()

    def _note(self, ticket: Ticket, reply: Reply | TransferQueueError | None) -> None:
        """The answer is decided: from now on it is part of every snapshot, whenever it is sent."""
        if self._keeper is not None and reply is not None and not isinstance(reply, TransferQueueError):
            self.requests.restore(ticket.client_id, ticket.request_id, ticket.request, reply)

    def _flush(self) -> None:
        if self._keeper is not None:
            self._keeper.flush()

    def _reply(self, ticket: Ticket, answer: Reply | TransferQueueError) -> None:
        """Answer once everything that the answer may tell of is written down for good."""
        if self._keeper is None or self._broken is not None:
            ticket.answer(self._broken or answer)
        else:
            self._keeper.when_durable(lambda error: ticket.answer(error or answer))

    def _follow_up(self, now: float, ticket: Ticket | None = None) -> list[tuple[int, int]]:
        """Write down what changed, answer whom it satisfied, and tell units what they may reuse.

        `ticket`: of the request that was carried out. Returns what units have to do.
        """
        keeper = self._keeper
        if keeper is not None:
            if keeper.held_back:
                self._ledger.serving.try_all_again()
            keeper.held_back = bool(self._parked) and keeper.short
        answers = self._ledger.wake(now, serve=keeper is None or not keeper.held_back)
        self._keep(ticket)
        parked = [(self._parked.pop(key), answer) for key, answer in answers]
        for other, answer in parked:
            self._note(other, answer)
        self._snapshot_if_due()
        for other, answer in parked:
            self._reply(other, answer)
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
                self._reply(entry.ticket, entry.reply)
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
            case Admit():
                return self._park(ticket, self._ledger.admit(request, key, shown(ticket.client_id), now))
            case GetAdmission():
                return Report(entries=self._ledger.reports.admission(request, shown(ticket.client_id)))
            case ListUnits() if not len(self._units) and request.timeout_s > 0:
                self._waiting_for_units.append((now + request.timeout_s, ticket))
                return None
            case ListUnits():
                return self._known_units()
            case Withdraw():
                self._ledger.gate.withdraw(request.admission)
                return None
            case Announce():
                return self._announce(request, ticket, now)
            case Reconcile():
                self._units.agree(request.unit)
                return ask(self._ledger, request, now)
            case Cut():
                self._cuts.begin(ticket, request.hold_s, now)
                return None
            case EndCut():
                self._reuse(self._cuts.end(request.hold))
                return None
            case Restore():
                return self._restore(request, ticket, now)
            case FreesDone():
                number = self._units.number_of(request.unit_id)
                if number is not None:
                    self._ledger.blocks.confirm(number, request.sequence)
                    self._ledger.records.add(Record(request, now))
                    self._answer_freed(now)
                return None
            case _:
                return ask(self._ledger, request, now)

    def _announce(self, request: Announce, ticket: Ticket, now: float) -> Announced:
        unit = self._units.announce(request, ticket.channel, ticket.client_id)
        self._ledger.records.add(Record(request, now))
        self._send_again(unit.info.number)
        waiting, self._waiting_for_units = self._waiting_for_units, []
        for _, other in waiting:
            other.answer(self._known_units())
        return Announced(number=unit.info.number, given_up=unit.given_up)

    def _give_up_units(self, now: float) -> None:
        """What lies at units that do not come back is lost: its rows are not ready, and `audit` names them."""
        for unit in self._units.overdue(now - self._unit_return_s):
            unit.given_up = True
            log.error(
                "storage unit %s is away for %.0f s: what it held is lost", unit.info.unit_id, self._unit_return_s
            )
            self._ledger.reconcile(Reconcile(unit=unit.info.number, blocks=np.empty(0, np.int64)), now)
            self._follow_up(now)

    def _reuse(self, again: bool) -> None:
        """If units may reuse bytes again, tell them what they were not told, or may have missed."""
        if again:
            self._ledger.blocks.take_orders()
            for unit in self._units.infos():
                self._send_again(unit.number)

    def _send_again(self, unit: int) -> None:
        channel = self._units.channel_of(unit)
        for order in self._ledger.blocks.unconfirmed(unit) if channel is not None else ():
            self._push(channel, order)

    def _restore(self, request: Restore, ticket: Ticket, now: float) -> Done:
        """The new state is written down as a whole, together with the answer, before that is given."""
        for block in request.new.tolist():
            self._units.check(block)
            self._ledger.blocks.check_new(block)
        before = self._ledger.state()
        done = Done(count=restore(self._ledger, request))
        if self._keeper is not None:
            try:
                self._keeper.replace(ticket, done, now)
            except TransferQueueError:
                self._ledger.load(before)
                self._ledger.blocks.take_orders()  # to free what is needed again
                raise
        return done

    def _known_units(self) -> Units:
        return Units(units=self._units.infos(), admit_from_bytes=self._ledger.gate.admit_from_bytes)
