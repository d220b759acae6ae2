"""A storage unit whose process is killed: what was committed is there again, nothing is lent twice, nothing leaks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, Answer, clear, free, ids, rows
from tests.unit.returning_unit import ReturningUnit, bytes_of, mapped, write_here
from tests.unit.test_arena import dead_process
from transfer_queue.errors import ConnectionLost, StaleSampleError
from transfer_queue.messages import Pin, Pinned, Reserve, ReturnSpan, Unpin
from transfer_queue.wire.holders import process_id


def flip(unit: ReturningUnit, block: int, at: int) -> None:
    """Flip a bit of a stored block."""
    pinned = unit.ask(Pin(blocks=ids(block), holder=process_id()))
    path, start = pinned.arenas[0], int(pinned.offsets[0])
    unit.tell(Unpin(pin=pinned.pin))
    np.memmap(path, np.uint8, "r+")[start + at] ^= 16


def test_blocks_are_there_again_and_ids_go_on(unit: ReturningUnit) -> None:
    """After two deaths, blocks of both lives are byte-equal, and no span number or arena is used twice."""
    stored = {}
    for life in range(3):
        for count in (1, 5):
            values = rows(count, 1000, first=10 * life + count)
            stored[unit.commit(values)] = values
        if life < 2:
            unit.come_back()
            assert unit.service.recovered == len(stored) and unit.service.lost_blocks == {}
    assert len(stored) == 6 and len({block >> 16 for block in stored}) == 6
    for block, values in stored.items():
        np.testing.assert_array_equal(unit.read(block, list(range(len(values)))), values)
    unit.tell(free(*stored))
    assert unit.all_free()


STEPS = 9


@pytest.mark.parametrize("kills", [{step} for step in range(STEPS)] + [set(range(STEPS))])
def test_a_kill_between_any_two_steps_changes_nothing(unit: ReturningUnit, kills: set[int]) -> None:
    """Reserve, carve, fill, commit, pin, clear, free, unpin, return: whenever the unit dies, all of it goes on."""
    values = rows(8, 8192)
    state: dict[str, Any] = {}

    def reserve() -> None:
        state["span"] = unit.reserve(MIB // 2)
        state["memory"] = mapped(state["span"])
        state["block"] = state["span"].first_block

    def carve() -> None:
        state["next"] = write_here(state["memory"], state["block"], values, seal=False)

    def fill() -> None:
        write_here(state["memory"], state["block"], values)

    def commit() -> None:
        unit.controller.committed.add(state["block"])

    def pin() -> None:
        state["pin"] = unit.ask(Pin(blocks=ids(state["block"]), holder=process_id()))
        state["image"] = bytes_of(state["pin"]).tobytes()

    def clear_some() -> None:
        unit.controller.cleared[state["block"]] = {1, 2, 3}
        unit.tell(clear(state["block"], [1, 2, 3]))
        np.testing.assert_array_equal(unit.read(state["block"], [0, 7]), values[[0, 7]])

    def free_it() -> None:
        unit.controller.committed.discard(state["block"])
        unit.tell(free(state["block"]))
        other = unit.commit(rows(100, 5000))
        assert bytes_of(state["pin"]).tobytes() == state["image"]
        unit.controller.committed.discard(other)
        unit.tell(free(other))

    def unpin() -> None:
        unit.tell(Unpin(pin=state["pin"].pin))

    def carve_more() -> None:
        later = state["block"] + 1
        write_here(state["memory"][state["next"] :], later, values)
        unit.controller.committed.add(later)
        np.testing.assert_array_equal(unit.read(later, [3]), values[[3]])
        unit.controller.committed.discard(later)
        unit.tell(free(later))

    steps: list[Callable[[], None]] = [reserve, carve, fill, commit, pin, clear_some, free_it, unpin, carve_more]
    assert len(steps) == STEPS
    for number, step in enumerate(steps):
        step()
        if number in kills:
            unit.come_back()
            assert unit.service.lost_blocks == {}
    unit.tell(ReturnSpan(span=state["span"].span))
    assert unit.all_free()


def test_living_writers_go_on_while_the_unit_is_away(unit: ReturningUnit) -> None:
    """A block carved and committed between death and return is announced as stored, and readable."""
    span = unit.reserve(MIB // 2)
    memory = mapped(span)
    at = write_here(memory, span.first_block, rows(2, 100))
    unit.die()
    second = write_here(memory[at:], span.first_block + 1, rows(3, 100))
    unit.controller.committed = {span.first_block, span.first_block + 1}
    unit.start()
    told = len(unit.controller.told)

    def commit_more(question: Any) -> Any:
        if len(unit.controller.told) == told:
            write_here(memory[at + second :], span.first_block + 2, rows(1, 100))
            unit.controller.committed.add(span.first_block + 2)
        return unit.controller.reconcile(question)

    unit.service.return_to(3, commit_more)
    assert len(unit.controller.told) == told + 1 and unit.service.lost_blocks == {}
    for number, count in enumerate((2, 3, 1)):
        np.testing.assert_array_equal(unit.read(span.first_block + number, [count - 1]), rows(count, 100)[-1:])


def test_what_a_dead_writer_left_is_settled_after_the_return(unit: ReturningUnit) -> None:
    """Of its blocks, the committed one stays, the sealed and the unsealed orphan are freed, and its span ends."""
    span = unit.reserve(MIB // 2, dead_process())
    memory, at = mapped(span), 0
    for position, seal in enumerate((True, True, False)):
        at += write_here(memory[at:], span.first_block + position, rows(2, 100), seal=seal)
    unit.controller.committed.add(span.first_block)
    unit.come_back()
    unit.turn(1.5)
    deadline = time.monotonic() + 5
    while unit.stats()["blocks"] > 1 and time.monotonic() < deadline:
        unit.turn(1.5)
    stats = unit.stats()
    assert (stats["blocks"], stats["spans"]) == (1, 0)
    np.testing.assert_array_equal(unit.read(span.first_block, [1]), rows(2, 100)[1:])
    unit.come_back()
    assert unit.service.recovered == 1


def test_a_pin_outlives_the_unit_as_long_as_its_holder(unit: ReturningUnit) -> None:
    """Bytes under the pin of a living reader are never reused; those of a dead one are, in the next turn."""
    block, other = unit.commit(rows(4, 8192)), unit.commit(rows(4, 8192, first=9))
    mine = unit.ask(Pin(blocks=ids(block), holder=process_id()))
    unit.ask(Pin(blocks=ids(other), holder=dead_process()))
    image = bytes_of(mine).tobytes()
    unit.controller.committed.clear()
    unit.tell(free(block, other))
    unit.come_back()
    assert unit.stats()["pins"] == 2 and unit.stats()["blocks"] == 2
    unit.turn(1.5)
    assert unit.stats()["pins"] == 1 and unit.stats()["blocks"] == 1
    for filling in range(20):
        unit.put(np.full((1, 100_000), filling, np.uint8))
    assert bytes_of(mine).tobytes() == image
    unit.come_back()
    with pytest.raises(StaleSampleError):
        unit.ask(Pin(blocks=ids(block), holder=process_id()))
    unit.tell(Unpin(pin=mine.pin))
    assert unit.stats()["pins"] == 0 and unit.stats()["bytes_pinned"] == 0
    assert unit.ask(Pin(blocks=ids(), holder=process_id())).pin > mine.pin


def test_space_given_back_by_cleared_rows_keeps_its_new_owner(folder: Path) -> None:
    """Younger blocks in the gaps of an older one, and gaps in those, survive; the space of dropped ones is free."""
    unit = ReturningUnit(folder, capacity_bytes=MIB, arena_bytes=MIB)
    with contextlib.closing(unit):
        old = unit.commit(rows(10, 100_000))
        unit.controller.cleared[old] = set(range(1, 9))
        unit.tell(clear(old, list(range(1, 9))))
        young = unit.commit(rows(5, 80_000, first=50))
        unit.controller.cleared[young] = {1, 2, 3}
        unit.tell(clear(young, [1, 2, 3]))
        youngest, dropped = unit.commit(rows(2, 100_000, first=90)), unit.commit(rows(1, 100_000, first=200))
        unit.controller.committed.discard(dropped)
        unit.tell(free(dropped))
        before = unit.stats()
        for _ in range(2):
            unit.come_back()
            assert unit.service.lost_blocks == {} and unit.stats() == before
            np.testing.assert_array_equal(unit.read(old, [0, 9]), rows(10, 100_000)[[0, 9]])
            np.testing.assert_array_equal(unit.read(young, [0, 4]), rows(5, 80_000, first=50)[[0, 4]])
            np.testing.assert_array_equal(unit.read(youngest, [0, 1]), rows(2, 100_000, first=90))
            with pytest.raises(StaleSampleError, match="1 rows"):
                unit.read(old, [0, 5])
        unit.tell(free(old, young, youngest))
        assert unit.all_free()


def test_a_block_with_reused_bytes_is_served_once_its_cleared_rows_are_known(unit: ReturningUnit) -> None:
    """Before the controller has answered, other blocks are read at once; this one and reservations wait."""
    whole, partial = unit.commit(rows(4, 8192)), unit.commit(rows(4, 8192, first=9))
    unit.controller.cleared[partial] = {1, 2}
    unit.tell(clear(partial, [1, 2]))
    unit.die()
    unit.start()
    np.testing.assert_array_equal(unit.read(whole, [1]), rows(4, 8192)[[1]])
    waiting = [
        unit.begin(Pin(blocks=ids(whole, partial), holder=process_id())),
        unit.begin(Reserve(size_bytes=100, holder=process_id(), timeout_s=5.0)),
    ]
    with pytest.raises(ConnectionLost):
        unit.service.return_to(3, lambda question: (_ for _ in ()).throw(ConnectionLost("no controller")))
    assert [answer.replies for answer in waiting] == [[], []]
    unit.service.return_to(3, unit.controller.reconcile)
    pinned = waiting[0].result()
    assert isinstance(pinned, Pinned) and pinned.freed_slots.tolist() == [1, 2]
    assert waiting[1].result().first_block >> 48 == 3


def test_frees_that_were_lost_with_the_unit_come_by_reconciling(unit: ReturningUnit) -> None:
    """Rows cleared while the unit was away are given back; blocks that nobody uses any more go if they can."""
    partly, gone = unit.commit(rows(4, 8192)), unit.commit(rows(4, 8192), dead_process())
    free_before = unit.stats()["bytes_free"]
    unit.die()
    unit.controller.cleared[partly] = {0, 1}
    unit.controller.committed.discard(gone)
    unit.start()
    unit.service.return_to(3, unit.controller.reconcile)
    with pytest.raises(StaleSampleError):
        unit.read(partly, [1])
    unit.turn(1.5)
    deadline = time.monotonic() + 5
    while unit.stats()["blocks"] > 1 and time.monotonic() < deadline:
        unit.turn(1.5)
    assert unit.stats()["bytes_free"] > free_before + 4 * 8192 + 2 * 8192 - 128


@pytest.mark.parametrize(("at", "reason"), [(0, "header"), (17, "header"), (28, "header"), (66, "directory")])
def test_a_block_with_a_damaged_head_is_lost(
    unit: ReturningUnit, caplog: pytest.LogCaptureFixture, at: int, reason: str
) -> None:
    """It is not announced, its space is free, the log says which and why; the blocks beside it are there."""
    kept, damaged = unit.commit(rows(2, 8192)), unit.commit(rows(2, 8192))
    flip(unit, damaged, at)
    unit.come_back()
    assert list(unit.service.lost_blocks) == [damaged] and reason in unit.service.lost_blocks[damaged]
    assert f"block {damaged} is lost" in caplog.text
    assert unit.controller.told[-1] == [kept]
    unit.tell(free(kept))
    assert unit.all_free()


def test_a_block_in_use_that_was_never_completed_is_lost(unit: ReturningUnit) -> None:
    """The controller is told again, without it; a living writer's other open block stays announced."""
    span = unit.reserve(MIB // 2)
    memory = mapped(span)
    at = write_here(memory, span.first_block, rows(2, 100), seal=False)
    write_here(memory[at:], span.first_block + 1, rows(2, 100), seal=False)
    unit.controller.committed.add(span.first_block)
    unit.come_back()
    first, second = (told[:2] for told in unit.controller.told[-2:])
    assert first == [span.first_block, span.first_block + 1] and second[0] == span.first_block + 1
    assert unit.service.lost_blocks == {span.first_block: "it is in use, but not whole"}


def test_a_request_sent_again_gets_one_grant(unit: ReturningUnit) -> None:
    """The answer to a reservation and a pin is lost with the unit; asked again, nothing of the first grant is left."""
    block = unit.commit(rows(1, 100))
    requests = (
        Reserve(size_bytes=1000, holder=process_id(), timeout_s=5.0),
        Pin(blocks=ids(block), holder=process_id()),
    )
    answers = [Answer(request) for request in requests]
    for number, answer in enumerate(answers):
        answer.ticket.request_id = 10**9 + number
        unit.service.submit(answer.ticket.request, answer.ticket)
        answer.result()
    unit.come_back()
    for number, request in enumerate(requests):
        answer = Answer(request)
        answer.ticket.request_id = 10**9 + number
        unit.service.submit(request, answer.ticket)
        assert answer.result()
    assert (unit.stats()["spans"], unit.stats()["pins"]) == (1, 1)
