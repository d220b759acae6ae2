"""Streams of rows whose fields tell which row they are."""

from __future__ import annotations

from typing import Any

import torch

import transfer_queue as tq
from transfer_queue.dataloader import StreamingDataset

CONF = {"runtime": "embedded", "backend": {"SimpleStorage": {"capacity_bytes": 64 << 20}}}


def put(partition: str, *values: int, last: bool = False) -> None:
    """Rows `x` = value and `text` = its name."""
    data = {"x": torch.tensor(values), "text": [f"row {value}" for value in values]}
    tq.get_client().put(data, partition_id=partition, is_last=last)


def dataset(conf: Any, partition: str, batch: int = 10, micro: int = 4, **options: Any) -> StreamingDataset:
    options = {"should_check_consumption_status": True, "dp_rank": 0, "task_name": "train", **options}
    return StreamingDataset(conf, batch, micro, ["x", "text"], partition, **options)


def rows(pairs: Any) -> list[int]:
    """Values of all rows; data and meta of each pair have to agree."""
    found = []
    for data, meta in pairs:
        assert data.batch_size == torch.Size([meta.size])
        assert data["text"].tolist() == [f"row {value}" for value in data["x"].tolist()]
        assert tq.get_client().get_data(meta)["x"].tolist() == data["x"].tolist()
        found += data["x"].tolist()
    return found
