"""A storage unit that comes back without all it had: whether it knows that, and whom it tells."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, rows
from tests.unit.returning_unit import ReturningUnit, mapped, write_here
from transfer_queue.errors import CapacityExceeded, ConnectionLost, StaleSampleError
from transfer_queue.messages import Reconcile, Reconciled, Unpin
from transfer_queue.storage import log
from transfer_queue.storage.recovery import all_facts
from transfer_queue.wire.folder import ServerFolder


@pytest.fixture
def unit() -> Iterator[ReturningUnit]:
    with ServerFolder("test") as folder:
        made = ReturningUnit(folder.path, capacity_bytes=4 * MIB, arena_bytes=MIB)
        with contextlib.closing(made):
            yield made


def cut_short(folder: Path) -> None:
    """Of the last record nothing is left: the journal ends where it ended before that was written."""
    [segment] = (folder / "journal").glob("journal-*")
    with segment.open("r+b") as file:
        file.seek(len(file.read().rstrip(b"\0")) - 64)
        file.write(bytes(64))


def remove_journal(folder: Path) -> None:
    shutil.rmtree(folder / "journal")


def remove_end(folder: Path) -> None:
    (folder / "journal.end").unlink()


def cut_end(folder: Path) -> None:
    os.truncate(folder / "journal.end", 3)


@pytest.mark.parametrize("damage", [cut_short, remove_journal, remove_end, cut_end], ids=lambda each: each.__name__)
def test_an_index_that_is_not_whole_is_none(
    unit: ReturningUnit, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    """The unit is another one then, with new arenas, and says so; blocks and spans of before meet nothing."""
    block, span = unit.commit(rows(2, 100)), unit.reserve(MIB // 4)
    pin = unit.pinned(block).pin
    life, old = unit.service.life, set(unit.folder.glob("arena-*"))
    unit.die()
    damage(unit.folder)
    unit.start()
    assert "forgets what it stored" in caplog.text and "journal.end" in caplog.text
    assert unit.service.life != life and unit.service.recovered == 0
    assert not old & set(unit.folder.glob("arena-*"))
    unit.service.return_to(4, unit.controller.reconcile)
    with pytest.raises(StaleSampleError):
        unit.read(span.first_block, [0])
    again = unit.put(rows(2, 100))
    mine = unit.pinned(again).pin
    unit.tell(Unpin(pin=pin))  # of the life before
    assert again >> 48 == 4 and unit.stats()["pins"] == 1
    life = unit.service.life
    unit.tell(Unpin(pin=mine))
    unit.controller.committed.add(again)
    unit.come_back()
    assert unit.service.life == life and unit.service.recovered == 1


def test_a_record_that_was_being_written_at_the_death_makes_no_difference(unit: ReturningUnit) -> None:
    """Nobody saw its effect: the index is whole without it, and also if only the note of its number is missing."""
    block, life = unit.commit(rows(2, 100)), unit.service.life
    unit.die()
    end = unit.folder / "journal.end"
    before = end.read_bytes()
    [segment] = (unit.folder / "journal").glob("journal-*")
    with segment.open("r+b") as file:
        file.seek(len(file.read().rstrip(b"\0")) + 8 & ~7)
        file.write(b"\7" * 40)
    unit.start()
    assert unit.service.life == life and unit.service.recovered == 1
    unit.die()
    end.write_bytes((int.from_bytes(before, "little") - 1).to_bytes(8, "little"))
    unit.start()
    assert unit.service.life == life and unit.service.recovered == 1
    unit.service.return_to(3, unit.controller.reconcile)
    np.testing.assert_array_equal(unit.read(block, [1]), rows(2, 100)[1:])


def test_a_life_stays_when_the_journal_is_shortened(unit: ReturningUnit) -> None:
    """A snapshot takes the place of the records, also of those of what is lost and not told yet."""
    life = unit.service.life
    unit.service._space.lose(np.array([77]))
    unit.service._space.lose_span(3 << 48 | 5 << 16)
    unit.service._save()
    assert unit.service._log is not None
    log.FactLog.finish_snapshot(unit.service._log.begin_snapshot(), all_facts(unit.service._space))
    unit.die()
    unit.start()
    assert unit.service.life == life
    unit.service.return_to(3, unit.controller.reconcile)
    assert unit.controller.lost[-1] == ({77}, {3 << 48 | 5 << 16})


def failing(question: Reconcile) -> Reconciled:
    raise ConnectionLost("no controller")


def test_what_is_lost_is_told_until_the_controller_has_heard_it(unit: ReturningUnit) -> None:
    """A block with a damaged head, the spans of an arena that is gone: also after further deaths, then no more."""
    damaged = unit.put(rows(1, MIB // 2))
    span = unit.reserve(MIB // 2)
    block = span.first_block
    write_here(mapped(span), block, rows(1, 10))
    pinned = unit.pinned(damaged)
    unit.tell(Unpin(pin=pinned.pin))
    unit.die()
    assert span.arena != pinned.arenas[0]
    os.unlink(span.arena)
    np.memmap(pinned.arenas[0], np.uint8, "r+")[int(pinned.offsets[0])] ^= 16
    for _ in range(3):
        unit.start()
        with pytest.raises(ConnectionLost):
            unit.service.return_to(3, failing)
        unit.die()
    unit.start()
    unit.service.return_to(3, unit.controller.reconcile)
    lost, spans = unit.controller.lost[-1]
    assert damaged in lost and spans == {block}
    assert not {damaged, block} & set(unit.controller.told[-1])
    unit.come_back()
    assert unit.controller.lost[-1] == (set(), set())
    assert unit.stats()["blocks"] == 0


def test_what_the_controller_refuses_is_freed(unit: ReturningUnit) -> None:
    """Also of a writer that lives; what may still be put stays."""
    refused, open_fate = unit.put(rows(2, 100)), unit.put(rows(2, 100))
    unit.controller.refused.add(refused)
    unit.come_back()
    assert unit.stats()["blocks"] == 1
    np.testing.assert_array_equal(unit.read(open_fate, [1]), rows(2, 100)[1:])


def test_behind_a_block_that_is_not_found_none_will_be(unit: ReturningUnit) -> None:
    """The header of a block in use is damaged, in a span that a writer has: what is written next is lost as well."""
    span = unit.reserve(MIB // 2)
    memory = mapped(span)
    at = write_here(memory, span.first_block, rows(2, 100))
    unit.controller.committed.add(span.first_block)
    unit.read(span.first_block, [0])
    write_here(memory[at:], span.first_block + 1, rows(2, 100))
    unit.controller.committed.add(span.first_block + 1)
    memory[at] ^= 16
    unit.come_back()
    assert unit.controller.lost[-1] == ({span.first_block + 1}, {span.first_block})
    np.testing.assert_array_equal(unit.read(span.first_block, [0]), rows(2, 100)[:1])


def test_no_space_for_the_end_of_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit does not start, and leaves no descriptor open."""

    def fail(end: object, sequence: int) -> None:
        raise CapacityExceeded("no space")

    before = len(os.listdir("/proc/self/fd"))
    with ServerFolder("test") as folder, monkeypatch.context() as patch:
        patch.setattr(log._End, "note", fail)
        with pytest.raises(CapacityExceeded, match="no space"):
            log.FactLog.open(folder.path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_any_number_of_blocks_may_be_carved_while_the_controller_is_asked(unit: ReturningUnit) -> None:
    """None of them is lost, though the unit had not found them when it asked."""
    span = unit.reserve(MIB // 2)
    memory, carved = mapped(span), range(span.first_block, span.first_block + 1500)

    def commit_many(question: Reconcile) -> Reconciled:
        at = 0
        for block in carved:
            at += write_here(memory[at:], block, rows(1, 10))
        unit.controller.committed.update(carved)
        return unit.controller.reconcile(question)

    unit.die()
    unit.start()
    unit.service.return_to(3, commit_many)
    assert unit.service.lost_blocks == {} and unit.controller.lost[1:] == [(set(), set())]
    np.testing.assert_array_equal(unit.read(carved[-1], [0]), rows(1, 10))
