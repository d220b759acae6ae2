"""Handles on rows between client and queue: failing requests, tags, pieces (checklist 29 to 31)."""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from tests.dropin.columns import batch
from tests.dropin.processes import in_processes
from transfer_queue import BatchMeta, TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.errors import EncodeError, SamplerError
from transfer_queue.runtime.embedded import EmbeddedRuntime
from transfer_queue.samplers import BaseSampler


class Moody(BaseSampler):
    """Raises, or answers nonsense, if the request tells it to."""

    def sample(
        self, ready_indexes: list[int], batch_size: int, *args: Any, **kwargs: Any
    ) -> tuple[list[int], list[int]]:
        match kwargs.get("mood"):
            case "raise":
                raise ZeroDivisionError("in a bad mood")
            case "nonsense":
                return [10**6], [10**6]
            case "no indexes":
                return ["a"], ["b"]  # type: ignore[list-item]
        chosen = ready_indexes[:batch_size]
        return chosen, chosen


@pytest.fixture
def moody() -> Iterator[TransferQueueClient]:
    """A client of a queue with that sampler."""
    runtime = EmbeddedRuntime(settings(merged({"runtime": "embedded", "controller": {"sampler": Moody()}})))
    with TransferQueueClient("c", runtime.info, connector=runtime) as client:
        yield client
    runtime.close()


@pytest.mark.parametrize("mood", ["raise", "nonsense", "no indexes"])
def test_29_a_sampler_that_fails_harms_nobody_else(moody: TransferQueueClient, mood: str) -> None:
    """Neither a draw that is parked beside it, nor puts, nor the next draw of the same task."""
    found: list[BatchMeta] = []
    parked = threading.Thread(target=lambda: found.append(moody.get_meta(["x"], 3, "p", task_name="u", timeout=30)))
    parked.start()
    moody.put(batch(2), partition_id="p")
    with pytest.raises(SamplerError, match="in a bad mood" if mood == "raise" else "Moody"):
        moody.get_meta(["x"], 2, "p", task_name="t", sampling_config={"mood": mood})
    moody.put(batch(2), partition_id="p")
    parked.join(30)
    assert found[0].size == 3
    assert moody.get_meta(["x"], 4, "p", task_name="t").size == 4


def test_29_malformed_requests_harm_nobody_else(client: TransferQueueClient, partition: str) -> None:
    """Each raises for its caller; what others do meanwhile, and afterwards, is served."""

    async def run() -> list[Any]:
        good = [client.async_kv_put(f"good-{row}", partition, {"x": torch.ones(2)}, {"n": row}) for row in range(20)]
        bad = [
            client.async_put({"x": torch.ones(3), "y": torch.ones(2)}, partition_id=partition),
            client.async_put({"x": object()}, partition_id=partition),
            client.async_get_meta([], 0, partition, task_name="t"),
            client.async_get_meta("x", 1, partition, task_name="t"),
            client.async_kv_retrieve_keys([10**9], partition),
            client.async_kv_batch_get(["nothing"], partition),
            client.async_kv_put("tag", partition, tag={"x": object()}),
            client.async_get_meta(["x"], 1, partition, task_name="t", sampling_config={"sampler": "NoSuch"}),
        ]
        return await asyncio.gather(*bad, *good, return_exceptions=True)

    found = asyncio.run(run())
    assert all(isinstance(error, RuntimeError | ValueError | TypeError) for error in found[:8]), found[:8]
    assert [put.keys for put in found[8:]] == [[f"good-{row}"] for row in range(20)]
    assert len(client.kv_list(partition)[partition]) == 20


@pytest.mark.parametrize("value", [object(), torch.ones(2), {"deep": [object()]}])
def test_29_a_tag_that_cannot_be_sent_is_refused_at_once(
    queue: EmbeddedRuntime, client: TransferQueueClient, partition: str, value: Any
) -> None:
    """Also where controller and client are one process: others list the partition."""
    client.kv_put("a", partition, tag={"n": 1})
    meta = client.put(batch(1), partition_id=partition)
    meta.update_custom_meta([{"x": value}])
    for call in (
        lambda: client.kv_put("a", partition, tag={"x": value}),
        lambda: client.kv_put("b", partition, tag={"x": value}),
        lambda: client.put(batch(1), partition_id=partition, tags=[{"x": value}]),
        lambda: client.set_custom_meta(meta),
    ):
        with pytest.raises(EncodeError):
            call()
    with TransferQueueClient("other", queue.info, transport="tcp") as other:
        assert other.kv_list(partition) == {partition: {"a": {"n": 1}}}


def test_30_drawn_metas_show_tags_and_late_writers_revert_nothing(client: TransferQueueClient, partition: str) -> None:
    """Each writer sends the entries that it changed, whatever its copy of the others is."""
    client.put(batch(2), partition_id=partition, custom_meta=[{"status": "new", "n": 0}, {"status": "new", "n": 1}])
    early = client.get_meta(["x"], 2, partition, task_name="early")
    late = pickle.loads(pickle.dumps(client.get_meta(["x"], 2, partition, task_name="late")))
    assert early.custom_meta == late.custom_meta == [{"status": "new", "n": 0}, {"status": "new", "n": 1}]
    early.update_custom_meta([{"status": "done"}, {"status": "done", "length": 7}])
    client.set_custom_meta(early)
    late.custom_meta[0]["reward"] = 0.5
    assert client.put(batch(2, y=torch.ones(2)), metadata=late) is late
    now = client.get_meta(["y"], 2, partition, task_name="now").custom_meta
    assert now == [{"status": "done", "n": 0, "reward": 0.5}, {"status": "done", "n": 1, "length": 7}]


def test_30_tags_of_several_partitions_and_of_none(client: TransferQueueClient, partition: str) -> None:
    """One meta may have rows of both; an empty one is nothing to do."""
    other = f"{partition}_other"
    rows = [client.put(batch(1), partition_id=name) for name in (partition, other)]
    both = BatchMeta.concat(rows)
    both.update_custom_meta([{"n": 1}, {"n": 2}])
    client.set_custom_meta(both)
    client.set_custom_meta(BatchMeta())
    found = [client.get_meta(["x"], 1, name, task_name="t").custom_meta for name in (partition, other)]
    assert found == [[{"n": 1}], [{"n": 2}]]
    client.clear_partition(other)


def test_30_a_put_through_an_outdated_meta_is_refused_whole(client: TransferQueueClient, partition: str) -> None:
    """Of rows that were cleared: neither data nor tags."""
    client.kv_batch_put(["a", "b"], partition, batch(2), [{"n": 0}, {"n": 1}])
    meta = client.kv_retrieve_meta(["a", "b"], partition)
    client.kv_clear(["a"], partition)
    meta.update_custom_meta([{"n": 5}, {"n": 5}])
    with pytest.raises(KeyError):
        client.put(batch(2, y=torch.ones(2)), metadata=meta)
    assert client.kv_list(partition)[partition] == {"b": {"n": 1}}
    assert list(client.kv_batch_get(["b"], partition).keys()) == ["x"]


def _adds_a_column(info: Any, share: BatchMeta, rank: int) -> BatchMeta:
    with TransferQueueClient(f"worker-{rank}", info) as client:
        value = client.get_data(share)["x"].float() * 10
        written: BatchMeta = client.put(data=TensorDict({"y": value}, len(share)), metadata=share)
        assert written is share
        return written


def test_31_driver_chunks_workers_put_driver_joins(
    queue: EmbeddedRuntime, client: TransferQueueClient, partition: str
) -> None:
    """The joined meta knows the new column, and the keys are those of before, in order."""
    keys = [f"k{row}" for row in (3, 1, 4, 0, 2, 6, 5)]
    client.kv_batch_put(keys, partition, batch(7), [{"n": row} for row in range(7)])
    meta = client.kv_retrieve_meta(keys=keys, partition_id=partition)
    meta.extra_info["step"] = 1
    parts = in_processes(_adds_a_column, [(queue.info, share, rank) for rank, share in enumerate(meta.chunk(3))])
    assert [len(part) for part in parts] == [3, 2, 2]
    joined = BatchMeta.concat(parts)
    assert joined.field_names == ["x", "y"] and joined.is_ready and joined.extra_info == {"step": 1}
    assert client.kv_retrieve_keys(global_indexes=joined.global_indexes, partition_id=partition) == keys
    assert client.get_data(joined)["y"].flatten().tolist() == [row * 10.0 for row in range(7)]
    assert joined.custom_meta == [{"n": row} for row in range(7)]


def test_31_keys_of_rows(client: TransferQueueClient, partition: str) -> None:
    """In the order asked, ints of any kind; a row without a key, or of another partition, is an error."""
    rows = client.kv_retrieve_meta(["a", "b"], partition, create=True).global_indexes
    for asked in (rows, np.array(rows), [np.int32(row) for row in rows]):
        assert client.kv_retrieve_keys(asked, partition) == ["a", "b"]
    assert client.kv_retrieve_keys(rows[1], partition) == client.kv_retrieve_keys(np.int64(rows[1]), partition) == ["b"]
    without = client.put(batch(1), partition_id=partition).global_indexes
    with pytest.raises(RuntimeError, match="no key"):
        client.kv_retrieve_keys(rows + without, partition)
    client.kv_put("a", f"{partition}_other", tag={})
    with pytest.raises(RuntimeError, match=f"{partition}_other"):
        client.kv_retrieve_keys(rows, f"{partition}_other")
    for wrong, natural in (([], ValueError), ([0.5], TypeError), (["a"], TypeError)):
        with pytest.raises(natural, match="global_indexes"):
            client.kv_retrieve_keys(wrong, partition)
    client.clear_partition(f"{partition}_other")


def test_31_meta_of_keys(client: TransferQueueClient, partition: str) -> None:
    """In the order asked, with the columns of all; missing keys are left out, or made."""
    assert client.kv_retrieve_meta(["a"], partition).size == 0
    client.kv_batch_put(["a", "b"], partition, batch(2), [{"n": 0}, {"n": 1}])
    client.kv_put("a", partition, {"more": torch.ones(1)})
    meta = client.kv_retrieve_meta(keys=["b", "none", "a"], partition_id=partition, create=False)
    assert (meta.size, meta.field_names, meta.custom_meta) == (2, ["x"], [{"n": 1}, {"n": 0}])
    assert client.get_data(meta)["x"].tolist() == [[1], [0]]
    assert client.kv_retrieve_meta(["a"], partition).field_names == ["more", "x"]
    made = client.kv_retrieve_meta(["c", "a"], partition, create=True)
    assert (made.size, made.field_names) == (2, [])
    assert client.kv_retrieve_keys(made.global_indexes, partition) == ["c", "a"]
    assert list(client.kv_list(partition)[partition]) == ["a", "b", "c"]


def test_31_a_put_returns_the_meta_that_it_was_given(client: TransferQueueClient, partition: str) -> None:
    """In place: the union of its columns, all ready; in either face, also of rows of several puts."""
    parts = [client.put(batch(2), partition_id=partition) for _ in range(2)]
    meta = BatchMeta.concat(parts)
    assert client.put(batch(4, y=torch.ones(4)), metadata=meta) is meta
    assert asyncio.run(client.async_put(data=batch(4, z=torch.ones(4)), metadata=meta)) is meta
    assert meta.field_names == ["x", "y", "z"] and meta.is_ready
    assert client.get_data(meta).keys() == {"x", "y", "z"}
    for wrong in (batch(3), TensorDict({}, batch_size=0)):
        with pytest.raises(ValueError):
            client.put(wrong, metadata=meta)
    with pytest.raises(ValueError):
        client.put(batch(1))
