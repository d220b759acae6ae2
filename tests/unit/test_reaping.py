"""What a unit takes back although nobody gave it back, and what it leaves alone."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.asking_unit import MIB, Answer, block_of, ids, rows
from tests.unit.returning_unit import Controller, ReturningUnit, mapped, write_here
from transfer_queue.errors import BlockLost, CapacityExceeded, ConnectionLost, InvalidArgument
from transfer_queue.messages import (
    AbortBlocks,
    Int64s,
    Pin,
    Pinned,
    ProcessId,
    Reserve,
    Reserved,
    ReturnSpan,
    StillHeld,
    Unpin,
    Write,
)
from transfer_queue.storage import log as fact_log
from transfer_queue.storage.arena import Arena
from transfer_queue.storage.block import image_parts
from transfer_queue.storage.facts import pin_fact
from transfer_queue.storage.log import FactLog
from transfer_queue.storage.spans import Span
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.codec import decode
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.grants import Grants
from transfer_queue.wire.holders import ELSEWHERE, process_id
from transfer_queue.wire.presence import GRACE_S
from transfer_queue.wire.requests import RequestIds
from transfer_queue.wire.security import MAX_CLIENT_ID_BYTES


@pytest.fixture
def folder() -> Iterator[Path]:
    with ServerFolder("test") as created:
        yield created.path


@pytest.fixture
def unit(folder: Path) -> Iterator[ReturningUnit]:
    made = ReturningUnit(folder, capacity_bytes=4 * MIB, arena_bytes=MIB)
    with contextlib.closing(made):
        yield made


class Client:
    """Asks a unit under a name of its own, and knows what it has."""

    def __init__(self, unit: ReturningUnit, name: str, holder: ProcessId | None = None) -> None:
        self.unit = unit
        self.name = name
        self.holder = holder or process_id()
        self.ids = RequestIds()
        self.grants = Grants(self.ids)

    def submit(self, request: Any, request_id: int = 0) -> Answer:
        answer = Answer(request)
        answer.ticket.client_id, answer.ticket.request_id = self.name, request_id
        self.unit.service.submit(request, answer.ticket)
        return answer

    def ask(self, request: Any) -> Any:
        number, _ = self.ids.take()
        reply = self.submit(request, number).result()
        self.grants.concluded(request, number, reply)
        self.ids.answered(number)
        return reply

    def reserve(self, size: int = 4096) -> Reserved:
        reserved: Reserved = self.ask(Reserve(size_bytes=size, holder=self.holder, timeout_s=5.0))
        return reserved

    def pin(self, *blocks: int) -> Pinned:
        pinned: Pinned = self.ask(Pin(blocks=ids(*blocks), holder=self.holder))
        return pinned

    def lose(self, message: Any) -> None:
        """Give something back by a message that never arrives."""
        assert self.grants.given_back(message)

    def tell(self) -> None:
        """Say what is held, as the first message of a connection does."""
        self.submit(self.statement())

    def statement(self) -> StillHeld:
        frames = self.grants.preface()
        assert frames is not None
        told = decode([bytes(frame) for frame in frames])[1]
        assert isinstance(told, StillHeld)
        return told


def write(span: Reserved, position: int = 0, at: int = 0) -> tuple[int, int]:
    """Write a block of one row into a span; return its id and where the next one begins."""
    block = span.first_block + position
    return block, at + write_here(mapped(span)[at:], block, rows(1, 100))


def figures(unit: ReturningUnit) -> tuple[int, int, int]:
    """How many open spans, pins and blocks there are."""
    stats = unit.stats()
    return stats["spans"], stats["pins"], stats["blocks"]


def settled(unit: ReturningUnit) -> None:
    """Take turns, and wait until what they found is settled."""
    space, reaper = unit.service._space, unit.service._reaper
    for _ in range(2):
        unit.turn(1.0)
        deadline = time.monotonic() + 20.0
        while reaper._settling or any(span.settling for span in list(space.spans.values())):
            assert time.monotonic() < deadline, "it was not settled"
            time.sleep(0.001)


# ---------------------------------------------------------------- what the client tells


@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_what_a_client_does_not_name_ends(unit: ReturningUnit, restarts: int) -> None:
    """A span and a pin whose end was lost are gone when the client tells what it has; the others stay, also twice."""
    block = unit.commit(rows(1, 100))
    client, other = Client(unit, "c"), Client(unit, "other")
    kept, lost = client.reserve(), client.reserve()
    held, dropped = client.pin(block), client.pin(block)
    other.reserve()
    client.lose(ReturnSpan(span=lost.span))
    client.lose(Unpin(pin=dropped.pin))
    for _ in range(restarts):
        unit.come_back()
    assert figures(unit) == (3, 2, 1)
    for _ in range(2):
        client.tell()
        assert figures(unit) == (2, 1, 1)
    client.submit(Unpin(pin=held.pin))
    client.submit(ReturnSpan(span=kept.span))
    assert figures(unit) == (1, 0, 1)


def test_what_is_told_is_true_for_ever(unit: ReturningUnit) -> None:
    """An old statement that comes late ends nothing that was granted after it, or to a request under way in it."""
    block = unit.commit(rows(1, 100))
    client = Client(unit, "c")
    client.reserve()
    number, _ = client.ids.take()
    told = client.statement()
    pinned = client.submit(Pin(blocks=ids(block), holder=process_id()), number).result()
    client.pin(block)
    client.submit(told)
    assert figures(unit) == (1, 2, 1)
    unit.come_back()
    client.submit(told)
    assert figures(unit) == (1, 2, 1)
    client.ids.answered(number)  # it was withdrawn, and the message that says so was lost
    client.tell()
    assert figures(unit) == (1, 1, 1) and pinned.pin


def test_a_request_that_comes_again_replaces_its_grant(unit: ReturningUnit) -> None:
    """The reply was lost with the unit: the client tells that it still waits, and asks again."""
    client = Client(unit, "c")
    client.reserve()
    number, _ = client.ids.take()
    request = Reserve(size_bytes=100, holder=process_id(), timeout_s=5.0)
    client.submit(request, number).result()
    unit.come_back()
    client.tell()
    assert unit.stats()["spans"] == 2
    client.submit(request, number).result()
    assert unit.stats()["spans"] == 2


def test_nobody_ends_what_was_granted_to_another(unit: ReturningUnit) -> None:
    """A forked child has the numbers of its parent's grants, and a name of its own; also after a restart."""
    block = unit.commit(rows(1, 100))
    parent, child = Client(unit, "c/1"), Client(unit, "c/2")
    span, pinned = parent.reserve(), parent.pin(block)
    unput, _ = write(span)
    for _ in range(2):
        for message in (Unpin(pin=pinned.pin), ReturnSpan(span=span.span), AbortBlocks(blocks=ids(unput, block))):
            child.submit(message)
        with pytest.raises(BlockLost, match="not lent"):
            child.ask(Write(span=span.span, offset=0, frames=(b"x",)))
        assert figures(unit) == (1, 1, 2)
        unit.come_back()
    for message in (Unpin(pin=pinned.pin), AbortBlocks(blocks=ids(unput)), ReturnSpan(span=span.span)):
        parent.submit(message)
    assert figures(unit) == (0, 0, 1)


def test_nothing_is_written_where_a_block_was_given_up(unit: ReturningUnit) -> None:
    """A write that is overtaken by the abort of its block would hit bytes that may be another's."""
    client = Client(unit, "far", ELSEWHERE)
    span = put_elsewhere(client)
    client.submit(AbortBlocks(blocks=ids(span.first_block)))
    with pytest.raises(BlockLost, match="given up"):
        client.ask(Write(span=span.span, offset=0, frames=(b"x",)))


# ---------------------------------------------------------------- blocks that are in no put


@pytest.mark.parametrize("told_first", [False, True])
def test_blocks_that_nobody_may_put_any_more_are_freed(unit: ReturningUnit, told_first: bool) -> None:
    """An abort was lost with the unit: the block goes; what was put, or may still be put, stays."""
    client = Client(unit, "c")
    span = client.reserve()
    aborted, at = write(span)
    put, at = write(span, 1, at)
    undecided, at = write(span, 2, at)
    unit.controller.committed.add(put)
    client.grants.unput.update((aborted, undecided))
    assert unit.stats()["blocks"] == 3
    client.lose(AbortBlocks(blocks=ids(aborted)))
    unit.die()
    unit.start()
    later, _ = write(span, 3, at)
    if told_first:
        client.tell()
        client.grants.unput.add(later)
    unit.service.return_to(3, unit.controller.reconcile)
    settled(unit)
    if not told_first:
        assert unit.stats()["blocks"] == 4  # nobody knows what the client still wants
        client.grants.unput.add(later)
        client.tell()
        settled(unit)
    assert {block.block_id for block in unit.service._space.blocks()} == {put, undecided, later}
    client.lose(AbortBlocks(blocks=ids(undecided)))
    client.tell()
    settled(unit)
    assert {block.block_id for block in unit.service._space.blocks()} == {put, later}


def test_what_cannot_be_settled_now_is_settled_later(unit: ReturningUnit) -> None:
    """The controller is away when a block is to be settled: the unit asks again."""
    client = Client(unit, "c")
    block, _ = write(client.reserve())
    assert unit.stats()["blocks"] == 1
    failures = [ConnectionLost("away"), None]

    def settle(blocks: Int64s) -> Int64s:
        assert blocks.tolist() == [block]
        if (error := failures.pop(0)) is not None:
            raise error
        return np.zeros(1, np.int64)

    unit.controller.settle = settle  # type: ignore[method-assign]
    unit.come_back()
    client.tell()
    settled(unit)
    assert failures == [] and unit.stats()["blocks"] == 0


# ---------------------------------------------------------------- clients that only ask


def put_elsewhere(client: Client, *, whole: bool = True) -> Reserved:
    """Write a block by messages; the span stays open."""
    plan = block_of(rows(1, 100))
    span = client.reserve(plan.size_bytes)
    parts = image_parts(plan, span.first_block)
    frames = tuple(parts) if whole else (parts[0],)
    client.ask(Write(span=span.span, offset=0, frames=frames))
    return span


@pytest.mark.parametrize("restart", [False, True])
def test_who_is_gone_holds_nothing(unit: ReturningUnit, restart: bool) -> None:
    """Its spans are settled as those of a dead process, its pins end; a write to such a span is refused, and all of a
    client with memory in its hands stays.
    """
    client, here = Client(unit, "far", ELSEWHERE), Client(unit, "near")
    put, unput = put_elsewhere(client), put_elsewhere(client)
    unit.controller.committed.add(put.first_block)
    client.pin(put.first_block)
    here.pin(put.first_block)
    kept = here.reserve()
    assert figures(unit) == (3, 2, 2)
    if restart:
        unit.come_back()
    else:
        unit.turn(1.0)
    assert set(unit.service.holding()) == {"far"}
    for name in ("far", "near"):
        unit.service.gone(name)
    settled(unit)
    assert figures(unit) == (1, 1, 1) and set(unit.service.holding()) == set()
    with pytest.raises(BlockLost, match="put again"):
        client.ask(Write(span=unput.span, offset=0, frames=(b"x",)))
    again = put_elsewhere(client)
    client.submit(ReturnSpan(span=unput.span))  # of the old life: nothing happens
    assert client.ask(Write(span=again.span, offset=0, frames=(b"x",))).count == 1
    assert write(kept)[0] == kept.first_block


def test_who_does_not_come_back_to_a_unit_is_gone(unit: ReturningUnit) -> None:
    """After a restart the server never heard of them: they have as long as any torn connection."""
    away, back, late = (Client(unit, name, ELSEWHERE) for name in ("away", "back", "late"))
    for client in (away, back, late):
        client.reserve()
    unit.come_back()
    unit.turn(1.0)
    back.tell()
    unit.turn(GRACE_S / 2)
    assert unit.stats()["spans"] == 3
    late.tell()
    unit.turn(GRACE_S / 2)
    unit.turn(1.0)
    assert unit.stats()["spans"] == 2
    assert set(unit.service.holding()) == {"back", "late"}


def test_who_is_back_before_the_next_turn_keeps_all(unit: ReturningUnit) -> None:
    """A client that was gone and came back at once finds what it had."""
    client = Client(unit, "far", ELSEWHERE)
    span = put_elsewhere(client)
    unit.service.gone("far")
    client.tell()
    unit.turn(1.0)
    assert client.ask(Write(span=span.span, offset=0, frames=(b"x",))).count == 1


# ---------------------------------------------------------------- all of it in any order

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


# ---------------------------------------------------------------- half starts, long names, a full journal


STAGES = ["Arenas", "rebuild", "Growth", "UnitService._make_first_arena"]


@pytest.mark.parametrize(("stage", "returning"), [*((stage, False) for stage in STAGES), ("rebuild", True)])
def test_a_start_that_fails_leaves_nothing_open(
    folder: Path, stage: str, returning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever raises: no thread, no descriptor, no file of this start; what an earlier process left is there."""
    options: Any = {"capacity_bytes": 4 * MIB, "arena_bytes": MIB}
    if returning:
        last = ReturningUnit(folder, Controller(), **options)
        last.commit(rows(1, 100))
        last.die()
    files = sorted(path.name for path in folder.iterdir())
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(f"transfer_queue.storage.unit.{stage}", _fail)
        with pytest.raises(CapacityExceeded, match="this stage fails"):
            UnitService(folder, journal=True, **options)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
    assert sorted(path.name for path in folder.iterdir()) == files
    with UnitService(folder, journal=True, **options) as service:
        assert service.recovered == returning


def _fail(*arguments: Any, **named: Any) -> Any:
    raise CapacityExceeded("this stage fails")


def test_the_room_for_a_fact_suffices_for_the_longest_names(folder: Path) -> None:
    """A span of the longest client id and host, with the largest numbers, fits; a longer host is refused."""
    arena = Arena(folder / ("arena-" + "x" * 64), 4096)
    most, asked = (1 << 63) - 1, ("ä" * (MAX_CLIENT_ID_BYTES // 2), (1 << 63) - 1)
    holder = ProcessId(host="ö" * 64, pid=most, start_time=1e300)
    span = Span(most, most, arena, most, most, holder, asked, [])
    for fact in (span.fact(), pin_fact(most, holder, asked, ids())):
        assert len(msgpack.packb([fact])) < fact_log._FACT_BYTES
    arena.close()
    with UnitService(folder, capacity_bytes=MIB, arena_bytes=MIB) as service:
        request = Reserve(size_bytes=1, holder=ProcessId(host="ö" * 65, pid=1, start_time=0.0), timeout_s=0.0)
        answer = Answer(request)
        service.submit(request, answer.ticket)
        with pytest.raises(InvalidArgument, match="more than 128 bytes"):
            answer.result()


def test_a_full_journal_is_told_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As long as it fails; when it worked again, the next failure is news."""
    log, _ = FactLog.open(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    facts: list[Any] = [(1, "x" * (2 * MIB))]
    try:
        for _ in range(2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            for _ in range(3):
                log.write(facts)
            assert facts
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            log.write(facts)
            assert not facts
            facts.append((1, "x" * (2 * MIB)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.close(remove=True)
    assert len(caplog.messages) == 2
