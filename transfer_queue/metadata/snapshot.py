"""A partition as of one moment, for those who look at it whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PartitionSnapshot:
    """Rows are named by global index.

    production_status   [capacity, columns] int8: `production_status[index, field_name_mapping[field]]`
    """

    keys_mapping: dict[str, int]
    global_indexes: set[int]
    custom_meta: dict[int, dict[str, Any]]
    field_name_mapping: dict[str, int]
    production_status: torch.Tensor
