"""Metas whose rows can be told apart, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from transfer_queue.metadata import BatchMeta, FieldLocation, FieldSchema

FLOAT = FieldSchema("float32", (4,))
INT = FieldSchema("int64", (4,))


def meta_of(indexes: Any, fields: dict[str, FieldSchema] | None = None, **changes: Any) -> BatchMeta:
    """Rows whose block is 1000 and whose slot is their global index, for all fields."""
    rows = np.array(list(indexes), np.int64)
    fields = {"x": FLOAT} if fields is None else fields
    arguments: dict[str, Any] = {
        "partition_id": "p",
        "indexes": rows,
        "generations": rows % 3,
        "fields": fields,
        "locations": (FieldLocation(tuple(fields), np.full(len(rows), 1000), rows),),
        "keys": [f"key-{row}" for row in rows],
        "tags": [{"row": int(row)} for row in rows],
        "group_ids": [f"group-{row // 2}" for row in rows],
        "extra_info": {"step": 1},
    }
    return BatchMeta.from_columns(**{**arguments, **changes})


def mixed(size: int) -> BatchMeta:
    """A hand-made meta over three partitions, with a ragged field of known shapes."""
    shapes = [(row % 3,) for row in range(size)]
    return BatchMeta(
        range(size),
        [f"part-{row % 3}" for row in range(size)],
        {"x": {"dtype": torch.float32, "shape": (4,)}, "t": {"is_nested": True, "per_sample_shapes": shapes}},
        [row % 2 for row in range(size)],
        {"step": [1]},
        [{"row": row} for row in range(size)],
        [f"backend-{row}" for row in range(size)],
    )


def check_rows_are_whole(meta: BatchMeta) -> None:
    """Everything a row of `meta_of` has still belongs to its index."""
    rows = meta.global_indexes
    assert meta.generations.tolist() == [row % 3 for row in rows]
    assert meta.keys == [f"key-{row}" for row in rows]
    assert meta.group_ids == [f"group-{row // 2}" for row in rows]
    assert meta.custom_meta == [{"row": row} for row in rows]
    for location in meta.locations:
        assert location.slots.tolist() == rows
        assert location.blocks.tolist() == [1000] * len(rows)


def located(meta: BatchMeta) -> dict[str, list[int]]:
    return {name: location.blocks.tolist() for location in meta.locations for name in location.fields}
