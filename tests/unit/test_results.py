"""Columns of a result: every one right, in few pieces of memory, copied in long runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.whole_block import write_block
from transfer_queue.client import results
from transfer_queue.client.buffers import POOLED_BYTES, BufferPool
from transfer_queue.messages import ColumnSpec
from transfer_queue.storage.block import Block, Directories, EncodedColumn, plan_block
from transfer_queue.storage.gather import Pick, RowSet, pick
from transfer_queue.storage.shares import Copy, Work, run_all


def stored(rows: int, widths: list[int]) -> Block:
    """A block of dense columns f0, f1, … with so many int32 per row, all values different, and ragged ones r0, …."""
    total = 0
    columns = []
    for number, width in enumerate(widths):
        values = np.arange(total, total + rows * width, dtype=np.int32)
        total += rows * width
        spec = ColumnSpec(name=f"f{number}", layout="dense", dtype="int32", shape=(width,))
        columns.append(EncodedColumn(spec, [values.view(np.uint8)]))
        spec = ColumnSpec(name=f"r{number}", layout="ragged", dtype="int32", shape=())
        columns.append(EncodedColumn(spec, [(~values).view(np.uint8)], width * np.arange(rows + 1)))
    plan = plan_block(columns, rows)
    memory = np.zeros(plan.size_bytes + 64, np.uint8)
    write_block(plan, memory[64:], 1)
    return Directories().open_block(memory, 64, 1)


def picked(block: Block, fields: list[str], slots: list[int]) -> list[Pick]:
    rows = RowSet([block], np.zeros(len(slots), np.int64), np.array(slots, np.int64))
    return [part for field in fields for part in pick(field, rows)]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.lists(st.sampled_from(["f0", "r0", "f1", "r1", "f2", "r2"]), max_size=6, unique=True),
    st.one_of(st.tuples(st.integers(0, 3), st.integers(4, 7)), st.lists(st.integers(0, 6), min_size=1, max_size=9)),
    st.sampled_from([1, 200, 1 << 29]),
)
def test_every_column_gets_its_own_bytes(
    widths: list[int], fields: list[str], chosen: tuple[int, int] | list[int], limit: int
) -> None:
    """Whatever fields, in whatever order, of rows in one piece or not: what comes out is what `copy_into` gives."""
    slots = list(range(*chosen)) if isinstance(chosen, tuple) else chosen
    block = stored(7, widths)
    parts = picked(block, [field for field in fields if field in block.columns], slots)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, "BUFFER_BYTES", limit)
        found = results.copied(BufferPool(), parts)
    for part, values in zip(parts, found, strict=True):
        wanted = np.empty(part.size_bytes, np.uint8)
        part.copy_into(wanted)
        np.testing.assert_array_equal(values, wanted)
        assert values.ctypes.data % 4 == 0
    for values in found:
        before = [other.copy() for other in found]
        values[:] = 77
        assert all((other == old).all() for other, old in zip(found, before, strict=True) if other is not values)


def test_neighbours_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All fields of a put in one copy, in whatever order they are asked for; far apart, or at random, one by one."""
    works: list[Work] = []

    def noting(given: list[Work]) -> None:
        works[:] = given
        run_all(given)

    monkeypatch.setattr(results, "run_all", noting)
    block = stored(1000, [50, 60, 70])
    results.copied(BufferPool(), picked(block, ["f2", "f0", "r1", "f1", "r0"], list(range(1000))))
    assert len(works) == 1 and isinstance(works[0], Copy)
    results.copied(BufferPool(), picked(block, ["f0", "f2"], list(range(1000))))
    assert [type(work) for work in works] == [Copy, Copy]
    results.copied(BufferPool(), picked(block, ["f0", "f1"], [3, 1, 2]))
    assert len(works) == 2 and not any(isinstance(work, Copy) for work in works)


def test_the_memory_of_a_result_returns_when_all_its_columns_are_gone() -> None:
    """One buffer serves all columns of a get, and the next get."""
    pool = BufferPool()
    block = stored(1000, [200, 200, 200])
    parts = picked(block, ["f0", "f1", "f2"], list(range(1000)))
    assert sum(part.size_bytes for part in parts) > POOLED_BYTES
    first, *others = results.copied(pool, parts)
    address = min(values.ctypes.data for values in (first, *others))
    del others
    assert pool.idle_bytes == 0
    del first
    assert pool.idle_bytes > POOLED_BYTES
    assert min(values.ctypes.data for values in results.copied(pool, parts)) == address
