"""Columns of every kind that can be put, and how to compare what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from transfer_queue import BatchMeta, TransferQueueClient

DTYPES = [
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8,
]  # fmt: skip


def batch(count: int, **columns: Any) -> TensorDict:
    """So many rows, of `x` = [0], [1], … unless columns are given."""
    return TensorDict(columns or {"x": torch.arange(count).reshape(count, 1)}, [count])


def put(client: TransferQueueClient, partition: str, *batches: Any) -> BatchMeta:
    """Put columns `x`, one batch each; return a meta of all rows, in order."""
    metas = []
    for column in batches:
        rows = _rows(column)
        metas.append(client.put(TensorDict({"x": column}, [rows]), partition_id=partition))
    return client.get_meta(["x"], sum(map(len, metas)), partition, task_name="all", mode="force_fetch")


def _rows(column: Any) -> int:
    if isinstance(column, NonTensorData):
        return int(column.batch_size[0])
    return int(column.size(0)) if isinstance(column, torch.Tensor) else len(column)


def jagged(*lengths: int, trailing: tuple[int, ...] = (), dtype: torch.dtype = torch.float32) -> torch.Tensor:
    rows = [numbers(length, *trailing).to(dtype) for length in lengths]
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def strided(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.nested.nested_tensor([numbers(*shape).to(dtype) for shape in shapes], layout=torch.strided)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape).float()


def objects(*values: Any) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    for position, value in enumerate(values):
        array[position] = value
    return array


def rows_of(column: Any) -> list[Any]:
    if isinstance(column, torch.Tensor):
        return list(column.unbind(0))
    return list(column.tolist() if isinstance(column, NonTensorStack) else column)


def form_of(column: Any) -> str:
    if isinstance(column, NonTensorStack):
        return "stack"
    if isinstance(column, NonTensorData):
        return "payload"
    if not column.is_nested:
        return "dense"
    return "jagged" if column.layout == torch.jagged else "strided"


def same(found: Any, wanted: Any) -> None:
    """Equal type and value; of tensors dtype, shape and bits."""
    assert type(found) is type(wanted)
    if isinstance(wanted, torch.Tensor):
        assert (found.dtype, found.shape, found.device) == (wanted.dtype, wanted.shape, torch.device("cpu"))
        assert found.reshape(-1).view(torch.uint8).equal(wanted.reshape(-1).view(torch.uint8))
    elif isinstance(wanted, np.ndarray):
        assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
        for left, right in zip(found.ravel().tolist(), wanted.ravel().tolist(), strict=True):
            same(left, right)
    elif isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            same(found[name], value)
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for left, right in zip(found, wanted, strict=True):
            same(left, right)
    else:
        assert found == wanted
