"""Storage units that come back with less than they had, or not: rows that are lost are named, and puts are refused."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import UNIT, Driver, differ, ints, put_request
from transfer_queue.errors import BlockLost, InvalidArgument
from transfer_queue.messages import Announce, Put, Reconcile, Reconciled, Settle
from transfer_queue.messages.journal import UnitGivenUp

SPAN = 1 << 16


def put_block(queue: Driver, block: int, **options: Any) -> Any:
    request = put_request(1, ("x",), block, **options)
    return queue.after(queue.ledger.put, request, queue._next(), "writer", queue.now)


def back(queue: Driver, *blocks: int, lost: tuple[int, ...] = (), lost_spans: tuple[int, ...] = ()) -> list[int]:
    """Unit 1 is back with these blocks; returns what it is told of them."""
    told: list[int] = reconcile(queue, *blocks, lost=ints(*lost), lost_spans=ints(*lost_spans)).committed.tolist()
    return told


def reconcile(queue: Driver, *blocks: int, **options: Any) -> Reconciled:
    request = Reconcile(unit=1, blocks=ints(*blocks), **options)
    reconciled: Reconciled = queue.after(queue.ledger.reconcile, request, queue.now)
    return reconciled


def give_up(queue: Driver, unit: int = 1) -> None:
    queue.after(queue.ledger.lose_unit, unit, queue.now, UnitGivenUp(unit=unit))


def replace(queue: Driver, unit: int = 1) -> None:
    """The unit announced itself without its index."""
    announce = Announce(unit_id="u", address="", local_address="", folder="", nonce="", capacity_bytes=1, life="new")
    queue.ledger.lose_unit(unit, queue.now, announce)
    queue.ledger.records.take()  # how it is replayed is the controller's business
    queue.shadow.lose_unit(unit, queue.now, announce)
    queue.wake()


def refused(queue: Driver, *blocks: int) -> None:
    """Puts of these are refused, and change nothing."""
    before = queue.ledger.state()
    for block in blocks:
        with pytest.raises(BlockLost, match=f"block {block} was given up") as caught:
            put_block(queue, block)
        assert caught.value.details == {"block": block}
    assert not list(differ(before, queue.ledger.state()))


def test_what_a_returned_unit_names_as_lost_is_refused_and_the_rest_is_not() -> None:
    """Single blocks and whole spans; stored blocks that nobody put yet, and what writers carve later, may be put."""
    queue = Driver()
    put_block(queue, UNIT + 1)
    assert back(queue, UNIT + 1, UNIT + 2, lost=(UNIT + 3,), lost_spans=(UNIT + SPAN,)) == [1, 0]
    refused(queue, UNIT + 3, UNIT + SPAN, UNIT + SPAN + 77)
    for block in (UNIT + 2, UNIT + 4, UNIT + 2 * SPAN, 2 * UNIT + 3):
        put_block(queue, block)


def test_rows_of_a_lost_block_are_named_and_the_block_is_not_put_again() -> None:
    """A unit that has it after all is told that nobody will ever want it."""
    queue = Driver()
    put_block(queue, UNIT + 1)
    put_block(queue, UNIT + 2)
    assert back(queue, UNIT + 1) == [1]
    assert queue.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {"x": [1]}
    refused(queue, UNIT + 2)
    assert back(queue, UNIT + 1, UNIT + 2) == [1, -1]


def test_what_is_in_use_stays_although_its_span_is_lost_for_what_comes() -> None:
    queue = Driver()
    put_block(queue, UNIT + SPAN)
    assert back(queue, UNIT + SPAN, UNIT + SPAN + 1, lost_spans=(UNIT + SPAN,)) == [1, -1]
    put_block(queue, UNIT)
    with pytest.raises(InvalidArgument, match="a block of its own"):
        put_block(queue, UNIT)


def test_what_writers_carved_since_the_unit_looked_is_there() -> None:
    """However many they are, and with the slots that were cleared; what lies before, or in other spans, is lost."""
    queue = Driver()
    first = put_block(queue, UNIT + SPAN + 3)
    found = reconcile(queue, carvable=ints(UNIT + 5 * SPAN, UNIT + SPAN + 4))
    assert found.carved.tolist() == [] and queue.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {"x": [0]}
    queue.clear(first)
    request = put_request(3, ("x",), UNIT + 5 * SPAN)
    queue.clear_rows(queue.after(queue.ledger.put, request, queue._next(), "writer", queue.now).indexes[1])
    for block in (UNIT + SPAN + 4, UNIT + SPAN + 2000):
        put_block(queue, block)
    found = reconcile(queue, UNIT + 4 * SPAN, carvable=ints(UNIT + 5 * SPAN, UNIT + SPAN + 4))
    assert found.committed.tolist() == [0]
    assert found.carved.tolist() == [UNIT + SPAN + 4, UNIT + SPAN + 2000, UNIT + 5 * SPAN]
    assert (found.cleared_blocks.tolist(), found.cleared_slots.tolist()) == ([UNIT + 5 * SPAN], [1])
    assert queue.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {}
    found = reconcile(queue, carvable=ints(UNIT + SPAN + 5))
    assert found.carved.tolist() == [UNIT + SPAN + 2000]


def test_a_unit_that_was_given_up_comes_back_with_what_nobody_put() -> None:
    """While it is away everything of it is refused; then only what was lost with it, and orphans that were settled."""
    queue = Driver()
    put_block(queue, UNIT + 1)
    queue.after(queue.ledger.settle, Settle(blocks=ints(UNIT + 5)), queue.now)
    give_up(queue)
    refused(queue, UNIT + 1, UNIT + 2, UNIT + 9 * SPAN)
    queue.restart()
    refused(queue, UNIT + 2)
    put_block(queue, 2 * UNIT + 1)
    assert back(queue, UNIT + 1, UNIT + 2, UNIT + 5) == [-1, 0, -1]
    put_block(queue, UNIT + 2)
    refused(queue, UNIT + 1, UNIT + 5)


def test_a_unit_without_its_index_is_refused_for_good() -> None:
    """Nothing else has to be remembered of it: not what was settled or lost before, nor what it did not free yet."""
    queue = Driver()
    for block in (UNIT + 1, UNIT + 2, 2 * UNIT + 1):
        put_block(queue, block)
    queue.after(queue.ledger.settle, Settle(blocks=ints(UNIT + 5, 2 * UNIT + 5)), queue.now)
    back(queue, UNIT + 1, UNIT + 2, lost_spans=(UNIT + SPAN,))
    replace(queue)
    assert queue.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {"x": [0, 1]}
    refused(queue, UNIT + 1, UNIT + 3, UNIT + 5, UNIT + SPAN, 2 * UNIT + 5)
    state = queue.ledger.state()["rows"]["blocks"]
    assert [each.tolist() for each in state["refused"]] == [[2 * UNIT + 5], [], [1], []]
    assert [unit for unit, *_ in state["orders"]] == []
    replace(queue)
    queue.restart()
    refused(queue, UNIT + 3)


@pytest.mark.parametrize("how", [give_up, replace, lambda queue: back(queue, lost=(3 * UNIT, UNIT + 7))])
def test_a_put_that_waits_with_a_lost_block_hears_it_at_once(how: Any) -> None:
    """It waits for its window; a put of another unit that waits behind it waits on."""
    queue = Driver(global_batch_size=1, num_global_batch=1, num_n_samples=1)
    put_block(queue, 2 * UNIT + 1, global_step=0)
    tickets = []
    for block in (UNIT + 7, 2 * UNIT + 7):
        assert put_block(queue, block, global_step=1, timeout_s=60.0) is None
        tickets.append(queue.ticket)
    how(queue)
    assert isinstance(queue.answers.get(tickets[0]), BlockLost)
    assert tickets[1] not in queue.answers


def test_a_put_without_data_names_no_block() -> None:
    queue = Driver()
    give_up(queue)
    request: Put = put_request(1, (), 0)
    assert queue.after(queue.ledger.put, request, queue._next(), "writer", queue.now) is not None
