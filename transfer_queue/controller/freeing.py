"""What units are told to reuse, and the clears whose answers wait until they do.

Nothing here is sent before the change that allows it is written down.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeAlias

from transfer_queue.controller.answering import Answers
from transfer_queue.controller.units import UnitBook
from transfer_queue.ledger.blocks import BlockBook
from transfer_queue.messages import FreeBlocks, Reply
from transfer_queue.wire.ticket import Ticket

Push: TypeAlias = Callable[[Hashable, FreeBlocks], None]
Sent: TypeAlias = list[tuple[int, int]]  # (unit number, sequence)

_FREEING_S = 1.0
"""How long the answer to a clear waits for the units, so that old handles are refused everywhere when it comes."""


class _Clear(NamedTuple):
    """A clear that is done but for what the units have to do."""

    deadline: float
    orders: Sent
    ticket: Ticket
    reply: Reply


class Frees:
    """Of one controller; used under its lock. `push` sends a one-way message to the channel of a unit."""

    def __init__(self, blocks: BlockBook, units: UnitBook, answers: Answers) -> None:
        self.push: Push = lambda channel, order: None
        self._blocks = blocks
        self._units = units
        self._answers = answers
        self._anew = False  # units were told nothing for a while
        self._clears: list[_Clear] = []

    def go_on(self, again: bool) -> None:
        """Whether units may reuse bytes again: the next `send` tells them what they were not told, or have missed."""
        self._anew |= again

    def send(self) -> Sent:
        """Tell units what they may reuse, if that is written down; return what was sent."""
        if self._answers.halted:
            return []
        orders = self._blocks.take_orders()
        if self._anew:
            self._anew = False
            for unit in self._units.infos():
                self.send_again(unit.number)
        else:
            for number, order in orders:
                self._send(number, order)
        return [(number, order.sequence) for number, order in orders if self._units.channel_of(number) is not None]

    def send_again(self, unit: int) -> None:
        """Tell a unit what it has not confirmed."""
        for order in self._blocks.unconfirmed(unit):
            self._send(unit, order)

    def wait(self, ticket: Ticket, reply: Reply, orders: Sent, now: float) -> None:
        """Give this answer once the units have done that, or take too long."""
        self._clears.append(_Clear(now + _FREEING_S, orders, ticket, reply))

    def answer(self, now: float) -> None:
        """Answer the clears whose units refuse the cleared rows by now, or take too long to say so."""
        waiting, self._clears = self._clears, []
        for entry in waiting:
            if entry.deadline <= now or all(self._blocks.confirmed(*order) for order in entry.orders):
                self._answers.give(entry.ticket, entry.reply)
            else:
                self._clears.append(entry)

    def forget(self, ticket: Ticket) -> None:
        """Nobody waits for this answer any more."""
        self._clears = [entry for entry in self._clears if entry.ticket is not ticket]

    def next_deadline(self) -> float | None:
        return min((entry.deadline for entry in self._clears), default=None)

    def _send(self, number: int, order: FreeBlocks) -> None:
        channel = self._units.channel_of(number)
        if channel is not None:
            self.push(channel, order)
