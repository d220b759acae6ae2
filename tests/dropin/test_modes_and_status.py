"""Status of rows and the other modes of `get_meta` (checklist 34 without rows that are still to come, 54)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.dropin.columns import batch
from transfer_queue import TransferQueueClient


def consumed(client: TransferQueueClient, partition: str, task: str = "t") -> bool:
    return client.check_consumption_status(task_name=task, partition_id=partition)


def produced(client: TransferQueueClient, partition: str, *fields: str) -> bool:
    return client.check_production_status(data_fields=list(fields), partition_id=partition)


def test_34_checks_of_a_partition_as_it_fills(client: TransferQueueClient, partition: str) -> None:
    """False for what is unknown or empty; true when every row has the columns, and when the task had every row."""
    assert not consumed(client, partition) and not produced(client, partition, "x")
    meta = client.put(batch(2), partition_id=partition)
    assert produced(client, partition, "x") and not produced(client, partition, "x", "y")
    assert not consumed(client, partition)
    client.put(batch(1, y=torch.ones(1)), metadata=meta.select_samples([0]))
    assert not produced(client, partition, "x", "y")
    client.put(batch(1, y=torch.ones(1)), metadata=meta.select_samples([1]))
    assert produced(client, partition, "x", "y")
    client.get_meta(["x"], 1, partition, task_name="t")
    assert not consumed(client, partition)
    client.get_meta(["x"], 1, partition, task_name="t")
    assert consumed(client, partition) and not consumed(client, partition, "u")
    client.put(batch(1), partition_id=partition)
    assert not consumed(client, partition) and not produced(client, partition, "x", "y")


def test_34_cleared_rows_leave_the_counts(client: TransferQueueClient, partition: str) -> None:
    """What is left decides; a partition without rows is neither produced nor consumed."""
    meta = client.put(batch(3), partition_id=partition)
    client.get_meta(["x"], 2, partition, task_name="t")
    client.clear_samples(meta.select_samples([2]))
    assert consumed(client, partition) and produced(client, partition, "x")
    client.clear_samples(meta.select_samples([0, 1]))
    assert not consumed(client, partition) and not produced(client, partition, "x")


def test_34_reset_consumption_of_a_task_or_of_all(client: TransferQueueClient, partition: str) -> None:
    """True also where there is nothing to reset; data and tags stay."""
    assert client.reset_consumption(partition_id=partition) is True
    client.put(batch(2), partition_id=partition, custom_meta=[{"n": 0}, {"n": 1}])
    assert client.reset_consumption(partition_id=partition, task_name="never seen") is True
    for task in ("t", "u"):
        client.get_meta(["x"], 2, partition, task_name=task)
    assert client.reset_consumption(partition_id=partition, task_name="t") is True
    assert not consumed(client, partition, "t") and consumed(client, partition, "u")
    assert client.reset_consumption(partition_id=partition) is True
    for task in ("t", "u"):
        again = client.get_meta(["x"], 2, partition, task_name=task)
        assert client.get_data(again)["x"].tolist() == [[0], [1]]
        assert again.custom_meta == [{"n": 0}, {"n": 1}]


def test_54_status_of_rows(client: TransferQueueClient, partition: str) -> None:
    """Indexes in ascending order; int8 per row, and per row and column in the order in which columns came."""
    assert client.get_production_status(["x"], partition) == (None, None)
    assert client.get_consumption_status("t", partition) == (None, None)
    meta = client.put(batch(3, z=torch.ones(3)), partition_id=partition)
    client.put(batch(2, a=torch.ones(2)), metadata=meta.select_samples([2, 0]))
    client.clear_samples(meta.select_samples([1]))
    more = client.put(batch(2, z=torch.ones(2)), partition_id=partition)
    drawn = client.get_meta(["z"], 1, partition, task_name="t")
    rows, status = client.get_production_status(["z", "a"], partition)
    expected = sorted([meta.global_indexes[0], meta.global_indexes[2], *more.global_indexes])
    assert (rows.dtype, status.dtype, rows.tolist()) == (torch.int64, torch.int8, expected)
    has_a = {meta.global_indexes[0], meta.global_indexes[2]}
    assert status.tolist() == [[1, int(row in has_a)] for row in expected]
    rows, status = client.get_consumption_status("t", partition)
    assert (rows.tolist(), status.dtype) == (expected, torch.int8)
    assert status.tolist() == [int(row in drawn.global_indexes) for row in expected]
    assert client.get_production_status(["z", "nothing"], partition) == (None, None)


def test_54_columns_come_in_the_order_in_which_they_were_registered(
    client: TransferQueueClient, partition: str
) -> None:
    meta = client.put(batch(1, z=torch.ones(1)), partition_id=partition)
    more = client.put(batch(1, z=torch.ones(1)), partition_id=partition)
    client.put(batch(1, a=torch.ones(1)), metadata=more)
    assert meta.global_indexes < more.global_indexes
    _, status = client.get_production_status(["a", "z"], partition)
    assert status.tolist() == [[1, 0], [1, 1]]


def test_54_force_fetch(client: TransferQueueClient, partition: str) -> None:
    """All rows as they are, also those that a task had; nothing is consumed."""
    assert client.get_meta(["x"], 1, partition, mode="force_fetch", task_name="t").size == 0
    first = client.put(batch(2), partition_id=partition, custom_meta=[{"n": 0}, {}])
    client.put(batch(1, y=torch.ones(1)), partition_id=partition)
    client.get_meta(["x"], 1, partition, task_name="t")
    meta = client.get_meta(data_fields=["x"], batch_size=1, partition_id=partition, mode="force_fetch", task_name="t")
    assert meta.production_status.tolist() == [1, 1, 0] and not meta.is_ready
    assert meta.custom_meta == [{"n": 0}, {}, {}]
    with pytest.raises(ValueError, match="x"):
        client.get_data(meta)
    ready = meta.select_samples([0, 1])
    assert ready.is_ready and client.get_data(ready)["x"].tolist() == [[0], [1]]
    assert client.get_meta(["x"], 1, partition, task_name="t").global_indexes == [first.global_indexes[1]]


def test_54_insert(client: TransferQueueClient, partition: str) -> None:
    """Rows without data, which are drawn when they have it."""
    meta = client.get_meta(data_fields=["x"], batch_size=3, partition_id=partition, mode="insert", task_name="t")
    assert meta.size == 3 and meta.production_status.tolist() == [0, 0, 0] and meta.field_names == ["x"]
    assert not produced(client, partition, "x")
    with pytest.raises(ValueError):
        client.get_data(meta)
    assert client.put(batch(3), metadata=meta) is meta and meta.is_ready
    assert client.get_meta(["x"], 3, partition, task_name="t").global_indexes == meta.global_indexes


@pytest.mark.parametrize(
    ("wrong", "natural"),
    [
        ({"mode": "peek"}, ValueError),
        ({"task_name": None}, ValueError),
        ({"data_fields": []}, ValueError),
        ({"batch_size": 0}, ValueError),
        ({"data_fields": "x"}, TypeError),
        ({"timeout": -1.0}, ValueError),
        ({"timeout": float("nan")}, ValueError),
    ],
)
def test_54_bad_arguments(
    client: TransferQueueClient, partition: str, wrong: dict[str, Any], natural: type[Exception]
) -> None:
    client.put(batch(1), partition_id=partition)
    arguments = {"data_fields": ["x"], "batch_size": 1, "partition_id": partition, "task_name": "t"}
    with pytest.raises(natural):
        client.get_meta(**(arguments | wrong))
    assert not consumed(client, partition)
