"""What a unit takes back when messages are lost, late and repeated in any order."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.asking_unit import MIB, ids, rows
from tests.unit.returning_unit import ReturningUnit
from tests.unit.unit_client import Client, settled, write
from transfer_queue.messages import (
    AbortBlocks,
    Pin,
    ReturnSpan,
    StillHeld,
    Unpin,
)
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.holders import process_id

STEPS = st.lists(
    st.tuples(
        st.sampled_from(
            ["reserve", "pin", "lose", "give", "withdraw", "restart", "make", "deliver", "commit", "abort"]
        ),
        st.integers(0, 1 << 16),
    ),
    max_size=40,
)


@settings(max_examples=40)
@given(STEPS)
def test_any_order_of_losses_leaves_what_is_held(steps: list[tuple[str, int]]) -> None:
    """Messages are lost, statements come late, again and out of order, the unit dies: what the client has is never
    ended, and after a last statement nothing else is left.
    """
    with ServerFolder("test") as folder:
        unit = ReturningUnit(folder.path, capacity_bytes=4 * MIB, arena_bytes=MIB)
        with contextlib.closing(unit):
            _Story(unit).run(steps)


class _Story:
    def __init__(self, unit: ReturningUnit) -> None:
        self.unit = unit
        self.client = Client(unit, "c")
        self.block = unit.commit(rows(1, 100))
        self.client.reserve()
        self.held: list[Any] = []  # what ends each
        self.written: list[int] = []
        self.stored = {self.block}
        self.made: list[StillHeld] = []  # of this life, as connections end with the unit

    def run(self, steps: list[tuple[str, int]]) -> None:
        for step, seed in steps:
            getattr(self, step)(seed)
            self.check()
        self.unit.come_back()
        self.client.tell()
        settled(self.unit)
        self.check()
        spans = sum(isinstance(end, ReturnSpan) for end in self.held)
        assert self.unit.stats()["pins"] == len(self.held) - spans
        assert self.unit.stats()["spans"] == spans + 1
        assert {block.block_id for block in self.unit.service._space.blocks()} == self.stored | set(self.written)

    def check(self) -> None:
        space = self.unit.service._space
        for end in self.held:
            assert space.spans[end.span].open if isinstance(end, ReturnSpan) else end.pin in space.pins
        assert {block.block_id for block in space.blocks()} >= self.stored | set(self.written)

    def reserve(self, seed: int) -> None:
        span = self.client.reserve()
        self.held.append(ReturnSpan(span=span.span))
        self.client.grants.unput.add(span.first_block)
        self.written.append(write(span)[0])

    def pin(self, seed: int) -> None:
        self.held.append(Unpin(pin=self.client.pin(self.block).pin))

    def lose(self, seed: int) -> None:
        if self.held:
            self.client.lose(self.held.pop(seed % len(self.held)))

    def give(self, seed: int) -> None:
        if self.held:
            end = self.held.pop(seed % len(self.held))
            self.client.lose(end)
            self.client.submit(end)

    def withdraw(self, seed: int) -> None:
        """A request is granted, and nobody gets the reply nor hears that it was withdrawn."""
        number, _ = self.client.ids.take()
        self.client.submit(Pin(blocks=ids(self.block), holder=process_id()), number).result()
        self.client.ids.answered(number)

    def restart(self, seed: int) -> None:
        self.unit.come_back()
        self.made.clear()

    def make(self, seed: int) -> None:
        self.made.append(self.client.statement())

    def deliver(self, seed: int) -> None:
        if self.made:
            self.client.submit(self.made[seed % len(self.made)])
            settled(self.unit)

    def commit(self, seed: int) -> None:
        if self.written:
            block = self.written.pop(seed % len(self.written))
            self.unit.controller.committed.add(block)
            self.client.grants.unput.discard(block)
            self.stored.add(block)

    def abort(self, seed: int) -> None:
        """A block will be in no put, and the unit does not hear of it."""
        if self.written:
            block = self.written.pop(seed % len(self.written))
            self.client.lose(AbortBlocks(blocks=ids(block)))
