"""Metas that the tests of the drop-in surface make, and metas as lists of their rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from transfer_queue.metadata import BatchMeta, FieldSchema, KVBatchMeta

FLOAT = {"dtype": torch.float32, "shape": (4,), "is_nested": False, "is_non_tensor": False}
INT = {"dtype": torch.int64, "shape": (4,), "is_nested": False, "is_non_tensor": False}
RAGGED = {
    "dtype": torch.int64,
    "shape": None,
    "is_nested": True,
    "is_non_tensor": False,
    "per_sample_shapes": [(3,), (0,), (2,)],
}

VALUES = st.sampled_from([0, 1, True, 1.0, None, "s", [1], [True], {"d": 1}])
ENTRIES = st.dictionaries(st.sampled_from("abc"), VALUES, max_size=3)


def batch(**changes: Any) -> BatchMeta:
    """Three rows over two partitions."""
    arguments: dict[str, Any] = {
        "global_indexes": [7, 3, 5],
        "partition_ids": ["a", "a", "b"],
        "field_schema": {"x": FLOAT, "tokens": RAGGED},
        "production_status": [1, 0, 1],
        "extra_info": {"step": [4]},
        "custom_meta": [{"n": 0}, {"n": 1}, {"n": 2}],
    }
    return BatchMeta(**arguments | changes)


def rows(count: int, field: dict[str, Any] = FLOAT, **changes: Any) -> BatchMeta:
    """`count` ready rows with one dense field; row i has tag {"n": i}."""
    arguments: dict[str, Any] = {
        "global_indexes": range(count),
        "partition_ids": ["p"] * count,
        "field_schema": {"x": field},
        "production_status": [1] * count,
        "custom_meta": [{"n": row} for row in range(count)],
    }
    return BatchMeta(**arguments | changes)


def fetched(tags: list[dict[str, Any]]) -> BatchMeta:
    """A meta as a draw makes it."""
    return BatchMeta.from_columns(
        partition_id="p",
        indexes=np.arange(len(tags)),
        generations=np.zeros(len(tags), np.int64),
        fields={"x": FieldSchema("float32", (4,))},
        tags=tags,
    )


def keyed(count: int = 3, **changes: Any) -> KVBatchMeta:
    arguments: dict[str, Any] = {
        "keys": [f"key-{row}" for row in range(count)],
        "tags": [{"n": row} for row in range(count)],
        "partition_id": "train",
        "fields": ["x", "y"],
        "extra_info": {"step": [4]},
    }
    return KVBatchMeta(**arguments | changes)


def model_of(meta: BatchMeta) -> list[tuple[Any, ...]]:
    """A meta as the list of its rows."""
    columns = (meta.global_indexes, meta.partition_ids, meta.production_status.tolist(), meta.custom_meta)
    return list(zip(*columns, *(meta.get_shapes(name) for name in meta.field_names), strict=True))


def model_of_keys(meta: KVBatchMeta) -> list[tuple[str, dict[str, Any]]]:
    return list(zip(meta.keys, meta.tags, strict=True))
