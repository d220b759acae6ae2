"""Rows of one field, wherever they lie, as one column in the order of the request.

`pick` decides: where every row starts, how long it is, and what form the result has. `Pick.copy_into` acts: it moves
the bytes. Between the two the caller provides memory.

Rows that were put in different forms become one column if they can: tensors of one rank become "ragged" if they
differ in their first dimension only, else "shaped". What cannot share a column (tensors and objects, other ranks,
other types) becomes several picks, each with the positions of its rows.

Where rows of a block share values, a row stands for the value that it refers to, and is copied for each of them.

B rows of a request · n rows of a block
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from transfer_queue.errors import DecodeError, UnknownName, nearest
from transfer_queue.messages import ColumnSpec
from transfer_queue.storage.block import TENSOR_LAYOUTS, Block, StoredColumn, has_offsets, item_bytes
from transfer_queue.storage.ranges import Bytes, Int64s, copy_ranges, copy_rows, take_int64s


@dataclass(frozen=True)
class RowSet:
    """B rows, in order: row i is slot `slots[i]` of `blocks[which[i]]`. What all fields need is found out once."""

    blocks: Sequence[Block]
    which: Int64s
    slots: Int64s

    def at(self, positions: Int64s) -> RowSet:
        """Return some of these rows."""
        return RowSet(self.blocks, self.which[positions], self.slots[positions])

    @functools.cached_property
    def inside(self) -> bool:
        """Whether every block has the slots that are asked of it."""
        sizes = np.fromiter((block.head.rows for block in self.blocks), np.int64, len(self.blocks))
        return not len(self.slots) or bool(self.slots.min() >= 0 and (self.slots < sizes[self.which]).all())

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all blocks have the same columns at the same places."""
        return all(block.columns is self.blocks[0].columns for block in self.blocks)

    @functools.cached_property
    def memories(self) -> list[Bytes]:
        """The distinct memories of the blocks."""
        return list({id(block.memory): block.memory for block in self.blocks}.values())

    @functools.cached_property
    def memory_of(self) -> Int64s | None:
        """[B] of each row, the number of its memory; None if there is only one."""
        if len(self.memories) == 1:
            return None
        numbers = {id(memory): number for number, memory in enumerate(self.memories)}
        return np.fromiter((numbers[id(block.memory)] for block in self.blocks), np.int64, len(self.blocks))[self.which]

    @functools.cached_property
    def origins(self) -> Int64s:
        """[B] of each row, where its block starts."""
        return np.fromiter((block.start for block in self.blocks), np.int64, len(self.blocks))[self.which]

    @functools.cached_property
    def consecutive(self) -> bool:
        """Whether each row is the slot behind that of the row before."""
        return bool((self.slots[1:] == self.slots[:-1] + 1).all())

    def each(self, columns: Sequence[StoredColumn], attribute: str) -> Int64s | int:
        """Return a number that every column has: [B] that of the column of each row, or that of all."""
        if self.alike:
            found: int = getattr(columns[0], attribute)
            return found
        return np.fromiter((getattr(column, attribute) for column in columns), np.int64, len(columns))[self.which]


@dataclass(frozen=True, slots=True)
class Whole:
    """A stored column of rows of one length, and which of them are wanted."""

    start: int  # in the first memory
    size_bytes: int
    slots: Int64s
    consecutive: bool


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
    starts: Int64s | None  # [rows] of each row in its memory; None: as `whole` says
    whole: Whole | None  # set if the rows have one length and come from one block

    def copy_into(self, out: Bytes) -> None:
        """Write the values to `out`, which has exactly `size_bytes`."""
        self.copy_rows_into(out, 0, self.rows)

    def copy_rows_into(self, out: Bytes, first: int, last: int) -> None:
        """Write the values of the rows [first, last) to their places in `out`, which has exactly `size_bytes`."""
        rows = slice(first, last)
        if isinstance(self.row_sizes, int):
            sizes: Int64s | int = self.row_sizes
            begin, end = first * self.row_sizes, last * self.row_sizes
        else:
            sizes = self.row_sizes[rows]
            begin = int(self.row_sizes[:first].sum())
            end = begin + int(sizes.sum())
        if self.whole is not None:
            assert isinstance(sizes, int)
            column = self.memories[0][self.whole.start :][: self.whole.size_bytes]
            copy_rows(column, sizes, self.whole.slots[rows], out[begin:end])
        else:
            memory_of = None if self.memory_of is None else self.memory_of[rows]
            copy_ranges(self.memories, memory_of, self.row_starts()[rows], sizes, out[begin:end])

    def row_starts(self) -> Int64s:
        """[rows] where each row starts in its memory."""
        if self.starts is not None:
            return self.starts
        assert self.whole is not None and isinstance(self.row_sizes, int)
        return self.whole.start + self.whole.slots * self.row_sizes

    def stored(self) -> tuple[Bytes, int] | None:
        """Return the memory and the offset in it where all values lie in one piece in the order of the request."""
        if self.size_bytes == 0:
            return None
        if self.whole is not None:
            assert isinstance(self.row_sizes, int)
            first = self.whole.start + int(self.whole.slots[0]) * self.row_sizes
            return (self.memories[0], first) if self.whole.consecutive else None
        starts = self.row_starts()
        if self.memory_of is not None and (self.memory_of != self.memory_of[0]).any():
            return None
        sizes = self.row_sizes if isinstance(self.row_sizes, int) else self.row_sizes[:-1]
        if (starts[:-1] + sizes != starts[1:]).any():
            return None
        return self.memories[0 if self.memory_of is None else int(self.memory_of[0])], int(starts[0])


def pick(field: str, rows: RowSet) -> list[Pick]:
    """Find the rows of a field; nothing is copied. One pick, unless the rows cannot share a column."""
    columns = [_column(block, field) for block in rows.blocks]
    if not rows.inside:
        raise DecodeError(f"a slot of field {field!r} lies outside its block: the handle does not fit the stored data")
    if rows.alike:
        return [_find(columns, rows, None)]
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


def distinct(field: str, rows: RowSet) -> tuple[Int64s, Int64s] | None:
    """Return (positions [k], references [B]): the first row of each value, and for each row the number of its value.

    None if no two rows share one: then each row is the first of its value.
    """
    columns = [_column(block, field) for block in rows.blocks]
    if all(column.shared is None for column in columns):
        return None
    values = _referred(columns, rows)
    together = rows.which * (int(values.max(initial=0)) + 1) + values
    _, positions, references = np.unique(together, return_index=True, return_inverse=True)
    return None if len(positions) == len(rows.slots) else (positions, references)


def _referred(columns: Sequence[StoredColumn], rows: RowSet) -> Int64s:
    """Return which value of its column each row has."""
    if all(column.shared is None for column in columns):
        return rows.slots
    limits = np.fromiter((column.shared or 0 for column in columns), np.int64, len(columns))[rows.which]
    at = rows.origins + rows.each(columns, "references_at") + 8 * rows.slots
    sharing = np.flatnonzero(limits)
    memory_of = None if rows.memory_of is None else rows.memory_of[sharing]
    found = take_int64s(rows.memories, memory_of, at[sharing])
    if (found < 0).any() or (found >= limits[sharing]).any():
        raise DecodeError("the references of a stored column are damaged")
    values = rows.slots.copy()
    values[sharing] = found
    return values


def _find(columns: list[StoredColumn], rows: RowSet, positions: Int64s | None) -> Pick:
    """Find the rows at `positions` (None: all), which have one form."""
    if positions is not None:
        rows = rows.at(positions)
    memories, memory_of = rows.memories, rows.memory_of
    slots = _referred(columns, rows)
    column = columns[int(rows.which[0]) if len(rows.which) else 0]
    spec, step = column.spec, column.row_bytes
    if not has_offsets(spec.layout):
        size, starts, whole = step * len(slots), None, None
        if len(rows.blocks) == 1 and step:
            start = rows.blocks[0].start + column.values_at
            consecutive = rows.consecutive if slots is rows.slots else bool((slots[1:] == slots[:-1] + 1).all())
            whole = Whole(start, column.values_bytes, slots, consecutive)
        else:
            starts = rows.origins + rows.each(columns, "values_at") + slots * step
        return Pick(spec, positions, len(slots), size, step, None, None, memories, memory_of, starts, whole)
    indexes = rows.origins + rows.each(columns, "offsets_at") + 8 * slots
    begins = take_int64s(memories, memory_of, indexes)
    steps = take_int64s(memories, memory_of, indexes + 8) - begins
    _check_offsets(rows.each(columns, "values_bytes"), begins, steps, step)
    starts, sizes = rows.origins + rows.each(columns, "values_at") + begins * step, steps * step
    offsets, shapes = _offsets_of(steps), None
    if spec.layout == "shaped":
        at = rows.origins + rows.each(columns, "shapes_at") + 8 * column.rank * slots
        shapes = _shapes(column.rank, at, memories, memory_of)
        if (shapes.prod(axis=1, initial=1) != steps).any():
            raise DecodeError(f"the shapes of field {spec.name!r} do not fit its values")
    size = int(sizes.sum())
    return Pick(spec, positions, len(slots), size, sizes, offsets, shapes, memories, memory_of, starts, None)


def _check_offsets(limits: Int64s | int, begins: Int64s, steps: Int64s, step: int) -> None:
    """Rows lie inside of their columns, which have `limits` bytes."""
    in_steps = limits // step if step else 1 << 56
    if (begins < 0).any() or (steps < 0).any() or (steps > in_steps).any() or (begins > in_steps - steps).any():
        raise DecodeError("the offsets of a stored column are damaged")


def _shapes(rank: int, at: Int64s, memories: Sequence[Bytes], memory_of: Int64s | None) -> Int64s:
    """Read the shape of each row, [rows, rank]."""
    shapes = np.empty((len(at), rank), np.int64)
    for dimension in range(rank):
        shapes[:, dimension] = take_int64s(memories, memory_of, at + 8 * dimension)
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
        kind = (part.spec.dtype, _rank(part)) if layout in TENSOR_LAYOUTS else (layout, part.spec.shape)
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
        starts=np.concatenate([part.row_starts() for part in parts])[order],
        whole=None,
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


@dataclass(frozen=True, slots=True)
class PickCopy:
    """The values of a pick on their way to `out`. Its parts are rows."""

    pick: Pick
    out: Bytes

    @property
    def size_bytes(self) -> int:
        return self.pick.size_bytes

    @property
    def parts(self) -> int:
        return self.pick.rows

    def run(self, begin: int, end: int) -> None:
        self.pick.copy_rows_into(self.out, begin, end)


def gathered(part: Pick, values: Bytes) -> GatheredColumn:
    """Pair a pick with the values that were copied for it, or that are views of what is stored."""
    assert values.nbytes == part.size_bytes
    return GatheredColumn(part.spec, part.positions, part.rows, values, part.offsets, part.shapes)
