"""Gathered columns as tensors, nested tensors and lists of values.

n rows · L elements of a row along its first dimension
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData

from transfer_queue.client.nontensor import stack_values
from transfer_queue.errors import DecodeError
from transfer_queue.storage.block import TENSOR_LAYOUTS, Int64s
from transfer_queue.storage.gather import GatheredColumn
from transfer_queue.wire.values import unpack_value


def decode_column(parts: Sequence[GatheredColumn], layout: str, allow_pickle: bool = False) -> Any:
    """Return what a `TensorDict` holds for a field: a tensor [n, ...], a nested one, or a `NonTensorStack`.

    The one row of a result is a `NonTensorData` [1] if it was put as one.
    """
    if len(parts) == 1 and parts[0].spec.layout in TENSOR_LAYOUTS:
        return _tensor(parts[0], layout)
    values = _scattered([_values(part, allow_pickle) for part in parts], parts)
    if len(values) == 1 and parts[0].spec.shape is not None:
        return NonTensorData(data=values[0], batch_size=[1])
    return stack_values(values)


def _tensor(column: GatheredColumn, layout: str) -> Any:
    shape = column.spec.shape
    if column.spec.layout == "dense":
        assert shape is not None
        if layout == "jagged" and shape:
            starts = np.arange(column.rows + 1) * shape[0]
            return _jagged(_typed(column, (column.rows * shape[0], *shape[1:])), starts, shape[0])
        return _typed(column, (column.rows, *shape))
    if column.spec.layout == "ragged":
        assert column.offsets is not None and shape is not None
        lengths = np.diff(column.offsets)
        if layout == "dense" and column.rows and (lengths == lengths[0]).all():
            return _typed(column, (column.rows, int(lengths[0]), *shape))
        return _jagged(_typed(column, (int(column.offsets[-1]), *shape)), column.offsets, lengths.max(initial=0))
    return _shaped(column, layout)


def _shaped(column: GatheredColumn, layout: str) -> Any:
    """Jagged if the rows differ in one dimension only, else a strided nested tensor."""
    shapes = column.shapes
    assert shapes is not None and column.offsets is not None
    if layout == "dense" and column.rows and (shapes == shapes[0]).all():
        return _typed(column, (column.rows, *shapes[0].tolist()))
    if column.rows == 0 or (shapes[:, 1:] == shapes[0, 1:]).all():
        trailing = shapes[0, 1:].tolist() if column.rows else []
        lengths = shapes[:, 0]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        return _jagged(_typed(column, (int(offsets[-1]), *trailing)), offsets, lengths.max(initial=0))
    rows = _tensor_rows(column)
    for form in (torch.jagged, torch.strided):
        try:
            return torch.nested.as_nested_tensor(rows, layout=form)
        except RuntimeError:  # this torch cannot nest these shapes, or this element type
            continue
    return stack_values([row.clone() for row in rows])


def _typed(column: GatheredColumn, shape: tuple[int, ...]) -> torch.Tensor:
    dtype = getattr(torch, column.spec.dtype or "", None)
    if not isinstance(dtype, torch.dtype):
        raise DecodeError(f"field {column.spec.name!r} has dtype {column.spec.dtype!r}, which this torch does not know")
    if column.values.nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.from_numpy(column.values).view(dtype).view(shape)


def _jagged(values: torch.Tensor, offsets: Int64s, longest: int) -> torch.Tensor:
    """`longest`: the length of the longest row. Without it PyTorch pads every row to the sum of all lengths."""
    nested: torch.Tensor = torch.nested.nested_tensor_from_jagged(
        values, torch.from_numpy(offsets), max_seqlen=int(longest)
    )
    return nested


# ---------------------------------------------------------------- row by row


def _scattered(values: Sequence[list[Any]], parts: Sequence[GatheredColumn]) -> list[Any]:
    """Bring the rows of all parts into the order of the request."""
    if len(parts) == 1:
        return values[0]
    rows: list[Any] = [None] * sum(part.rows for part in parts)
    for part, found in zip(parts, values, strict=True):
        assert part.positions is not None
        for position, value in zip(part.positions.tolist(), found, strict=True):
            rows[position] = value
    return rows


def _values(column: GatheredColumn, allow_pickle: bool) -> list[Any]:
    layout = column.spec.layout
    if layout in TENSOR_LAYOUTS:
        return [row.clone() for row in _tensor_rows(column)]
    if layout == "bool":
        return list(column.values.view(np.bool_).tolist())
    if layout == "int":
        return list(column.values.view(np.int64).tolist())
    if layout == "float":
        return list(column.values.view(np.float64).tolist())
    assert column.offsets is not None
    raw = column.values.tobytes()
    if layout == "text":
        return _texts(column.spec.name, raw, column.offsets)
    pieces = [raw[begin:end] for begin, end in _bounds(column.offsets)]
    return pieces if layout == "bytes" else [unpack_value(piece, allow_pickle) for piece in pieces]


def _texts(name: str, raw: bytes, offsets: Int64s) -> list[str]:
    try:
        if raw.isascii():
            text = raw.decode("ascii")
            return [text[begin:end] for begin, end in _bounds(offsets)]
        return [raw[begin:end].decode("utf-8", "surrogatepass") for begin, end in _bounds(offsets)]
    except UnicodeDecodeError as error:
        raise DecodeError(f"field {name!r} holds bytes that are no text: {error}") from error


def _tensor_rows(column: GatheredColumn) -> list[torch.Tensor]:
    """Views of the rows of a tensor column."""
    shape = column.spec.shape
    if column.spec.layout == "dense":
        assert shape is not None
        return list(_typed(column, (column.rows, *shape)).unbind(0))
    assert column.offsets is not None
    if column.spec.layout == "ragged":
        assert shape is not None
        flat = _typed(column, (int(column.offsets[-1]), *shape))
        return [flat[begin:end] for begin, end in _bounds(column.offsets)]
    assert column.shapes is not None
    flat = _typed(column, (int(column.offsets[-1]),))
    cuts = zip(_bounds(column.offsets), column.shapes.tolist(), strict=True)
    return [flat[begin:end].view(dims) for (begin, end), dims in cuts]


def _bounds(offsets: Int64s) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets.tolist()))
