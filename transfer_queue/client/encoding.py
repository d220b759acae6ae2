"""One field of a put as a column to store; views of the caller's memory wherever it is contiguous.

n rows · L elements of a row along its first dimension
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from transfer_queue.errors import EncodeError, InvalidArgument
from transfer_queue.messages import ColumnSpec
from transfer_queue.storage.block import Bytes, EncodedColumn, Int64s, item_bytes
from transfer_queue.wire.values import pack_value

_JOINED_ROW_BYTES = 1 << 14  # shorter rows are joined before they are written: one copy more, many steps fewer
_EMPTY = np.empty(0, np.uint8)
_NUMPY_TYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.bool})


def encode_tensor(name: str, tensor: torch.Tensor) -> tuple[int, EncodedColumn]:
    """Rows are the first dimension; nested tensors keep their ragged rows."""
    if tensor.is_nested:
        return _encode_nested(name, tensor)
    if tensor.dim() == 0:
        raise InvalidArgument(f"field {name!r} is a single value, not one entry per row")
    plain = _plain(name, tensor)
    spec = ColumnSpec(name=name, layout="dense", dtype=_dtype_name(name, plain), shape=tuple(plain.shape[1:]))
    return plain.shape[0], EncodedColumn(spec, [_bytes_of(plain)])


def encode_array(name: str, array: np.ndarray[Any, Any], allow_pickle: bool = False) -> tuple[int, EncodedColumn]:
    """Numbers are stored as a tensor, anything else as one Python or NumPy value per row."""
    if array.ndim == 0:
        raise InvalidArgument(f"field {name!r} is a single value, not one entry per row")
    if array.dtype.kind not in "biufc":
        rows = array.tolist() if array.dtype.kind in "OUS" and array.ndim == 1 else list(array)
        return len(array), encode_rows(name, rows, allow_pickle)
    native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    try:
        item_bytes(native.dtype.name)
    except ValueError as error:
        raise EncodeError(f"field {name!r} has NumPy type {array.dtype}, which no tensor can have") from error
    spec = ColumnSpec(name=name, layout="dense", dtype=native.dtype.name, shape=array.shape[1:])
    return len(array), EncodedColumn(spec, [native.reshape(-1).view(np.uint8)])


def encode_list(name: str, rows: Sequence[Any], allow_pickle: bool = False) -> tuple[int, EncodedColumn]:
    """Tensors of one type and rank are the rows of a ragged column; else every entry is a value."""
    if all(isinstance(row, torch.Tensor) and not row.is_nested for row in rows):
        forms = {(row.dtype, row.dim()) for row in rows}
        if len(forms) == 1:
            return len(rows), _encode_tensor_rows(name, rows)
    return len(rows), encode_rows(name, rows, allow_pickle)


def encode_rows(name: str, rows: Sequence[Any], allow_pickle: bool = False) -> EncodedColumn:
    """One Python value per row."""
    kinds = set(map(type, rows))
    if kinds == {str}:
        return _encode_text(name, rows)
    if kinds == {bytes}:
        return _encode_pieces(name, "bytes", rows)
    if kinds == {bool}:
        return EncodedColumn(_spec(name, "bool"), [np.array(rows, np.bool_).view(np.uint8)])
    if kinds == {float}:
        return EncodedColumn(_spec(name, "float"), [np.array(rows, np.float64).view(np.uint8)])
    if kinds == {int}:
        try:
            return EncodedColumn(_spec(name, "int"), [np.array(rows, np.int64).view(np.uint8)])
        except OverflowError:
            return _encode_objects(name, rows, allow_pickle)
    return _encode_objects(name, rows, allow_pickle)


def encode_payload(name: str, value: Any, allow_pickle: bool = False) -> EncodedColumn:
    """The one value of a batch of one row, marked as such: read alone it is not a list of one."""
    column = encode_rows(name, [value], allow_pickle)
    return dataclasses.replace(column, spec=dataclasses.replace(column.spec, shape=()))


# ---------------------------------------------------------------- tensors


def _encode_nested(name: str, tensor: torch.Tensor) -> tuple[int, EncodedColumn]:
    if tensor.layout is torch.jagged:
        nested: Any = tensor
        if nested.lengths() is None and nested._ragged_idx == 1:
            return _encode_jagged(name, nested.values(), nested.offsets())
    rows = list(tensor.unbind(0))
    if rows and rows[0].dim() == 0:
        return encode_tensor(name, torch.stack(rows))
    if not rows:
        return 0, EncodedColumn(_spec(name, "ragged", _dtype_name(name, tensor), ()), [], np.zeros(1, np.int64))
    return len(rows), _encode_tensor_rows(name, rows)


def _encode_jagged(name: str, values: torch.Tensor, offsets: torch.Tensor) -> tuple[int, EncodedColumn]:
    cuts: Int64s = offsets.cpu().numpy().astype(np.int64, copy=False)
    plain = _plain(name, values[int(cuts[0]) : int(cuts[-1])])
    spec = ColumnSpec(name=name, layout="ragged", dtype=_dtype_name(name, plain), shape=tuple(plain.shape[1:]))
    return len(cuts) - 1, EncodedColumn(spec, [_bytes_of(plain)], cuts - cuts[0])


def _encode_tensor_rows(name: str, rows: Sequence[torch.Tensor]) -> EncodedColumn:
    """Rows of one type and rank: "ragged" if only their first dimension differs, else "shaped"; of rank 0: dense."""
    plain = [_plain(name, row) for row in rows]
    rank = plain[0].dim()
    if rank == 0:
        return encode_tensor(name, torch.stack(plain))[1]
    dtype = _dtype_name(name, plain[0])
    shapes = np.array([row.shape for row in plain], np.int64)
    total = sum(row.numel() * row.element_size() for row in plain)
    if total < _JOINED_ROW_BYTES * len(plain):
        values = [_bytes_of(torch.cat([row.reshape(-1).view(torch.uint8) for row in plain]))] if total else [_EMPTY]
    else:
        values = [_bytes_of(row) for row in plain]
    if bool((shapes[:, 1:] == shapes[0, 1:]).all()):
        trailing = tuple(plain[0].shape[1:])
        return EncodedColumn(_spec(name, "ragged", dtype, trailing), values, _offsets(shapes[:, 0]))
    return EncodedColumn(_spec(name, "shaped", dtype), values, _offsets(shapes.prod(axis=1)), shapes)


def _plain(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The values that a tensor shows, contiguous, on the CPU, without history."""
    if (
        tensor.layout is torch.strided
        and tensor.is_cpu
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    ):
        return tensor.contiguous()
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        kind = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
        raise EncodeError(f"field {name!r} is a {kind} tensor; convert it to a dense one before storing it")
    shown = tensor.detach() if tensor.requires_grad else tensor  # tensors of inference mode cannot be detached
    return shown.cpu().resolve_conj().resolve_neg().contiguous()


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """View a contiguous tensor as bytes."""
    if tensor.numel() == 0:
        return _EMPTY
    array: Bytes
    if tensor.dtype in _NUMPY_TYPES:  # NumPy makes views faster
        array = tensor.numpy().reshape(-1).view(np.uint8)
    else:
        array = tensor.reshape(-1).view(torch.uint8).numpy()
    return array


def _dtype_name(name: str, tensor: torch.Tensor) -> str:
    try:
        return _stored_name(tensor.dtype)
    except ValueError as error:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise EncodeError(f"field {name!r} has dtype {dtype}, which cannot be stored") from error


@functools.cache
def _stored_name(dtype: torch.dtype) -> str:
    """Return the name of an element type; ValueError if it cannot be stored."""
    name = str(dtype).removeprefix("torch.")
    item_bytes(name)
    return name


# ---------------------------------------------------------------- values


def _encode_text(name: str, rows: Sequence[str]) -> EncodedColumn:
    joined = "".join(rows)
    if joined.isascii():
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        return EncodedColumn(_spec(name, "text"), [np.frombuffer(joined.encode(), np.uint8)], _offsets(lengths))
    return _encode_pieces(name, "text", [row.encode("utf-8", "surrogatepass") for row in rows])


def _encode_objects(name: str, rows: Sequence[Any], allow_pickle: bool) -> EncodedColumn:
    pieces = []
    for position, row in enumerate(rows):
        try:
            pieces.append(pack_value(row, allow_pickle))
        except EncodeError as error:
            kind = f"{type(row).__module__}.{type(row).__qualname__}"
            raise EncodeError(
                f"field {name!r}, row {position} ({kind}): {error.message}", field=name, row=position, type=kind
            ) from error
    return _encode_pieces(name, "object", pieces)


def _encode_pieces(name: str, layout: str, pieces: Sequence[bytes]) -> EncodedColumn:
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return EncodedColumn(_spec(name, layout), [np.frombuffer(b"".join(pieces), np.uint8)], _offsets(lengths))


def _spec(name: str, layout: str, dtype: str | None = None, shape: tuple[int, ...] | None = None) -> ColumnSpec:
    return ColumnSpec(name=name, layout=layout, dtype=dtype, shape=shape)


def _offsets(lengths: Int64s) -> Int64s:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
