"""Between what users hold (`TensorDict`, tensors, arrays, lists) and what is stored (columns of bytes)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import (
    LazyStackedTensorDict,
    NonTensorData,
    NonTensorStack,
    TensorDict,
    TensorDictBase,
    is_tensor_collection,
)

from transfer_queue.client.decoding import decode_column
from transfer_queue.client.encoding import encode_array, encode_list, encode_payload, encode_rows, encode_tensor
from transfer_queue.client.sharing import Encoder, Sharing, encode_shared
from transfer_queue.config import known_layout
from transfer_queue.errors import EncodeError, InvalidArgument, UnknownName, WrongType, nearest
from transfer_queue.storage.block import EncodedColumn
from transfer_queue.storage.gather import GatheredColumn

_Encoded = tuple[int, EncodedColumn]
_Entry = tuple[Any, Encoder]  # a column, and what encodes it


def encode(data: Any, *, allow_pickle: bool = False, sharing: Sharing | None = None) -> tuple[int, list[EncodedColumn]]:
    """Return (number of rows, columns) of a `TensorDict` or a mapping of field names to columns.

    The columns look at the caller's memory where it is contiguous and on the CPU: it must not change until they are
    written. Tensors elsewhere are copied to the CPU. Fields of `sharing` may have one entry per group of rows instead.
    Raises `InvalidArgument` for columns that are not one entry per row or are dictionaries of tensors themselves,
    `UnknownName` for shared fields that are not there, `EncodeError` naming field, row and type of what cannot be
    stored.
    """
    if isinstance(data, TensorDictBase) or is_tensor_collection(data):
        if not data.batch_size:
            raise InvalidArgument("a TensorDict to put needs a batch size: its first dimension counts the rows")
        rows = int(data.batch_size[0])
        entries = {name: _entry(data, name, rows) for name in _names(data.keys())}
    elif isinstance(data, Mapping):
        rows = -1
        entries = {name: _column(data[name]) for name in _names(data)}
    else:
        raise WrongType(f"data must be a TensorDict or a mapping of fields, not {type(data).__name__}")
    if sharing is None:
        encoded = {name: encoder(name, value, allow_pickle) for name, (value, encoder) in entries.items()}
    else:
        encoded = _encode_sharing(entries, allow_pickle, sharing)
    return _agreed(rows, encoded), [column for _, column in encoded.values()]


def decode(
    found: Mapping[str, Sequence[GatheredColumn]], rows: int, *, layout: str = "as_put", allow_pickle: bool = False
) -> TensorDict:
    """Return a `TensorDict` [rows] on the CPU. Its tensors are the gathered memory itself.

    layout  "as_put"  dense if every row was put dense and all have one shape, else jagged
            "jagged"  jagged, but for rows that are single values
            "dense"   dense wherever all rows have one shape, else as put
    Ragged rows that differ in several dimensions come as a strided nested tensor, or as a list where PyTorch has none
    for their type; so do rows of different rank, and tensors beside other values.
    """
    known_layout(layout)
    fields = {name: decode_column(parts, layout, allow_pickle) for name, parts in found.items()}
    return TensorDict(fields, batch_size=[rows])


def empty() -> TensorDict:
    """Return a `TensorDict` [0] without fields."""
    return TensorDict({}, batch_size=[0])


# ---------------------------------------------------------------- one column


def _entry(data: Any, name: str, rows: int) -> _Entry:
    """Return an entry of a `TensorDict` as a column; what is not a tensor is one value per row, or one for all."""
    try:
        value = data.get(name)
    except RuntimeError:
        if not isinstance(data, LazyStackedTensorDict):
            raise
        return [row.get(name) for row in data.unbind(0)], encode_list
    if isinstance(value, NonTensorStack):
        return value.tolist(), _encode_values
    if isinstance(value, NonTensorData):
        return _batch_value(value.data, rows)
    if isinstance(value, torch.Tensor) or is_tensor_collection(value):
        return value, _encode_column
    return _batch_value(value, rows)


def _column(value: Any) -> _Entry:
    """Return an entry of a mapping as a column."""
    if isinstance(value, torch.Tensor):
        return value, _encode_column
    if isinstance(value, NonTensorStack):
        return value.tolist(), _encode_values
    if isinstance(value, NonTensorData):
        shape = value.batch_size
        return _batch_value(value.data, int(shape[0]) if shape else 1)
    return value, _encode_column


def _encode_column(name: str, value: Any, allow_pickle: bool) -> _Encoded:
    if isinstance(value, torch.Tensor):
        return encode_tensor(name, value)
    if isinstance(value, np.ndarray):
        return encode_array(name, value, allow_pickle)
    if is_tensor_collection(value) or isinstance(value, Mapping):
        raise InvalidArgument(
            f"field {name!r} is a {type(value).__name__}: put its entries as fields of their own, or one dict per row"
        )
    if isinstance(value, list | tuple):
        return encode_list(name, value, allow_pickle)
    raise EncodeError(
        f"field {name!r} is a {type(value).__name__}: a column is a tensor, a NumPy array or a list, an entry per row"
    )


def _encode_values(name: str, values: Sequence[Any], allow_pickle: bool) -> _Encoded:
    return len(values), encode_rows(name, values, allow_pickle)


def _encode_payload(name: str, values: Sequence[Any], allow_pickle: bool) -> _Encoded:
    return 1, encode_payload(name, values[0], allow_pickle)


def _batch_value(value: Any, rows: int) -> _Entry:
    """Return what a `TensorDict` keeps for the whole batch as a column.

    It is spread over the rows if it has one entry for each, else it is the value of every row. Of a batch of one row
    it is the payload as it stands, but for arrays of one object, which is how a `TensorDict` holds these.
    """
    array = isinstance(value, np.ndarray) and value.ndim > 0
    entry_per_row = (array or isinstance(value, list | tuple)) and len(value) == rows
    if entry_per_row and array and value.dtype.kind in "OUS":
        return value.tolist() if value.ndim == 1 else list(value), _encode_values
    if rows == 1:
        return [value], _encode_payload
    return list(value) if entry_per_row else [value] * rows, _encode_values


# ---------------------------------------------------------------- all columns


def _encode_sharing(entries: Mapping[str, _Entry], allow_pickle: bool, sharing: Sharing) -> dict[str, _Encoded]:
    unknown = [name for name in sharing.fields if name not in entries]
    if unknown:
        raise UnknownName(f"shared_fields names {unknown[0]!r}, which data does not have{nearest(unknown[0], entries)}")
    return {
        name: encode_shared(name, value, encoder, sharing, allow_pickle)
        if name in sharing.fields
        else encoder(name, value, allow_pickle)
        for name, (value, encoder) in entries.items()
    }


def _names(keys: Any) -> list[str]:
    names = list(keys)
    wrong = [name for name in names if not isinstance(name, str) or not name]
    if wrong:
        raise InvalidArgument(f"field names are non-empty strings, not {wrong[0]!r}")
    return names


def _agreed(rows: int, encoded: Mapping[str, _Encoded]) -> int:
    counts = {name: count for name, (count, _) in encoded.items()}
    wanted = {rows} if rows >= 0 else set(counts.values())
    if len(wanted | set(counts.values())) > 1:
        said = "" if rows < 0 else f" for a batch of {rows}"
        listed = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise InvalidArgument(f"fields differ in their number of rows{said}: {listed}")
    return wanted.pop() if wanted else 0
