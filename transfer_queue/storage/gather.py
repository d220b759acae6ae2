"""Rows of one field, wherever they lie, as one column in the order of the request.

`pick` decides: where every row starts, how long it is, and what form the result has. `Pick.copy_into` acts: it moves
the bytes. Between the two the caller provides memory.

Rows that were put in different forms become one column if they can: tensors of one rank become "ragged" if they
differ in their first dimension only, else "shaped". What cannot share a column (tensors and objects, other ranks,
other types) becomes several picks, each with the positions of its rows.

B rows of a request · n rows of a block
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfer_queue.errors import DecodeError, UnknownName, nearest
from transfer_queue.messages import ColumnSpec
from transfer_queue.storage.block import TENSOR_LAYOUTS, Block, StoredColumn, has_offsets, item_bytes
from transfer_queue.storage.ranges import Bytes, Int64s, copy_ranges, copy_rows, take_int64s


@dataclass(frozen=True, slots=True)
class RowSet:
    """B rows, in order: row i is slot `slots[i]` of `blocks[which[i]]`."""

    blocks: Sequence[Block]
    which: Int64s
    slots: Int64s


@dataclass(frozen=True, slots=True)
class Pick:
    """A column to be. `spec`, `offsets` and `shapes` describe it as `EncodedColumn` does."""

    spec: ColumnSpec
    positions: Int64s | None  # of its rows in the request; None: all, in order
    rows: int
    size_bytes: int
    row_sizes: Int64s | int  # in bytes
    offsets: Int64s | None
    shapes: Int64s | None
    memories: Sequence[Bytes]
    memory_of: Int64s | None
    starts: Int64s  # [rows] of each row in its memory
    column: Bytes | None  # set if the rows have one length and come from one block …
    slots: Int64s | None  # … of which they are these

    def copy_into(self, out: Bytes) -> None:
        """Write the values to `out`, which has exactly `size_bytes`."""
        if self.column is not None and self.slots is not None:
            assert isinstance(self.row_sizes, int)
            copy_rows(self.column, self.row_sizes, self.slots, out)
        else:
            copy_ranges(self.memories, self.memory_of, self.starts, self.row_sizes, out)

    def contiguous(self) -> Bytes | None:
        """Return the stored bytes themselves if they lie in one piece of one memory in the order of the request."""
        if self.size_bytes == 0 or (self.memory_of is not None and (self.memory_of != self.memory_of[0]).any()):
            return None
        sizes = np.broadcast_to(np.asarray(self.row_sizes, np.int64), self.starts.shape)
        if (self.starts[:-1] + sizes[:-1] != self.starts[1:]).any():
            return None
        memory = self.memories[0 if self.memory_of is None else int(self.memory_of[0])]
        start = int(self.starts[0])
        return memory[start : start + self.size_bytes]


def pick(field: str, rows: RowSet) -> list[Pick]:
    """Find the rows of a field; nothing is copied. One pick, unless the rows cannot share a column."""
    columns = [_column(block, field) for block in rows.blocks]
    sizes = np.fromiter((block.head.rows for block in rows.blocks), np.int64, len(rows.blocks))
    if len(rows.slots) and (rows.slots.min() < 0 or (rows.slots >= sizes[rows.which]).any()):
        raise DecodeError(f"a slot of field {field!r} lies outside its block: the handle does not fit the stored data")
    forms: dict[tuple[object, ...], list[int]] = {}
    for number, column in enumerate(columns):
        spec = column.spec
        forms.setdefault((spec.layout, spec.dtype, spec.shape, column.rank), []).append(number)
    if len(forms) == 1:
        return [_find(columns, rows, None)]
    form_of = np.empty(len(columns), np.int64)
    for number, members in enumerate(forms.values()):
        form_of[members] = number
    row_forms = form_of[rows.which]
    found = [_find(columns, rows, np.flatnonzero(row_forms == number)) for number in range(len(forms))]
    return _merged([part for part in found if part.rows])


def _column(block: Block, field: str) -> StoredColumn:
    column = block.columns.get(field)
    if column is None:
        raise UnknownName(f"block {block.head.block_id} has no field {field!r}{nearest(field, block.columns)}")
    return column


def _find(columns: list[StoredColumn], rows: RowSet, positions: Int64s | None) -> Pick:
    """Find the rows at `positions`, all of one form."""
    which, slots = (rows.which, rows.slots) if positions is None else (rows.which[positions], rows.slots[positions])
    memories, memory_numbers = _memories(rows.blocks)
    memory_of = None if len(memories) == 1 else memory_numbers[which]
    bases = np.fromiter((b.start + c.values_at for b, c in zip(rows.blocks, columns, strict=True)), np.int64)[which]
    column = columns[int(which[0]) if len(which) else 0]
    spec, step, offsets, shapes, whole = column.spec, column.row_bytes, None, None, None
    sizes: Int64s | int = step
    if has_offsets(spec.layout):
        indexes = np.fromiter((b.start + c.offsets_at for b, c in zip(rows.blocks, columns, strict=True)), np.int64)
        begins = take_int64s(memories, memory_of, indexes[which] + 8 * slots)
        steps = take_int64s(memories, memory_of, indexes[which] + 8 * slots + 8) - begins
        _check_offsets(columns, which, begins, steps, step)
        starts, sizes, offsets = bases + begins * step, steps * step, _offsets_of(steps)
        if spec.layout == "shaped":
            shapes = _shapes(columns, rows, which, slots, memories, memory_of)
            if (shapes.prod(axis=1, initial=1) != steps).any():
                raise DecodeError(f"the shapes of field {spec.name!r} do not fit its values")
    else:
        starts = bases + slots * step
        if len(rows.blocks) == 1 and step:
            block = rows.blocks[0]
            whole = block.memory[block.start + column.values_at :][: column.values_bytes]
    size = step * len(slots) if isinstance(sizes, int) else int(sizes.sum())
    taken = slots if whole is not None else None
    found = (spec, positions, len(slots), size, sizes, offsets, shapes)
    return Pick(*found, memories, memory_of, starts, whole, taken)


def _memories(blocks: Sequence[Block]) -> tuple[list[Bytes], Int64s]:
    """Return the distinct memories, and for each block the number of its own."""
    numbers: dict[int, int] = {}
    memories: list[Bytes] = []
    of_block = np.empty(len(blocks), np.int64)
    for position, block in enumerate(blocks):
        number = numbers.setdefault(id(block.memory), len(memories))
        if number == len(memories):
            memories.append(block.memory)
        of_block[position] = number
    return memories, of_block


def _check_offsets(columns: list[StoredColumn], which: Int64s, begins: Int64s, steps: Int64s, step: int) -> None:
    limits = np.fromiter((column.values_bytes for column in columns), np.int64, len(columns))[which]
    in_steps = limits // step if step else np.full_like(limits, 1 << 56)
    if (begins < 0).any() or (steps < 0).any() or (steps > in_steps).any() or (begins > in_steps - steps).any():
        raise DecodeError("the offsets of a stored column are damaged")


def _shapes(
    columns: list[StoredColumn],
    rows: RowSet,
    which: Int64s,
    slots: Int64s,
    memories: Sequence[Bytes],
    memory_of: Int64s | None,
) -> Int64s:
    rank = columns[int(which[0]) if len(which) else 0].rank
    at = np.fromiter((b.start + c.shapes_at for b, c in zip(rows.blocks, columns, strict=True)), np.int64)[which]
    shapes = np.empty((len(slots), rank), np.int64)
    for dimension in range(rank):
        shapes[:, dimension] = take_int64s(memories, memory_of, at + 8 * (slots * rank + dimension))
    if (shapes < 0).any():
        raise DecodeError("the shapes of a stored column are damaged")
    return shapes


def _offsets_of(steps: Int64s) -> Int64s:
    offsets = np.zeros(len(steps) + 1, np.int64)
    np.cumsum(steps, out=offsets[1:])
    return offsets


# ---------------------------------------------------------------- rows of several forms


def _merged(parts: list[Pick]) -> list[Pick]:
    """Join the picks of tensors that can share a column."""
    if len(parts) == 1:
        return [dataclasses.replace(parts[0], positions=None)]
    kinds: dict[tuple[object, ...], list[Pick]] = {}
    for part in parts:
        layout = part.spec.layout
        kind = (part.spec.dtype, _rank(part)) if layout in TENSOR_LAYOUTS else (layout,)
        kinds.setdefault(kind, []).append(part)
    return [members[0] if len(members) == 1 else _join(members) for members in kinds.values()]


def _rank(part: Pick) -> int:
    if part.shapes is not None:
        return int(part.shapes.shape[1])
    return len(part.spec.shape or ()) + (part.spec.layout == "ragged")


def _join(parts: list[Pick]) -> Pick:
    """One ragged or shaped pick of the rows of several, which have one element type and one rank of at least 1."""
    positions = np.concatenate([_positions(part) for part in parts])
    order = np.argsort(positions, kind="stable")
    dims = np.concatenate([_row_shapes(part) for part in parts])[order]
    first = parts[0]
    item = item_bytes(first.spec.dtype)
    sizes = item * dims.prod(axis=1, initial=1)
    memories, memory_of = first.memories, None
    if first.memory_of is not None:
        memory_of = np.concatenate([part.memory_of for part in parts if part.memory_of is not None])[order]
    trailing = {tuple(shape) for part in parts for shape in _trailing(part)}
    ragged = len(trailing) == 1
    shape = trailing.pop() if ragged else None
    spec = ColumnSpec(
        name=first.spec.name, layout="ragged" if ragged else "shaped", dtype=first.spec.dtype, shape=shape
    )
    return Pick(
        spec=spec,
        positions=None if _is_range(positions[order]) else positions[order],
        rows=len(order),
        size_bytes=int(sizes.sum()),
        row_sizes=sizes,
        offsets=_offsets_of(dims[:, 0] if ragged else sizes // item),
        shapes=None if ragged else dims,
        memories=memories,
        memory_of=memory_of,
        starts=np.concatenate([part.starts for part in parts])[order],
        column=None,
        slots=None,
    )


def _is_range(positions: Int64s) -> bool:
    return bool((positions == np.arange(len(positions))).all())


def _positions(part: Pick) -> Int64s:
    return np.arange(part.rows) if part.positions is None else part.positions


def _trailing(part: Pick) -> list[tuple[int, ...]]:
    """Return the distinct shapes of rows without their first dimension."""
    if part.spec.layout == "ragged":
        return [part.spec.shape or ()]
    if part.spec.layout == "dense":
        return [(part.spec.shape or ())[1:]]
    assert part.shapes is not None
    return [tuple(shape) for shape in np.unique(part.shapes[:, 1:], axis=0).tolist()]


def _row_shapes(part: Pick) -> Int64s:
    """[rows, rank]"""
    if part.shapes is not None:
        return part.shapes
    shape = part.spec.shape or ()
    if part.spec.layout == "dense":
        return np.broadcast_to(np.array(shape, np.int64), (part.rows, len(shape)))
    assert part.offsets is not None
    trailing = np.broadcast_to(np.array(shape, np.int64), (part.rows, len(shape)))
    return np.concatenate([np.diff(part.offsets)[:, None], trailing], axis=1)


def row_bytes(picks: Sequence[Pick], rows: int) -> Int64s:
    """Return how many bytes each of the B rows has in all these picks."""
    total = np.zeros(rows, np.int64)
    for part in picks:
        if part.positions is None:
            total += part.row_sizes
        else:
            total[part.positions] += part.row_sizes
    return total


@dataclass(frozen=True, slots=True)
class GatheredColumn:
    """Rows of one field in memory of the reader's own, as `EncodedColumn` describes them."""

    spec: ColumnSpec
    positions: Int64s | None  # of its rows in the request; None: all, in order
    rows: int
    values: Bytes
    offsets: Int64s | None
    shapes: Int64s | None


def gathered(part: Pick, values: Bytes) -> GatheredColumn:
    """Pair a pick with the values that were copied for it, or that are views of what is stored."""
    assert values.nbytes == part.size_bytes
    return GatheredColumn(part.spec, part.positions, part.rows, values, part.offsets, part.shapes)
