"""Fields that are the same in all rows of a group: one value per group is stored, and every row refers to its own.

n rows of a put · G groups that these belong to
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from transfer_queue.client.encoding import encode_list
from transfer_queue.errors import InvalidArgument
from transfer_queue.metadata.columns import Coded
from transfer_queue.storage.block import EncodedColumn, Int64s

Encoder: TypeAlias = Callable[[str, Any, bool], tuple[int, EncodedColumn]]  # of (field, column, allow_pickle)

_NUMERIC = "biufc"
_VIEWED_ROW_BYTES = 1 << 14  # shorter rows are picked by one copy, longer ones are written from where they lie


@dataclass(frozen=True, slots=True, eq=False)
class Sharing:
    """Which fields are shared, and which rows share. Groups are numbered in the order in which they first appear."""

    fields: tuple[str, ...]
    groups: tuple[Hashable, ...]  # [G]
    first_rows: Int64s  # [G]
    group_of: Int64s  # [n]

    @classmethod
    def of(cls, fields: Sequence[str], group_ids: Sequence[Hashable]) -> Sharing:
        """`group_ids` [n]: rows of equal ids share."""
        coded = Coded.of(group_ids)
        first_rows = np.fromiter(coded.first_rows().values(), np.int64, len(coded.values))
        return cls(tuple(fields), coded.values, first_rows, coded.codes)


def encode_shared(
    name: str, value: Any, encoder: Encoder, sharing: Sharing, allow_pickle: bool
) -> tuple[int, EncodedColumn]:
    """Encode one entry per group, in order of the groups; of one entry per row, take those of the groups' first rows.

    That the entries of a group are equal is the caller's promise. What can be told without looking at values is
    checked: `InvalidArgument` if they differ in type, dtype, shape or length.
    """
    rows, groups = len(sharing.group_of), len(sharing.groups)
    count = _length(value)
    if count == rows and groups < rows:
        _, column = _encode_first_rows(name, value, encoder, sharing, allow_pickle)
    else:
        count, column = encoder(name, value, allow_pickle)
        if count != groups:
            raise InvalidArgument(f"field {name!r} has {count} entries for {rows} rows of {groups} groups")
    return rows, column if groups == rows else dataclasses.replace(column, references=sharing.group_of)


def _length(value: Any) -> int | None:
    """The number of entries of a column; None for what is no column, or for a single value."""
    if isinstance(value, torch.Tensor):
        return value.size(0) if value.dim() else None
    if isinstance(value, np.ndarray):
        return len(value) if value.ndim else None
    return len(value) if isinstance(value, list | tuple) else None


def _encode_first_rows(
    name: str, value: Any, encoder: Encoder, sharing: Sharing, allow_pickle: bool
) -> tuple[int, EncodedColumn]:
    firsts = sharing.first_rows
    if isinstance(value, torch.Tensor) and value.is_nested:
        value, encoder = value.unbind(0), encode_list
    elif isinstance(value, torch.Tensor) and value.layout is not torch.strided:
        return encoder(name, value, allow_pickle)  # which says why it cannot be stored
    if isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in _NUMERIC):
        return _encode_dense(name, value, encoder, firsts, allow_pickle)
    _check_alike(name, value, sharing)
    chosen = value[firsts] if isinstance(value, np.ndarray) else [value[row] for row in firsts.tolist()]
    return encoder(name, chosen, allow_pickle)


def _encode_dense(
    name: str, value: Any, encoder: Encoder, chosen: Int64s, allow_pickle: bool
) -> tuple[int, EncodedColumn]:
    """Rows of a dense tensor or array; large ones are not copied before they are written."""
    if value.nbytes < _VIEWED_ROW_BYTES * len(value):
        return encoder(name, value[chosen], allow_pickle)
    parts = [encoder(name, value[row : row + 1], allow_pickle)[1] for row in chosen.tolist()]
    return len(parts), EncodedColumn(parts[0].spec, [buffer for part in parts for buffer in part.values])


def _check_alike(name: str, values: Sequence[Any], sharing: Sharing) -> None:
    """Each entry looks like that of the first row of its group."""
    forms = [_form(values[row]) for row in sharing.first_rows.tolist()]
    for row, group in enumerate(sharing.group_of.tolist()):
        first = int(sharing.first_rows[group])
        if values[row] is not values[first] and _form(values[row]) != forms[group]:
            raise InvalidArgument(
                f"field {name!r} is not shared by the rows of group {sharing.groups[group]!r}: "
                f"row {first} is {forms[group]}, row {row} is {_form(values[row])}",
                field=name,
                row=row,
            )


def _form(value: Any) -> str:
    """Say what can be told of a value without looking at all of it."""
    kind = type(value).__name__
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{kind} {value.dtype} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{kind} of {', '.join(f'{key!r}: {_form(entry)}' for key, entry in value.items())}"
    return f"{kind} of length {len(value)}" if isinstance(value, str | bytes | list | tuple) else kind
