"""What a worker computes on: verl's `DataProto` without verl, and its way into and out of the queue.

    queue ──TensorDict──► to_data_proto ──DataProto──► compute ──DataProto──► from_data_proto ──TensorDict──► queue

The queue knows one kind of field; a `DataProto` has tensors and objects apart, and `meta_info` about all rows, which
travels as `extra_info` of the batch's metadata.

Legend: B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

Objects = NDArray[np.object_]


@dataclass(frozen=True)
class DataProto:
    """Columns of the same B rows, by field."""

    batch: dict[str, Tensor] = field(default_factory=dict)  # [B, …], dense or jagged
    non_tensor_batch: dict[str, Objects] = field(default_factory=dict)  # [B]
    meta_info: dict[str, Any] = field(default_factory=dict)


class HasBatches(Protocol):
    """What `from_data_proto` takes: ours, or one of verl."""

    @property
    def batch(self) -> Any: ...

    @property
    def non_tensor_batch(self) -> Any: ...

    @property
    def meta_info(self) -> Any: ...


def to_data_proto(rows: TensorDict, meta_info: Mapping[str, Any]) -> DataProto:
    """Split what was read from the queue into tensors and objects; `meta_info` is copied."""
    proto = DataProto(meta_info=dict(meta_info))
    for name, column in rows.items():
        if isinstance(column, Tensor):
            proto.batch[name] = column
        else:
            proto.non_tensor_batch[name] = _objects(column.tolist())
    return proto


def from_data_proto(proto: HasBatches) -> tuple[TensorDict, dict[str, Any]]:
    """Return the columns as the queue takes them, and `meta_info`; a proto without rows gives an empty TensorDict.

    Raises ValueError for columns that differ in their number of rows, or for a field that is both tensor and object.
    """
    tensors = {} if proto.batch is None else dict(proto.batch.items())
    objects = dict(proto.non_tensor_batch)
    twice = tensors.keys() & objects.keys()
    if twice:
        raise ValueError(f"fields {sorted(twice)} are tensors and objects at once")
    sizes = {name: len(column) for name, column in {**tensors, **objects}.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"columns of one batch differ in their number of rows: {sizes}")
    stacks = {name: NonTensorStack(*column) for name, column in objects.items()}
    size = next(iter(sizes.values()), 0)
    return TensorDict({**tensors, **stacks}, batch_size=[size]), dict(proto.meta_info)


def _objects(values: list[Any]) -> Objects:
    """Return [B]: one element per value, also where the values are lists."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column
