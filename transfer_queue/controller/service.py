"""Requests in, answers out: a thin shell around the ledger.

One lock guards the ledger. Requests come from the server thread and, in the embedded runtime and from actor methods,
from any thread of this process. A request is answered once: at once, or by the call that makes it possible. Where a
journal is kept, what changed is written down before anybody is answered; what cannot be written down is refused first.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, TypeVar

from transfer_queue import environment
from transfer_queue.controller.answering import Answers
from transfer_queue.controller.checkpoint import Cuts, restore
from transfer_queue.controller.freeing import Frees, Push, Sent
from transfer_queue.controller.keeping import Keeper
from transfer_queue.controller.units import UnitBook
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, TransferQueueError
from transfer_queue.journal.files import REAL_FILES, Files
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
    FreesDone,
    GetAdmission,
    GetAudit,
    KeepCut,
    ListUnits,
    Put,
    Reconcile,
    Reply,
    Report,
    Request,
    Restore,
    Settle,
    Settled,
    UnitInfo,
    Units,
    WaitKeys,
    Withdraw,
)
from transfer_queue.messages.journal import UnitGivenUp
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.ticket import Ticket

log = logging.getLogger(__name__)

T = TypeVar("T")

_RETRY_S = 1.0


class ControllerService:
    """Serves `ControllerRequest`s."""

    def __init__(
        self, ledger: Ledger, clock: Callable[[], float] = time.monotonic, *, unit_return_s: float = 30.0
    ) -> None:
        """`unit_return_s`: how long a storage unit that is gone may stay away before its data counts as lost."""
        self.requests = RequestTable()
        self._ledger = ledger
        ledger.serving.keys.feed.life = secrets.token_hex(6)
        ledger.serving.expected_rows = _expected_rows
        self._clock = clock
        self._lock = threading.Lock()
        self._units = UnitBook(ledger.blocks)
        self._unit_return_s = unit_return_s
        self._cuts = Cuts(ledger)
        self._answers = Answers(ledger.records, self.requests)
        self._frees = Frees(ledger.blocks, self._units, self._answers)
        self._parked: dict[Hashable, Ticket] = {}
        self._waiting_for_units: list[tuple[float, Ticket]] = []

    def send_frees_by(self, push: Push) -> None:
        """Tell where one-way messages to units go, before the first unit announces itself."""
        self._frees.push = push

    def keep_in(self, folder: Path, *, sync: bool = False, files: Files = REAL_FILES) -> None:
        """Go on where the journal in this folder ends, and write to it. Before anything is served.

        sync   make every change durable on the disk before it is answered; else it outlives the process only

        Raises `JournalDamaged` or `JournalUnavailable`.
        """
        with self._lock:
            kept = (self._ledger, self._units, self.requests)
            self._answers.keeper = Keeper.open(folder, *kept, sync=sync, clock=self._clock, files=files)
            self._units.all_away(self._clock())  # nobody was missed while the journal was read

    def close(self) -> None:
        """Let go of the journal; what is in it stays. May be called twice."""
        with self._lock:
            keeper = self._answers.end(ConnectionLost("the controller was closed"))
        if keeper is not None:
            keeper.close()

    def inspect(self, read: Callable[[Ledger], T]) -> T:
        """Run a function on the ledger under the lock."""
        with self._lock:
            self._answers.check()
            try:
                return read(self._ledger)
            finally:
                self._follow_up(self._clock())
                self._answers.flush()
                self._answers.check()

    def observe(self, read: Callable[[Ledger], T]) -> T:
        """Run a function that changes nothing on the ledger under the lock, however the journal does."""
        with self._lock:
            return read(self._ledger)

    def units_and_journal(self) -> tuple[dict[UnitInfo, bool], dict[str, Any] | None]:
        """The storage units, with whether they are here now; how the journal does, if one is kept."""
        with self._lock:
            units = {info: self._units.channel_of(info.number) is not None for info in self._units.infos()}
            keeper = self._answers.keeper
            return units, None if keeper is None else keeper.report()

    def ask(self, request: Request) -> Reply:
        """Serve a request that never waits, from within this process."""
        with self._lock:
            now = self._clock()
            self._answers.check(request)
            try:
                return self._asked(request, now)
            finally:
                self._follow_up(now)
                self._answers.flush()
                self._answers.check()

    # ------------------------------------------------------------ what a server calls

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Take one request; its ticket is answered now or later.

        An answer goes out before what else has to be done, unless that may be to serve others that wait.
        """
        with self._lock:
            now = self._clock()
            try:
                self._answers.check(request, ticket.frames)
                reply: Reply | TransferQueueError | None = self._dispatch(request, ticket, now)
            except TransferQueueError as error:
                reply = error
                if isinstance(request, Announce):
                    self._units.refused(request, now)
            others = bool(self._parked) and self._ledger.serving.may_serve
            if ticket.send is None or others or reply is None or isinstance(reply, Done):
                orders = self._follow_up(now, ticket, reply)
                if orders and isinstance(reply, Done):
                    self._frees.wait(ticket, reply, orders, now)
                elif reply is not None:
                    self._answers.give(ticket, reply)
                return
            self._answers.conclude(ticket, reply)
        ticket.send()
        with self._lock:
            self._follow_up(now)

    def tick(self) -> float | None:
        """Do what is due; return the seconds until something is due again."""
        with self._lock:
            now = self._clock()
            self._answers.catch_up()
            self._frees.go_on(self._cuts.end_overdue(now))
            self._follow_up(now)
            self._give_up_units(now)
            late = [ticket for deadline, ticket in self._waiting_for_units if deadline <= now]
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[0] > now]
            for ticket in late:
                ticket.answer(
                    DeadlineExceeded("no storage unit announced itself in time; start one, or `init` a session")
                )
            self._frees.answer(now)
            due = [deadline for deadline, _ in self._waiting_for_units]
            due += filter(None, (each.next_deadline() for each in (self._ledger, self._cuts, self._frees)))
            if self._answers.retries:
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
            self._frees.go_on(self._cuts.end_of_request(ticket.client_id, ticket.request_id))
            if isinstance(reply, Admitted):
                self._ledger.gate.withdraw(reply.admission)
            self._waiting_for_units = [entry for entry in self._waiting_for_units if entry[1] is not ticket]
            self._frees.forget(ticket)
            self._follow_up(now)

    def gone(self, client_id: str) -> None:
        """A client is dead or has left: what it holds goes back at once."""
        with self._lock:
            now = self._clock()
            self._ledger.client_gone(client_id, now)
            self._ledger.gate.leave(client_id)
            self._frees.go_on(self._cuts.end_of(client_id))
            self._units.leave(client_id, now)
            self._follow_up(now)

    def holding(self) -> set[str]:
        """The clients that hold leases, room for a put, or a cut."""
        with self._lock:
            return self._ledger.leases.clients() | self._ledger.gate.clients() | self._cuts.clients()

    # ------------------------------------------------------------ inside

    def _follow_up(
        self, now: float, ticket: Ticket | None = None, reply: Reply | TransferQueueError | None = None
    ) -> Sent:
        """Write down what changed, answer whom it satisfied, and tell units what they may reuse.

        `ticket`: of the request that was carried out, with this answer. Returns what units have to do.
        """
        answers, keeper = self._answers, self._answers.keeper
        if keeper is not None:
            if keeper.held_back:
                self._ledger.serving.try_all_again()
            keeper.held_back = bool(self._parked) and keeper.short
        served = self._ledger.wake(now, serve=not (answers.halted or (keeper is not None and keeper.held_back)))
        answers.keep(ticket)
        if ticket is not None:
            answers.note(ticket, reply)
        parked = [(self._parked.pop(key), answer) for key, answer in served]
        for other, answer in parked:
            answers.note(other, answer)
        answers.snapshot_if_due()
        for other, answer in parked:
            answers.give(other, answer)
        return self._frees.send()

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
                return self._park(ticket, self._ledger.admit(request, key, ticket.client_id, now))
            case WaitKeys():
                return self._park(ticket, self._ledger.serving.keys.wait(request, key, now))
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
                self._units.check_current(request.unit)
                return self._asked(request, now)
            case Cut():
                self._cuts.begin(ticket, request.hold_s, now)
                return None
            case KeepCut():
                self._cuts.keep(request.hold, request.hold_s, now)
                return Done()
            case EndCut():
                self._frees.go_on(self._cuts.end(request.hold))
                return None
            case Restore():
                return self._restore(request, ticket, now)
            case FreesDone():
                number = self._units.number_of(request.unit_id)
                if number is not None:
                    self._ledger.blocks.confirm(number, request.sequence)
                    self._ledger.records.add(Record(request, now))
                    self._frees.answer(now)
                return None
            case _:
                return self._asked(request, now)

    def _asked(self, request: Request, now: float) -> Reply:
        reply = ask(self._ledger, request, now)
        match request, reply:
            case GetAudit(), Report() if self._answers.keeper is not None:
                return Report(entries=reply.entries | {"journal": self._answers.keeper.report()})
            case Reconcile(unit=unit), _:
                self._frees.go_on(self._cuts.end_at(unit))
            case Settle(blocks=blocks), Settled(committed=committed):
                self._frees.go_on(self._cuts.end_with(blocks[committed == 0]))
        return reply

    def _announce(self, request: Announce, ticket: Ticket, now: float) -> Announced:
        replaced = self._units.replaced_by(request)
        number = self._units.announce(request, ticket.channel, ticket.client_id).info.number
        if replaced is None:
            self._ledger.records.add(Record(request, now))
        else:
            log.error("storage unit %s came back without its index: what it held is lost", request.unit_id)
            self._lose_unit(replaced, now, request)
        self._frees.send_again(number)
        waiting, self._waiting_for_units = self._waiting_for_units, []
        for _, other in waiting:
            other.answer(self._known_units())
        return Announced(number=number, given_up=self._ledger.blocks.given_up(number))

    def _give_up_units(self, now: float) -> None:
        """What lies at units that do not come back is lost: its rows are not ready, and `audit` names them."""
        if self._answers.was_halted():  # none could come back
            self._units.away_anew(now)
        for unit in self._units.overdue(now, self._unit_return_s):
            log.error(
                "storage unit %s is away for %.0f s: what it held is lost", unit.info.unit_id, self._unit_return_s
            )
            number = unit.info.number
            self._lose_unit(number, now, UnitGivenUp(unit=number))
            self._follow_up(now)

    def _lose_unit(self, number: int, now: float, by: UnitGivenUp | Announce) -> None:
        self._ledger.lose_unit(number, now, by)
        self._frees.go_on(self._cuts.end_at(number))

    def _restore(self, request: Restore, ticket: Ticket, now: float) -> Done:
        """The new state is written down as a whole, together with the answer, before that is given."""
        for block in request.new.tolist():
            self._units.check(block)
            self._ledger.blocks.check_new(block)
        before = self._ledger.state()
        done = Done(count=restore(self._ledger, request))
        if self._answers.keeper is not None:
            try:
                self._answers.keeper.replace(ticket, done, now)
            except TransferQueueError:
                self._ledger.load(before)
                self._ledger.blocks.take_orders()  # to free what is needed again
                raise
        return done

    def _known_units(self) -> Units:
        return Units(units=self._units.infos(), admit_from_bytes=self._ledger.gate.admit_from_bytes)


def _expected_rows() -> int:
    return environment.whole_number("TQ_PRE_ALLOC_SAMPLE_NUM", at_least=0) or 0
