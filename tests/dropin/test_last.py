"""The last rows of a partition; the numbers are those of the drop-in checklist."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from tests.dropin.columns import batch
from transfer_queue import TransferQueueClient
from transfer_queue.errors import PartitionSealed


def test_57_custom_meta_comes_with_the_rows(client: TransferQueueClient, partition: str) -> None:
    """In the same commit as the columns, under either name."""
    put = client.put(batch(2), partition_id=partition, custom_meta=[{"len": 1}, {"len": 2}])
    assert put.custom_meta == [{"len": 1}, {"len": 2}]
    meta = client.get_meta(["x"], 2, partition, task_name="t")
    assert meta.custom_meta == [{"len": 1}, {"len": 2}]
    assert client.put(batch(2, y=torch.ones(2)), metadata=meta, custom_meta=[{"r": 1.0}, None]) is meta
    assert meta.custom_meta == [{"len": 1, "r": 1.0}, {"len": 2}]
    with pytest.raises(ValueError, match="custom_meta"):
        client.put(batch(1), partition_id=partition, tags=[{}], custom_meta=[{}])


def test_57_completed_and_drained(client: TransferQueueClient, partition: str) -> None:
    """Completed: the last rows were put. Drained: and the task consumed all."""
    assert not client.check_production_completed(partition)
    client.put(batch(3), partition_id=partition)
    assert not client.check_production_completed(partition)
    client.put(batch(1), partition_id=partition, is_last=True)
    assert client.check_production_completed(partition) and not client.check_stream_drained("t", partition)
    with pytest.raises(PartitionSealed, match="is_last"):
        client.put(batch(1), partition_id=partition)
    with pytest.raises(ValueError):
        client.kv_put("late", partition, tag={})
    rows = client.get_meta(["x"], 4, partition, task_name="t")
    assert client.check_stream_drained("t", partition) and not client.check_stream_drained("other", partition)
    client.put({"y": torch.ones(4)}, metadata=rows)
    client.clear_partition(partition)
    assert not client.check_production_completed(partition)
    client.put(batch(1), partition_id=partition)


def test_57_a_draw_that_waits_ends_with_the_stream(client: TransferQueueClient, partition: str) -> None:
    """Without rows, at once; what is left can still be drawn. In either face."""
    first = client.put(batch(2), partition_id=partition)
    found: list[Any] = []
    blocked = threading.Thread(
        target=lambda: found.append(client.get_meta(["x"], 3, partition, task_name="t", timeout=30))
    )
    blocked.start()

    async def draw() -> Any:
        waiting = asyncio.ensure_future(client.async_get_meta(["x"], 5, partition, task_name="u", timeout=30))
        while client.audit()["waiting"] < 2:
            await asyncio.sleep(0.005)
        await client.async_put(metadata=first, is_last=True)
        return await waiting

    meta = asyncio.run(draw())
    blocked.join(10)
    for ended in (meta, found[0]):
        assert not ended and ended.extra_info == {"end_of_stream": True, "left": 2, "batch_size": 2}
    left = client.get_meta(["x"], meta.extra_info["left"], partition, task_name="t")
    assert client.get_data(left)["x"].tolist() == [[0], [1]]
    with client.leased(["x"], 1, partition, task_name="t") as (nothing, data):
        assert not nothing and len(data) == 0
    assert client.check_stream_drained("t", partition)
