"""Ragged rows as jagged nested tensors, and their padded views.

Legend: B rows, N elements of all rows together, W width of the longest row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from tensordict import TensorDict
from torch import Tensor

Columns: TypeAlias = TensorDict | Mapping[str, Tensor]  # the fields of some rows


def jagged(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the jagged tensor of B rows whose elements lie one behind the other in `values` [N, …]."""
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=offsets[1:])
    return torch.nested.nested_tensor_from_jagged(values, offsets)


def row_lengths(rows: Tensor) -> Tensor:
    """Return [B] int64."""
    return rows.offsets().diff()


def padded(rows: Tensor, fill: float, *, left: bool = False) -> Tensor:
    """Return [B, W] with `fill` behind the rows, or in front of them with `left`."""
    lengths = row_lengths(rows)
    keep = valid(lengths)
    if left:
        keep = keep.flip(1)
    out = torch.full(keep.shape, fill, dtype=rows.dtype)
    out[keep] = rows.values()
    return out


def valid(lengths: Tensor, width: int | None = None) -> Tensor:
    """Return [B, W] bool: True at the first `lengths[i]` positions of row i; W is the longest row unless given."""
    return torch.arange(int(lengths.max()) if width is None else width) < lengths[:, None]
