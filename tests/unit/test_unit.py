"""A storage unit: blocks in spans, pins, fetches, frees of blocks and of rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.asking_unit import MIB, Unit, block_of, clear, free, ids, rows, unpacked
from tests.unit.whole_block import write_block
from transfer_queue.errors import (
    InvalidArgument,
    StaleSampleError,
    UnknownName,
)
from transfer_queue.messages import (
    AbortBlocks,
    Fetch,
    Pin,
    Pinned,
    ReturnSpan,
    Unpin,
)
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.holders import process_id


@pytest.fixture
def unit(folder: Path) -> Iterator[Unit]:
    made = Unit(folder, capacity_bytes=4 * MIB, arena_bytes=MIB)
    with made.service:
        yield made


def test_blocks_are_found_by_pin_and_lie_where_it_says(unit: Unit) -> None:
    """Two blocks carved from one span by memcpy are pinned by id; the bytes at the answer are the blocks."""
    plan = block_of(rows(4, 100))
    span = unit.reserve(MIB // 2)
    memory = np.memmap(span.arena, np.uint8, "r+", span.offset, (span.size_bytes,))
    assert span.first_block == 3 << 48 | span.span << 16
    for position in range(2):
        write_block(plan, memory[position * plan.size_bytes :], span.first_block + position)
    pinned = unit.ask(
        Pin(blocks=ids(span.first_block + 1, span.first_block, span.first_block + 1), holder=process_id())
    )
    assert isinstance(pinned, Pinned) and pinned.arenas == (span.arena,)
    assert (pinned.offsets - span.offset).tolist() == [plan.size_bytes, 0, plan.size_bytes]
    assert pinned.sizes.tolist() == [plan.size_bytes] * 3 and pinned.freed_slots.tolist() == []
    assert unit.stats()["pins"] == 1
    unit.tell(Unpin(pin=pinned.pin))
    unit.tell(Unpin(pin=pinned.pin))
    stats = unit.stats()
    assert (stats["pins"], stats["blocks"], stats["spans"], stats["bytes_live"]) == (0, 2, 1, 2 * plan.size_bytes)
    unit.tell(ReturnSpan(span=span.span))
    stats = unit.stats()
    assert (stats["spans"], stats["bytes_reserved"], stats["bytes_live"]) == (0, 0, 2 * plan.size_bytes)


def test_blocks_that_are_gone_are_named(unit: Unit) -> None:
    """A pin or fetch of a freed, a foreign or an unwritten block raises with its id and holds nothing."""
    kept, freed = unit.put(rows(1, 100)), unit.put(rows(1, 100))
    unit.tell(free(freed))
    for gone in (freed, 4 << 48 | 1 << 16, kept + 1):
        with pytest.raises(StaleSampleError, match=rf"1 of 2 blocks are not stored any more .*: {gone}$") as caught:
            unit.ask(Pin(blocks=ids(kept, gone), holder=process_id()))
        assert caught.value.details["blocks"] == [gone]
        with pytest.raises(StaleSampleError):
            unit.read(gone, [0])
    assert unit.stats()["pins"] == 0


def test_first_blocks_of_a_span_can_be_freed_while_its_tail_is_written(unit: Unit) -> None:
    """Space of a cleared block is reused at once, and the holder's later blocks are not touched by it."""
    plan = block_of(rows(8, 1000))
    span = unit.reserve(4 * plan.size_bytes)
    memory = np.memmap(span.arena, np.uint8, "r+", span.offset, (span.size_bytes,))
    before = unit.stats()["bytes_free"]
    for position in range(4):
        write_block(plan, memory[position * plan.size_bytes :], span.first_block + position)
        unit.tell(free(*range(span.first_block, span.first_block + position)))
    assert unit.stats()["bytes_free"] == before + 3 * plan.size_bytes
    other = unit.put(rows(8, 1000, first=50))
    np.testing.assert_array_equal(unit.read(span.first_block + 3, [7, 0]), rows(8, 1000)[[7, 0]])
    np.testing.assert_array_equal(unit.read(other, [1]), rows(1, 1000, first=51))
    unit.tell(free(span.first_block + 3, other))
    unit.tell(ReturnSpan(span=span.span))
    stats = unit.stats()
    assert stats["bytes_free"] == stats["bytes_arenas"] and stats["blocks"] == 0


def test_cleared_rows_stop_being_live_and_long_runs_are_reused(unit: Unit) -> None:
    """Of 100 rows 99 are cleared: live bytes fall by theirs, runs of 4 KiB are free, the last row is unharmed."""
    block = unit.put(rows(100, 2048))
    before = unit.stats()
    for slots in ([0], [1, 2], [50, 52, 51], [99, 98], list(range(100))[3:60]):
        unit.tell(clear(block, slots))
    unit.tell(clear(block, [s for s in range(100) if s != 77] + [500, -1]))
    after = unit.stats()
    assert before["bytes_live"] - after["bytes_live"] == 99 * 2048
    assert after["bytes_free"] - before["bytes_free"] >= 99 * 2048 - 3 * 64
    unit.put(np.full((1, 70 * 2048), 255, np.uint8))
    np.testing.assert_array_equal(unit.read(block, [77]), rows(1, 2048, first=78))
    unit.tell(clear(block, [77]))
    unit.tell(free(block))
    assert unit.stats()["blocks"] == 1


def test_short_runs_of_cleared_rows_wait_for_their_block(unit: Unit) -> None:
    """Rows too small to be reused alone count as overhead until enough neighbours are cleared."""
    block = unit.put(rows(100, 1000))
    unit.tell(clear(block, [10, 11, 12]))
    assert unit.stats()["bytes_overhead"] == 3000
    unit.tell(clear(block, [13, 14]))
    assert unit.stats()["bytes_overhead"] < 128
    unit.tell(free(block))
    stats = unit.stats()
    assert stats["bytes_free"] == stats["bytes_arenas"]


def test_a_shared_value_is_kept_until_its_last_row_is_cleared(unit: Unit) -> None:
    """Two values of 8 KiB for six rows: each goes with the last of its rows; cleared rows are refused at once."""
    block = unit.put(rows(2, 8192), references=ids(0, 1, 0, 1, 0, 1))
    before = unit.stats()
    assert before["bytes_live"] < 2 * 8192 + 1024
    unit.tell(clear(block, [0, 2, 1]))
    assert unit.stats() == before
    with pytest.raises(StaleSampleError, match=f"1 rows of block {block}"):
        unit.read(block, [2, 4])
    unit.tell(clear(block, [4]))
    after = unit.stats()
    assert before["bytes_live"] - after["bytes_live"] == 8192
    assert after["bytes_free"] - before["bytes_free"] > 8192 - 128
    unit.put(np.full((1, 8192 - 1024), 255, np.uint8))
    np.testing.assert_array_equal(unit.read(block, [5, 3]), rows(2, 8192)[[1, 1]])
    pinned = unit.ask(Pin(blocks=ids(block), holder=process_id()))
    assert pinned.freed_slots.tolist() == [0, 1, 2, 4]
    unit.tell(clear(block, [3, 5]))
    assert unit.stats()["bytes_pinned"] >= 8192
    unit.tell(Unpin(pin=pinned.pin))
    assert unit.stats()["bytes_pinned"] == 0
    unit.tell(free(block))


def test_a_shared_value_is_fetched_once(unit: Unit) -> None:
    """Rows of one value, or of several blocks, travel as values and references; only new values count for the limit."""
    block, own = unit.put(rows(3, 8192), references=ids(2, 0, 1, 2, 0, 2)), unit.put(rows(2, 8192, first=9))
    blocks, slots = ids(block, block, own, block, block), ids(0, 3, 1, 5, 1)
    found = unit.ask(Fetch(blocks=blocks, slots=slots, fields=("x",), max_bytes=1 << 20))
    assert sum(len(frame) for frame in found.frames) < 3 * 8192 + 1024
    [values] = unpacked(found, 5)
    assert values[:, 0].tolist() == [3, 3, 10, 3, 1] and (values == values[:, :1]).all()
    for limit, count in ((1, 2), (2 * 8192, 4), (3 * 8192, 5)):
        assert unit.ask(Fetch(blocks=blocks, slots=slots, fields=("x",), max_bytes=limit)).rows == count


def test_a_pin_keeps_bytes_until_it_ends(unit: Unit) -> None:
    """Rows and blocks cleared under a pin keep their bytes; they are free with the last unpin."""
    block, partly = unit.put(rows(4, 8192)), unit.put(rows(4, 8192))
    first, second = (unit.ask(Pin(blocks=ids(block, partly), holder=process_id())) for _ in range(2))
    bytes_free = unit.stats()["bytes_free"]
    unit.tell(free(block))
    unit.tell(clear(partly, [1, 2]))
    unit.tell(Unpin(pin=first.pin))
    stats = unit.stats()
    assert stats["bytes_free"] == bytes_free and stats["bytes_pinned"] >= 6 * 8192
    np.testing.assert_array_equal(
        np.memmap(second.arenas[0], np.uint8, "r", int(second.offsets[0] + second.sizes[0]) - 8192, (8192,)),
        rows(1, 8192, first=4)[0],
    )
    with pytest.raises(StaleSampleError):
        unit.ask(Pin(blocks=ids(block), holder=process_id()))
    unit.tell(Unpin(pin=second.pin))
    stats = unit.stats()
    assert stats["bytes_free"] >= bytes_free + 6 * 8192 and stats["bytes_pinned"] == 0


def test_cleared_slots_are_told_to_who_pins_and_refused_to_who_fetches(unit: Unit) -> None:
    """A row whose bytes may be reused is never read: pins name it, fetches of it raise."""
    one, two = unit.put(rows(4, 8192)), unit.put(rows(4, 8192))
    unit.tell(clear(two, [2, 0]))
    pinned = unit.ask(Pin(blocks=ids(one, two), holder=process_id()))
    assert pinned.freed_blocks.tolist() == [two, two] and pinned.freed_slots.tolist() == [0, 2]
    np.testing.assert_array_equal(unit.read(two, [3, 1]), rows(4, 8192)[[3, 1]])
    with pytest.raises(StaleSampleError, match=f"1 rows of block {two}"):
        unit.read(two, [3, 2])


def test_a_fetch_returns_leading_rows_within_its_limit(unit: Unit) -> None:
    """Rows of several blocks are packed in the order asked for; at least one comes, whatever the limit."""
    one, two = unit.put(rows(4, 1000)), unit.put(rows(4, 1000, first=11))
    blocks, slots = ids(two, one, two, one), ids(3, 0, 3, 2)
    for limit, count in ((1, 1), (2999, 2), (3000, 3), (1 << 20, 4)):
        found = unit.ask(Fetch(blocks=blocks, slots=slots, fields=("x",), max_bytes=limit))
        assert found.rows == count
        values = unpacked(found, 4)
        assert values[0][0, 0] == 14
    assert [array[:, 0].tolist() for array in values] == [[14, 1, 14, 3]]
    with pytest.raises(UnknownName, match="no field 'y'"):
        unit.ask(Fetch(blocks=blocks, slots=slots, fields=("y",), max_bytes=10))
    with pytest.raises(InvalidArgument):
        unit.ask(Fetch(blocks=blocks, slots=slots[:1], fields=("x",), max_bytes=10))


def test_rows_that_cannot_share_a_column_are_fetched_per_block(unit: Unit) -> None:
    """Rows of two ranks come in an image per block, in order of appearance."""
    flat, deep = unit.put(rows(4, 6)), unit.put(rows(4, 6, first=11).reshape(4, 2, 3))
    found = unit.ask(Fetch(blocks=ids(deep, flat, deep), slots=ids(3, 0, 1), fields=("x",), max_bytes=1000))
    values = unpacked(found, 3)
    assert [array.shape for array in values] == [(2, 2, 3), (1, 6)]
    assert [array.ravel()[0] for array in values] == [14, 1] and values[0][1, 0, 0] == 12


def test_large_rows_are_fetched_in_frames_of_bounded_size(folder: Path) -> None:
    """No frame exceeds 8 MiB, also for a single row."""
    unit = Unit(folder, capacity_bytes=64 * MIB)
    with unit.service:
        block = unit.put(np.full((1, 20 * MIB), 9, np.uint8))
        found = unit.ask(Fetch(blocks=ids(block), slots=ids(0), fields=("x",), max_bytes=1))
        assert found.frames_of.tolist() == [3] and max(len(frame) for frame in found.frames) <= 8 * MIB
        assert (unpacked(found, 1)[0] == 9).all()


def test_aborted_blocks_are_freed(unit: Unit) -> None:
    """The space of a put that raised comes back."""
    block = unit.put(rows(1, 100))
    unit.tell(AbortBlocks(blocks=ids(block)))
    stats = unit.stats()
    assert stats["bytes_free"] == stats["bytes_arenas"] and stats["blocks"] == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ppssfccnu"), st.integers(0, 1 << 30)), max_size=40))
def test_live_rows_are_never_overwritten_and_all_space_comes_back(steps: list[tuple[str, int]]) -> None:
    """Random puts, of rows and of shared values, clears, frees and pins: what is not cleared keeps its bytes, and in
    the end everything is free."""
    with ServerFolder("random") as folder:
        unit = Unit(folder.path, capacity_bytes=2 * MIB, arena_bytes=MIB)
        stored: dict[int, tuple[np.ndarray[Any, Any], set[int]]] = {}
        pins: list[int] = []
        with unit.service:
            for kind, seed in steps:
                block = list(stored)[seed % len(stored)] if stored else None
                if kind == "p" and len(stored) < 8:
                    values = rows(1 + seed % 20, 1 + seed % 6000, first=seed % 200)
                    stored[unit.put(values)] = (values, set(range(len(values))))
                elif kind == "s" and len(stored) < 8:
                    values = rows(1 + seed % 5, 1 + seed % 6000, first=seed % 200)
                    shared = np.random.default_rng(seed).permutation(np.arange(len(values) + seed % 11) % len(values))
                    stored[unit.put(values, references=shared)] = (values[shared], set(range(len(shared))))
                elif kind == "n" and block is not None:
                    pins.append(unit.ask(Pin(blocks=ids(block), holder=process_id())).pin)
                elif kind == "u" and pins:
                    unit.tell(Unpin(pin=pins.pop(seed % len(pins))))
                elif kind == "c" and block is not None:
                    slots = [slot for slot in range(len(stored[block][0])) if seed >> slot & 1]
                    unit.tell(clear(block, slots))
                    stored[block][1].difference_update(slots)
                elif kind == "f" and block is not None:
                    unit.tell(free(block))
                    del stored[block]
                unit.stats()
                for known, (values, left) in stored.items():
                    if left:
                        np.testing.assert_array_equal(unit.read(known, sorted(left)), values[sorted(left)])
            for pin in pins:
                unit.tell(Unpin(pin=pin))
            unit.tell(free(*stored))
            stats = unit.stats()
            assert stats["bytes_free"] == stats["bytes_arenas"] and stats["blocks"] == 0
