"""What a unit takes back although nobody gave it back, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.asking_unit import ids, rows
from tests.unit.returning_unit import ReturningUnit
from tests.unit.unit_client import Client, figures, put_elsewhere, settled, write
from transfer_queue.errors import BlockLost, ConnectionLost
from transfer_queue.messages import (
    AbortBlocks,
    Int64s,
    Pin,
    Reserve,
    ReturnSpan,
    Unpin,
    Write,
)
from transfer_queue.wire.holders import ELSEWHERE, process_id
from transfer_queue.wire.presence import GRACE_S

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
