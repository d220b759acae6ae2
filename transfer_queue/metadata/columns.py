"""Columns of a `BatchMeta`: arrays of integers and of few distinct values, cheap to cut and to pickle."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Int64s: TypeAlias = NDArray[np.int64]
Rows: TypeAlias = "slice | Int64s"  # how a column is cut: a slice gives a view, positions give a copy
Packed: TypeAlias = tuple[Any, ...]
V = TypeVar("V", bound=Hashable)
T = TypeVar("T")

_WIDEST = 2**63


def pick(values: Sequence[T], rows: Rows) -> list[T]:
    """Cut a sequence of Python values as an array would be cut."""
    if isinstance(rows, slice):
        return list(values[rows])
    return [values[row] for row in rows.tolist()]


def pack(array: Int64s) -> Packed:
    """Describe an int64 array in few bytes: constants and ranges by three numbers, others in narrow steps."""
    if array.size < 2:
        return ("list", array.tolist())
    first, step = int(array[0]), int(array[1]) - int(array[0])
    if abs(step) < _WIDEST and bool(np.all(np.diff(array) == step)):
        return ("progression", first, step, array.size)
    low, high = int(array.min()), int(array.max())
    if high - low >= _WIDEST:
        return ("narrow", 0, array)
    return ("narrow", low, (array - low).astype(np.min_scalar_type(high - low)))


def unpack(packed: Packed) -> Int64s:
    """Rebuild what `pack` described; the result is writable."""
    if packed[0] == "list":
        return np.array(packed[1], np.int64)
    if packed[0] == "progression":
        _, first, step, count = packed
        progression: Int64s = np.arange(count, dtype=np.int64) * step + first
        return progression
    _, low, steps = packed
    widened: Int64s = steps.astype(np.int64) + low
    return widened


class Coded(Generic[V]):
    """An immutable column of n values of which few are distinct: `values[codes[i]]` is the value of row i."""

    __slots__ = ("codes", "values")

    def __init__(self, values: Sequence[V], codes: Int64s) -> None:
        self.values = tuple(values)
        self.codes = codes  # [n]

    @classmethod
    def of(cls, rows: Iterable[V]) -> Coded[V]:
        known: dict[V, int] = {}
        codes = [known.setdefault(row, len(known)) for row in rows]
        return cls(tuple(known), np.array(codes, np.int64))

    @classmethod
    def constant(cls, value: V, count: int) -> Coded[V]:
        return cls((value,), np.zeros(count, np.int64))

    @classmethod
    def concat(cls, pieces: Sequence[Coded[V]]) -> Coded[V]:
        known: dict[V, int] = {}
        codes = []
        for piece in pieces:
            table = np.array([known.setdefault(value, len(known)) for value in piece.values], np.int64)
            codes.append(table[piece.codes])
        return cls(tuple(known), np.concatenate(codes))

    def take(self, rows: Rows) -> Coded[V]:
        codes = self.codes[rows]
        if len(self.values) <= max(4, len(codes)):
            return Coded(self.values, codes)
        used, narrowed = np.unique(codes, return_inverse=True)
        return Coded([self.values[code] for code in used.tolist()], narrowed.astype(np.int64))

    def rows(self) -> list[V]:
        """The value of each row."""
        return [self.values[code] for code in self.codes.tolist()]

    def first_rows(self) -> dict[V, int]:
        """The distinct values that rows have, with the first row of each, in the order of those rows."""
        if len(self.values) == 1:
            return {self.values[0]: 0} if len(self.codes) else {}
        used, first = np.unique(self.codes, return_index=True)
        order = np.argsort(first)
        return {self.values[used[i]]: int(first[i]) for i in order.tolist()}

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> V:
        return self.values[int(self.codes[row])]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Coded):
            return NotImplemented
        if self.values == other.values:
            return np.array_equal(self.codes, other.codes)
        return self.rows() == other.rows()

    __hash__ = None  # type: ignore[assignment]  # compared by content

    def __reduce__(self) -> tuple[Any, ...]:
        return _coded, (_pack_values(self.values), pack(self.codes))


def _coded(values: Packed, codes: Packed) -> Coded[Any]:
    return Coded(_unpack_values(values), unpack(codes))


def _pack_values(values: tuple[Any, ...]) -> Packed:
    """Many shapes of one rank pickle as one array; each tuple by itself costs more than all their numbers."""
    if {*map(type, values)} == {tuple} and len({*map(len, values)}) == 1:
        flat = np.array(list(itertools.chain.from_iterable(values)))
        if flat.size and flat.dtype == np.int64:
            return ("tuples", len(values[0]), pack(flat))
    return ("values", values)


def _unpack_values(packed: Packed) -> tuple[Any, ...]:
    if packed[0] == "values":
        return tuple(packed[1])
    _, width, flat = packed
    return tuple(map(tuple, unpack(flat).reshape(-1, width).tolist()))
