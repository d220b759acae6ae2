"""Answers, given once what they tell of is written down.

Where no journal is kept they are given at once. Where one is kept but has no space for a change that was made already,
nothing is served until there is: requests are refused with `CapacityExceeded`, before they change anything, and the
answers of what was carried out wait. A disk that does not work ends it all until the controller is started again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transfer_queue.controller.counts import check_counts
from transfer_queue.controller.keeping import Keeper
from transfer_queue.errors import CapacityExceeded, JournalUnavailable, TransferQueueError
from transfer_queue.ledger.records import Records
from transfer_queue.messages import Reply, Request
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.ticket import Ticket

log = logging.getLogger(__name__)


class Answers:
    """Of one controller; used under its lock."""

    def __init__(self, records: Records, requests: RequestTable) -> None:
        self.keeper: Keeper | None = None
        self._records = records
        self._requests = requests
        self._broken: TransferQueueError | None = None  # a change can never be written down: nothing is true any more
        self._late: list[tuple[Ticket, Reply]] = []  # of what is not written down yet
        self._ended = False  # a halt, since `was_halted`

    @property
    def halted(self) -> bool:
        """Something was changed that is not written down: nobody is told, and nothing else may be changed."""
        return self._broken is not None or (self.keeper is not None and self.keeper.behind)

    def was_halted(self) -> bool:
        """It is, or was since the last call."""
        ended, self._ended = self._ended, False
        return ended or self.halted

    @property
    def retries(self) -> bool:
        """Something waits for space in the journal."""
        keeper = self.keeper
        return keeper is not None and self._broken is None and (keeper.behind or keeper.held_back)

    def check(self, request: Request | None = None, frames: Sequence[Any] | None = None) -> None:
        """Raise if this request is about too much, or what it changes could not be written down."""
        if request is not None:
            check_counts(request)
        self._check_broken()
        if self.keeper is None:
            return
        if self.keeper.behind:
            self.catch_up()
            self._check_broken()
            if self.keeper.behind:
                raise CapacityExceeded(
                    "the journal of the controller has no capacity for what was changed last; nothing is served until "
                    "there is space in its folder",
                    **self.keeper.report(),
                )
        if request is not None:
            self.keeper.admit(request, frames)

    def keep(self, ticket: Ticket | None) -> None:
        """Write down what changed. `ticket`: of the request that was carried out."""
        records = self._records.take()
        if self.keeper is None or self._broken is not None:
            return
        was_behind = self.keeper.behind
        try:
            self.keeper.keep(records, ticket)
        except CapacityExceeded as error:
            if not was_behind:
                log.error("the journal of the controller is full; nothing is served until there is space: %s", error)
        except (TransferQueueError, OSError, MemoryError) as error:
            self._break(error)
        else:
            if was_behind:
                self._ended = True
                log.warning("there is space for the journal of the controller again")
            self._tell_late()

    def catch_up(self) -> None:
        """Try again to write down what could not be written so far."""
        if self.keeper is not None and self.keeper.behind:
            self.keep(None)

    def note(self, ticket: Ticket, reply: Reply | TransferQueueError | None) -> None:
        """The answer is decided: from now on it is part of every snapshot, whenever it is sent."""
        if self.keeper is None or self.halted or reply is None or isinstance(reply, TransferQueueError):
            return
        self._requests.restore(ticket.client_id, ticket.request_id, ticket.request, reply)

    def conclude(self, ticket: Ticket, answer: Reply | TransferQueueError) -> None:
        """Write down what a request changed, and give its answer. One that is given at once notes itself."""
        self.keep(ticket)
        if self.keeper is not None and self.keeper.syncs:
            self.note(ticket, answer)
        self.give(ticket, answer)

    def give(self, ticket: Ticket, answer: Reply | TransferQueueError) -> None:
        """Answer once everything that the answer may tell of is written down for good."""
        if self.keeper is None or self._broken is not None:
            ticket.answer(self._broken or answer)
        elif not self.keeper.behind:
            if self.keeper.syncs:
                self.keeper.when_durable(lambda error: ticket.answer(error or answer))
            else:
                ticket.answer(answer)
        elif isinstance(answer, TransferQueueError):
            ticket.answer(answer)  # it tells of no change
        else:
            self._late.append((ticket, answer))

    def snapshot_if_due(self) -> None:
        if self.keeper is not None and self._broken is None:
            self.keeper.snapshot_if_due()

    def flush(self) -> None:
        """Wait until what was written down is durable."""
        if self.keeper is not None:
            self.keeper.flush()

    def end(self, reason: TransferQueueError) -> Keeper | None:
        """Nothing is written down any more; return what did so far."""
        keeper, self.keeper = self.keeper, None
        if keeper is not None:
            self._broken = reason
        return keeper

    def _tell_late(self) -> None:
        late, self._late = self._late, []
        for ticket, reply in late:
            if not ticket.abandoned:
                self.note(ticket, reply)
        for ticket, reply in late:
            self.give(ticket, reply)

    def _break(self, error: BaseException) -> None:
        log.error("the journal of the controller failed; nothing is served until it is started again: %s", error)
        if not isinstance(error, TransferQueueError):
            error = JournalUnavailable(f"the journal failed: {error!r}")
        self._broken = error
        late, self._late = self._late, []
        for ticket, _ in late:
            ticket.answer(error)

    def _check_broken(self) -> None:
        if self._broken is not None:
            raise type(self._broken)(self._broken.message, **self._broken.details)
