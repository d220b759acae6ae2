"""Checking what callers give for the rows of a meta."""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Iterable, Sized
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.metadata.columns import Coded, Int64s

M = TypeVar("M", bound=Sized)


def as_int64s(name: str, values: Any) -> Int64s:
    """Copy a sequence of integers (list, tuple, NumPy array, CPU tensor) into an int64 array [n]."""
    if isinstance(values, str | bytes):
        raise WrongType(f"{name} must be a sequence of integers, not {type(values).__name__} {values!r}")
    array = np.asarray(values if hasattr(values, "__array__") else list(values))
    if array.size == 0 and array.ndim == 1:
        return np.empty(0, np.int64)
    if array.dtype.kind not in "iu":
        raise WrongType(f"{name} must be a sequence of integers, not of {array.dtype} ({_excerpt(array)})")
    if array.ndim != 1:
        raise InvalidArgument(f"{name} must have one dimension, not shape {array.shape}")
    return array.astype(np.int64)


def as_positions(positions: Any, size: int) -> Int64s:
    """Check positions of rows: every one must lie in [0, size)."""
    array = as_int64s("positions", positions)
    outside = array[(array < 0) | (array >= size)]
    if outside.size:
        raise InvalidArgument(f"positions {_excerpt(outside)} lie outside [0, {size}): name rows of this meta")
    return array


def as_order(positions: Any, size: int) -> Int64s:
    """Check an order of rows: positions that name every row once."""
    order = as_positions(positions, size)
    check_length("positions", len(order), size)
    if len(np.unique(order)) != size:
        raise InvalidArgument(f"positions name rows twice: {_excerpt(order)}")
    return order


def as_pieces(chunks: Any, size: int) -> list[slice]:
    """Check a number of pieces; return exactly so many contiguous ones, the first `size % chunks` longer by one."""
    if not hasattr(chunks, "__index__"):
        raise WrongType(f"chunks must be an int, not {type(chunks).__name__} {chunks!r}")
    count = operator.index(chunks)
    if count < 1:
        raise InvalidArgument(f"chunks must be at least 1, got {count}")
    length, longer = divmod(size, count)
    starts = [piece * length + min(piece, longer) for piece in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(starts)]


def has_rows(kind: type[M], meta: M) -> bool:
    """Whether a meta of this kind has rows; anything else is refused."""
    if not isinstance(meta, kind):
        raise WrongType(f"expected a {kind.__name__}, not {type(meta).__name__} {meta!r}")
    return len(meta) > 0


def filled(kind: type[M], metas: Iterable[M | None]) -> list[M]:
    """The metas that have rows; empty ones and None fall away."""
    return [meta for meta in metas if meta is not None and has_rows(kind, meta)]


def check_distinct(name: str, values: list[str]) -> None:
    if len(set(values)) < len(values):
        twice = sorted({value for value, times in Counter(values).items() if times > 1})
        raise InvalidArgument(f"{name} has duplicate entries {twice[:8]}: name each once")


def _excerpt(array: NDArray[Any]) -> str:
    shown = ", ".join(str(value) for value in array.ravel()[:8].tolist())
    return f"{shown}, … {array.size} in all" if array.size > 8 else shown


def as_indexes(indexes: Any) -> Int64s:
    array = as_int64s("global_indexes", indexes)
    if np.any(array < 0):
        raise InvalidArgument(f"global_indexes must not be negative: {_excerpt(array[array < 0])}")
    return array


def as_names(name: str, values: Any) -> list[str]:
    """Check a sequence of str; a bare str is none."""
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise WrongType(f"{name} must be a sequence of str, not {type(values).__name__} {values!r}")
    names = list(values)
    if {*map(type, names)} <= {str}:
        return names
    for value in names:
        if not isinstance(value, str):
            raise WrongType(f"{name} must be str, not {type(value).__name__} {value!r}")
    return [str(value) for value in names]


def as_partitions(values: Any, size: int) -> Coded[str]:
    partitions = Coded.of(as_names("partition_ids", values))
    check_length("partition_ids", len(partitions), size)
    return partitions


def as_status(status: Any, size: int) -> NDArray[np.int8]:
    """Copy to int8 [size]; None: all 0."""
    if status is None:
        return np.zeros(size, np.int8)
    array = as_int64s("production_status", status)
    check_length("production_status", len(array), size)
    wrong = array[(array != 0) & (array != 1)]
    if wrong.size:
        raise InvalidArgument(f"production_status holds {_excerpt(wrong)}: only 0 (missing) and 1 (produced) are known")
    return array.astype(np.int8)


def as_rows(name: str, values: Any, size: int) -> list[Any] | None:
    """Copy any sequence with one entry per row; None and an empty one: nothing is given."""
    if values is None or len(values) == 0:
        return None
    check_length(name, len(values), size)
    return list(values)


def check_length(name: str, length: int, size: int) -> None:
    if length != size:
        raise InvalidArgument(f"{name} has {length} entries for {size} samples: give one per sample")
