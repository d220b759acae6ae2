"""Data parsers: a user's function that changes the columns of a put before they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDictBase, is_tensor_collection

from transfer_queue.errors import InvalidArgument, WrongType

DataParser: TypeAlias = Callable[[dict[str, Any]], dict[str, Any]]


def parsed(data: Any, parser: DataParser) -> dict[str, Any]:
    """Return what the parser makes of `{field: column}`: a tensor [n, ...] or a list of n values, for n rows.

    Tensors are copied before: the parser may change them in place. What was ragged stays so, if its rows still can be.
    Raises `WrongType` or `InvalidArgument` for a parser that is none, or changes fields or lengths.
    """
    if not callable(parser):
        raise WrongType(f"data_parser must be a function, not {parser!r}")
    if not (isinstance(data, Mapping | TensorDictBase) or is_tensor_collection(data)):
        raise WrongType(f"data must be a TensorDict or a mapping of fields, not {type(data).__name__}")
    rows = int(data.batch_size[0]) if not isinstance(data, Mapping) and data.batch_size else None
    ragged = {name for name in data.keys() if _is_nested(data.get(name))}  # noqa: SIM118  a TensorDict iterates rows
    given = {name: _column(name, data.get(name), rows) for name in data.keys()}  # noqa: SIM118
    lengths = {name: len(column) for name, column in given.items()}
    result = parser(given)
    if not isinstance(result, dict):
        raise WrongType(f"data_parser must return the dict that it was given, not {type(result).__name__}")
    if set(result) != set(lengths):
        raise InvalidArgument(
            f"data_parser must keep the fields {sorted(lengths)}, it returned {sorted(map(str, result))}"
        )
    return {name: _checked(name, result[name], lengths[name], name in ragged) for name in lengths}


def _column(name: str, value: Any, rows: int | None) -> Any:
    if isinstance(value, torch.Tensor):
        return [row.clone() for row in value.unbind(0)] if value.is_nested else value.clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return value.copy()
    if isinstance(value, NonTensorStack):
        return value.tolist()
    if isinstance(value, NonTensorData):
        value, rows = value.data, int(value.batch_size[0]) if value.batch_size else 1
    elif is_tensor_collection(value) or isinstance(value, Mapping):
        raise InvalidArgument(f"field {name!r} is a {type(value).__name__}: put its entries as fields of their own")
    if hasattr(value, "__len__") and not isinstance(value, str | bytes) and rows in (None, len(value)):
        return list(value)
    if rows is None:
        raise InvalidArgument(f"field {name!r} is a {type(value).__name__}: a column has an entry per row")
    return [value] * rows


def _checked(name: str, column: Any, rows: int, ragged: bool) -> Any:
    if not hasattr(column, "__len__") or isinstance(column, str | bytes | Mapping):
        raise WrongType(f"data_parser made field {name!r} a {type(column).__name__}, which has no entry per row")
    found = column.size(0) if isinstance(column, torch.Tensor) and column.dim() else len(column)
    if found != rows:
        raise InvalidArgument(
            f"data_parser must keep the number of rows: field {name!r} had {rows}, it has {found} now"
        )
    if ragged and isinstance(column, list) and all(isinstance(row, torch.Tensor) for row in column):
        alike = {(row.dtype, row.dim(), row.shape[1:]) for row in column if row.dim()}
        if len(alike) == 1 and all(row.dim() for row in column):
            return torch.nested.as_nested_tensor(column, layout=torch.jagged)
    return column


def _is_nested(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_nested
