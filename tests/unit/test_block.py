"""Block images: what is written is read back, in any order, over any number of blocks; damage is noticed."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.whole_block import write_block
from transfer_queue.errors import DecodeError, UnknownName
from transfer_queue.messages import ColumnSpec
from transfer_queue.storage.block import (
    HEADER_BYTES,
    Block,
    Directories,
    EncodedColumn,
    carve,
    fill_block,
    image_parts,
    plan_block,
    read_head,
)
from transfer_queue.storage.gather import Pick, RowSet, distinct, pick

Rows = list[np.ndarray[Any, Any]]


def column(name: str, layout: str, rows: Rows) -> EncodedColumn:
    """Encode float32 rows, in one layout, as the client would."""
    flat = np.concatenate([row.ravel() for row in rows]) if rows else np.empty(0, np.float32)
    values = [flat.astype(np.float32).view(np.uint8)]
    if layout == "dense":
        return EncodedColumn(ColumnSpec(name=name, layout=layout, dtype="float32", shape=rows[0].shape), values)
    if layout == "ragged":
        offsets = np.cumsum([0, *(len(row) for row in rows)])
        spec = ColumnSpec(name=name, layout=layout, dtype="float32", shape=rows[0].shape[1:])
        return EncodedColumn(spec, values, offsets)
    offsets = np.cumsum([0, *(row.size for row in rows)])
    spec = ColumnSpec(name=name, layout=layout, dtype="float32", shape=None)
    return EncodedColumn(spec, values, offsets, np.array([row.shape for row in rows], np.int64))


def shared(columns: list[EncodedColumn], references: list[int]) -> list[EncodedColumn]:
    """The same values, shared by rows."""
    return [dataclasses.replace(column, references=np.array(references, np.int64)) for column in columns]


def place(memory: np.ndarray[Any, Any], start: int, columns: list[EncodedColumn], rows: int) -> tuple[Block, int]:
    """Write a block at `start`; return it opened, and where the next one may start."""
    plan = plan_block(columns, rows)
    write_block(plan, memory[start : start + plan.size_bytes], block_id=start + 1)
    return Directories().open_block(memory, start, start + 1), start + plan.size_bytes


def values_of(found: Pick) -> np.ndarray[Any, Any]:
    out = np.empty(found.size_bytes, np.uint8)
    found.copy_into(out)
    return out


def rows_of(found: Pick) -> Rows:
    """Cut a gathered float32 column back into rows."""
    flat = values_of(found).view(np.float32)
    if found.spec.layout == "dense":
        return list(flat.reshape(found.rows, *(found.spec.shape or ())))
    assert found.offsets is not None
    width = int(np.prod(found.spec.shape or (), dtype=int))
    cut = [flat[a * width : b * width] for a, b in zip(found.offsets[:-1], found.offsets[1:], strict=True)]
    if found.shapes is not None:
        return [row.reshape(shape) for row, shape in zip(cut, found.shapes, strict=True)]
    return [row.reshape(-1, *(found.spec.shape or ())) for row in cut]


@st.composite
def puts(draw: st.DrawFn) -> list[tuple[str, Rows]]:
    """Some puts of one field: rows of two dimensions, in any of the tensor layouts."""
    made = []
    counter = 0
    for _ in range(draw(st.integers(1, 4))):
        layout = draw(st.sampled_from(["dense", "ragged", "shaped"]))
        shape = draw(st.tuples(st.integers(0, 300), st.sampled_from([1, 1, 2])))
        rows = []
        for _ in range(draw(st.integers(1, 6))):
            if layout != "dense":
                shape = (draw(st.integers(0, 300)), shape[1] if layout == "ragged" else draw(st.integers(0, 3)))
            rows.append(np.arange(counter, counter + shape[0] * shape[1], dtype=np.float32).reshape(shape))
            counter += shape[0] * shape[1]
        made.append((layout, rows))
    return made


@settings(max_examples=150, deadline=None)
@given(puts(), st.data())
def test_any_rows_of_any_puts_come_back_in_the_order_asked_for(
    made: list[tuple[str, Rows]], data: st.DataObject
) -> None:
    """Rows drawn with repetition from dense, ragged and shaped puts, in one memory or several, keep shape and bytes."""
    memories = [np.zeros(1 << 18, np.uint8) for _ in range(data.draw(st.integers(1, 2)))]
    ends = [0] * len(memories)
    blocks, everything = [], []
    for number, (layout, rows) in enumerate(made):
        memory = number % len(memories)
        block, ends[memory] = place(memories[memory], ends[memory], [column("x", layout, rows)], len(rows))
        blocks.append(block)
        everything += [(number, slot) for slot in range(len(rows))]
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=12))
    which, slots = np.array(chosen, np.int64).T
    [found] = pick("x", RowSet(blocks, which, slots))
    wanted = [made[number][1][slot] for number, slot in chosen]
    assert found.rows == len(wanted) and found.positions is None
    for row, want in zip(rows_of(found), wanted, strict=True):
        np.testing.assert_array_equal(row, want)
        assert row.shape == want.shape
    put_in = {made[number][0] for number, _ in chosen}
    if found.spec.layout == "dense":
        assert put_in == {"dense"} and len({row.shape for row in wanted}) == 1
    stored = found.stored()
    if stored is not None:
        memory, start = stored
        np.testing.assert_array_equal(memory[start : start + found.size_bytes], values_of(found))


@settings(max_examples=100, deadline=None)
@given(puts(), st.data())
def test_rows_that_share_values_are_as_rows_that_have_their_own(
    made: list[tuple[str, Rows]], data: st.DataObject
) -> None:
    """Whatever rows of whatever blocks refer to whatever values, each gets its own, and `distinct` finds who shares."""
    memory = np.zeros(1 << 18, np.uint8)
    blocks, everything, end = [], [], 0
    for number, (layout, rows) in enumerate(made):
        references = data.draw(
            st.permutations([*range(len(rows)), *data.draw(st.lists(st.sampled_from(range(len(rows)))))])
        )
        columns = [column("x", layout, rows)]
        if data.draw(st.booleans()):
            columns = shared(columns, references)
        else:
            references = list(range(len(rows)))
        block, end = place(memory, end, columns, len(references))
        blocks.append(block)
        everything += [(number, slot, value) for slot, value in enumerate(references)]
    chosen = data.draw(st.lists(st.sampled_from(everything), min_size=1, max_size=12))
    which, slots, values = np.array(chosen, np.int64).T
    [found] = pick("x", RowSet(blocks, which, slots))
    for row, (number, _, value) in zip(rows_of(found), chosen, strict=True):
        np.testing.assert_array_equal(row, made[number][1][value])
    alike = distinct("x", RowSet(blocks, which, slots))
    positions, numbers = (np.arange(len(chosen)),) * 2 if alike is None else alike
    np.testing.assert_array_equal(which[positions[numbers]], which)
    np.testing.assert_array_equal(values[positions[numbers]], values)
    if any(block.columns["x"].shared for block in blocks):
        assert len(positions) == len(set(zip(which.tolist(), values.tolist(), strict=True)))


@pytest.mark.parametrize("width", [1, 8, 24, 700])
def test_many_small_rows_of_many_blocks_are_gathered(width: int) -> None:
    """Rows of one put each, in random order, with equal and with different lengths."""
    memory = np.zeros(8 << 20, np.uint8)
    generator = np.random.default_rng(7)
    blocks, wanted, end = [], [], 0
    for number in range(600):
        fixed = generator.random((1, width), np.float32)
        varying = generator.random((int(generator.integers(0, width + 1)),), np.float32)
        text = f"row {number} é".encode()
        encoded = EncodedColumn(
            ColumnSpec(name="t", layout="text", dtype=None, shape=None),
            [np.frombuffer(text, np.uint8)],
            np.array([0, len(text)]),
        )
        block, end = place(
            memory, end, [column("f", "dense", [fixed[0]]), column("v", "ragged", [varying]), encoded], 1
        )
        blocks.append(block)
        wanted.append((fixed[0], varying, text))
    order = generator.permutation(600)
    rows = RowSet(blocks, order, np.zeros(600, np.int64))
    for position, field in enumerate("fvt"):
        [found] = pick(field, rows)
        expected = b"".join(wanted[i][position].tobytes() if field != "t" else wanted[i][2] for i in order)  # type: ignore[union-attr]
        assert values_of(found).tobytes() == expected


def test_rows_that_cannot_share_a_column_come_with_their_positions() -> None:
    """Tensor rows of other ranks and object rows are several picks, each with its places in the request."""
    memory = np.zeros(1 << 16, np.uint8)
    flat, end = place(memory, 0, [column("x", "dense", [np.ones((3,), np.float32)])], 1)
    square, end = place(memory, end, [column("x", "dense", [np.ones((2, 2), np.float32)])], 1)
    spec = ColumnSpec(name="x", layout="int", dtype=None, shape=None)
    number, end = place(memory, end, [EncodedColumn(spec, [np.array([5]).view(np.uint8)])], 1)
    found = pick("x", RowSet([flat, square, number], np.array([1, 0, 2, 1]), np.zeros(4, np.int64)))
    forms = {(part.spec.layout, part.spec.shape): list(part.positions) for part in found if part.positions is not None}
    assert forms == {("dense", (2, 2)): [0, 3], ("dense", (3,)): [1], ("int", None): [2]}


def test_a_block_is_readable_only_once_it_is_sealed() -> None:
    """The header tells id and length while the block is written; its columns are offered when it is complete."""
    plan = plan_block([column("x", "dense", [np.ones((3,), np.float32)])], 1)
    memory = np.zeros(plan.size_bytes, np.uint8)
    assert read_head(memory) is None
    carve(plan, memory, 77)
    head = read_head(memory)
    assert head is not None and (head.block_id, head.size_bytes, head.sealed) == (77, plan.size_bytes, False)
    with pytest.raises(DecodeError, match="block 77, sealed: False"):
        Directories().open_block(memory)
    fill_block(plan, memory)
    assert Directories().open_block(memory, 0, 77).head.sealed
    with pytest.raises(DecodeError, match="sealed block 78"):
        Directories().open_block(memory, 0, 78)
    assert b"".join(part.tobytes() for part in image_parts(plan, 77)) == memory.tobytes()


def test_unknown_fields_and_slots_are_named() -> None:
    """A field that the block does not have is answered with those it has; a slot beyond its rows is refused."""
    memory = np.zeros(1 << 12, np.uint8)
    block, _ = place(memory, 0, [column("prompts", "dense", [np.ones((3,), np.float32)])], 1)
    one = np.zeros(1, np.int64)
    with pytest.raises(UnknownName, match="did you mean 'prompts'"):
        pick("prompt", RowSet([block], one, one))
    with pytest.raises(DecodeError, match="outside its block"):
        pick("prompts", RowSet([block], one, one + 1))


def test_columns_start_on_cache_lines() -> None:
    """Header, values, offsets and block end are multiples of 64 bytes."""
    plan = plan_block([column("a", "ragged", [np.ones(3, np.float32)]), column("b", "dense", [np.ones(5)])], 1)
    assert plan.size_bytes % 64 == 0 and HEADER_BYTES == 64
    assert all(offset % 64 == 0 for offset, _ in plan.pieces)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=6), st.booleans())
def test_damaged_bytes_give_a_typed_error_or_stay_inside_the_block(changes: list[tuple[int, int]], head: bool) -> None:
    """Whatever bytes change, reading raises one of our errors or returns some rows; it never leaves the block."""
    rows = [np.ones((4, 2), np.float32), np.ones((1, 2), np.float32)]
    columns = [column("x", "ragged", rows), column("s", "shaped", rows), column("d", "dense", rows[:1] * 2)]
    plan = plan_block([*columns, *shared([column("r", "ragged", rows), column("e", "dense", rows[:1] * 2)], [0, 1])], 2)
    memory = np.zeros(plan.size_bytes, np.uint8)
    write_block(plan, memory, 5)
    for at, byte in changes:
        memory[at % (HEADER_BYTES + len(plan.directory) if head else plan.size_bytes)] = byte
    slots = np.array([1, 0], np.int64)
    for field in "xsdre":
        try:
            block = Directories().open_block(memory, 0, 5)
            for found in pick(field, RowSet([block], slots * 0, slots)):
                if found.size_bytes <= plan.size_bytes:
                    values_of(found)
        except (DecodeError, UnknownName):
            continue
