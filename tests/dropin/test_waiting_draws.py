"""What an unserved `get_meta` does: the table of timeouts, parked requests, who wakes them (checklist 49)."""

from __future__ import annotations

import asyncio
import contextlib
import math
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.dropin.columns import batch
from tests.dropin.processes import working
from transfer_queue import BatchMeta, TransferQueueClient, ZMQServerInfo
from transfer_queue.config import merged, settings
from transfer_queue.errors import CapacityExceeded, GetMetaTimeout
from transfer_queue.runtime.embedded import EmbeddedRuntime

WAKE_S = 0.05  # at most, in the middle of the cases, from the commit to the answer in another process
ROUNDS, PARKED, PUTS = 20, 100, 40


@contextlib.contextmanager
def queue_with(**controller: Any) -> Iterator[EmbeddedRuntime]:
    storage = {"capacity_bytes": 1 << 23, "arena_bytes": 1 << 20, "total_storage_size": 1000}
    conf = {"runtime": "embedded", "controller": controller, "backend": {"SimpleStorage": storage}}
    runtime = EmbeddedRuntime(settings(merged(conf)))
    try:
        yield runtime
    finally:
        runtime.close()


def draw(client: TransferQueueClient, count: int, partition: str, **options: Any) -> BatchMeta:
    meta: BatchMeta = client.get_meta(["x"], count, partition, **{"task_name": "t", **options})
    return meta


def parked(client: TransferQueueClient, count: int) -> None:
    """Wait until so many requests are parked at the controller."""
    deadline = time.monotonic() + 30
    while client.audit()["waiting"] != count:
        assert time.monotonic() < deadline, client.audit()["waiting"]
        time.sleep(0.002)


@contextlib.contextmanager
def drawing(
    client: TransferQueueClient, *counts: int, partition: str, **options: Any
) -> Iterator[dict[int, list[int]]]:
    """Draws of so many rows, parked one after the other; yields the rows that each got, by its number."""
    found: dict[int, list[int]] = {}

    def run(number: int, count: int) -> None:
        found[number] = draw(client, count, partition, timeout=30, **options).global_indexes

    threads = []
    for number, count in enumerate(counts):
        threads.append(threading.Thread(target=run, args=(number, count)))
        threads[-1].start()
        parked(client, number + 1)
    yield found
    for thread in threads:
        thread.join(30)


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("polling", [True, False])
@pytest.mark.parametrize("timeout", [None, 0, 0.1])
def test_49_the_table(polling: bool, timeout: float | None) -> None:
    """Served: rows, at once. Unserved: nothing or an error, after no longer than was asked for."""
    default_s = 0.2
    with (
        queue_with(polling_mode=polling, get_meta_timeout_s=default_s) as queue,
        TransferQueueClient("c", queue.info, connector=queue) as client,
    ):
        client.put(batch(2), partition_id="p")
        begin = time.monotonic()
        assert draw(client, 2, "p", timeout=timeout).size == 2
        assert time.monotonic() - begin < 0.1
        begin = time.monotonic()
        if polling:
            meta = draw(client, 2, "p", timeout=timeout)
            assert meta.size == 0 and client.get_data(meta).batch_size == (0,)
        else:
            with pytest.raises(GetMetaTimeout, match="0 of 2"):
                draw(client, 2, "p", timeout=timeout)
        waited = time.monotonic() - begin
        expected = timeout if timeout is not None else 0.0 if polling else default_s
        assert expected <= waited < expected + 1.0


@pytest.mark.parametrize("timeout", [-1, -0.001, math.nan])
def test_49_no_such_timeout(client: TransferQueueClient, partition: str, timeout: float) -> None:
    for call in (
        lambda: draw(client, 1, partition, timeout=timeout),
        lambda: client.put(batch(1), partition_id=partition, timeout=timeout),
        lambda: client.kv_batch_get(["a"], partition, timeout=timeout),
    ):
        with pytest.raises(ValueError, match="timeout"):
            call()


def test_49_for_ever(client: TransferQueueClient, partition: str) -> None:
    """`math.inf` is allowed; rows end the wait."""

    async def run() -> int:
        waiting = asyncio.create_task(client.async_get_meta(["x"], 1, partition, task_name="t", timeout=math.inf))
        while client.audit()["waiting"] != 1:
            await asyncio.sleep(0.002)
        await client.async_put(batch(1), partition_id=partition)
        return (await waiting).size

    assert asyncio.run(run()) == 1


# ---------------------------------------------------------------- what wakes


def test_49_in_arrival_order_and_past_those_that_cannot_be_served(client: TransferQueueClient, partition: str) -> None:
    """A draw of many rows in front does not hold up smaller ones behind it."""
    with drawing(client, 50, 1, 2, 1, partition=partition) as found:
        first, second, *rest = [client.put(batch(1), partition_id=partition).global_indexes[0] for _ in range(4)]
        parked(client, 1)
        last = client.put(batch(50), partition_id=partition).global_indexes
    assert found == {0: last, 1: [first], 2: rest, 3: [second]}


def _release(client: TransferQueueClient, first: BatchMeta) -> None:
    client.release(first)


def _reset(client: TransferQueueClient, first: BatchMeta) -> None:
    client.reset_consumption(first.partition_ids[0], "t")


@pytest.mark.parametrize(("lease", "wake"), [(30.0, _release), (None, _reset)])
def test_49_rows_that_come_back_wake(
    client: TransferQueueClient, partition: str, lease: float | None, wake: Callable[..., None]
) -> None:
    """A release, or a reset of what the task consumed."""
    client.put(batch(2), partition_id=partition)
    first = draw(client, 2, partition, lease=lease)
    with drawing(client, 2, partition=partition) as found:
        wake(client, first)
    assert found[0] == first.global_indexes


def test_49_the_last_column_wakes(client: TransferQueueClient, partition: str) -> None:
    rows = client.get_meta(["x"], 2, partition, mode="insert", task_name="t")
    with drawing(client, 2, partition=partition) as found:
        client.put(batch(2), metadata=rows)
    assert found[0] == rows.global_indexes


def test_49_a_clear_wakes_a_put_that_waits_for_room() -> None:
    with queue_with() as queue, TransferQueueClient("c", queue.info, connector=queue) as client:
        full = client.put(batch(1000), partition_id="p")
        with pytest.raises(CapacityExceeded, match="capacity"):
            client.put(batch(1001), partition_id="p")  # never fits: at once
        begin = time.monotonic()
        with pytest.raises(CapacityExceeded, match="capacity"):
            client.put(batch(1), partition_id="p", timeout=0.1)
        assert 0.1 <= time.monotonic() - begin < 1.0
        later = threading.Timer(0.05, lambda: client.clear_samples(full))
        later.start()
        assert client.put(batch(2), partition_id="p", timeout=30).size == 2
        later.join()


# ---------------------------------------------------------------- with other processes


def _draws(info: ZMQServerInfo, partition: str) -> list[float]:
    """When each of its draws was answered; each waits for rows that are not there yet."""
    answered = []
    with TransferQueueClient("drawing", info) as client:
        for _ in range(ROUNDS):
            draw(client, 1, partition, timeout=30)
            answered.append(time.monotonic())
    return answered


def test_49_a_parked_draw_wakes_soon_after_the_commit(
    queue: EmbeddedRuntime, client: TransferQueueClient, partition: str
) -> None:
    """Measured from the return of the put to the return of the draw in another process, on one clock."""
    committed = []
    with working(_draws, [(queue.info, partition)]) as results:
        for _ in range(ROUNDS):
            parked(client, 1)
            client.put(batch(1), partition_id=partition)
            committed.append(time.monotonic())
        (answered,) = results()
    late = [there - here for there, here in zip(answered, committed, strict=True)]
    assert statistics.median(late) < WAKE_S, late


def _park_many(info: ZMQServerInfo, partition: str) -> int:
    """A hundred draws at once that are served only at the end."""
    with TransferQueueClient("parking", info) as client:

        async def run() -> int:
            draws = (
                client.async_get_meta(["x"], 1, f"{partition}_late", task_name=f"t{number}", timeout=60)
                for number in range(PARKED // 2)
            )
            blocked = (
                client.async_get_meta(["x"], 500, partition, task_name=f"t{number}", timeout=60)
                for number in range(PARKED // 2)
            )
            return sum(meta.size for meta in await asyncio.gather(*draws, *blocked))

        return asyncio.run(run())


def _time_of_a_put(client: TransferQueueClient, partition: str) -> float:
    times = []
    for _ in range(PUTS):
        begin = time.perf_counter()
        client.put(batch(1), partition_id=partition)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def test_49_parked_draws_slow_no_put(queue: EmbeddedRuntime, client: TransferQueueClient, partition: str) -> None:
    """Half of them wait for another partition, half for more rows of this one."""
    before = _time_of_a_put(client, partition)
    with working(_park_many, [(queue.info, partition)]) as results:
        parked(client, PARKED)
        during = _time_of_a_put(client, partition)
        assert during < 3 * before + 2e-3, (before, during)
        client.put(batch(500 - 2 * PUTS), partition_id=partition)
        client.put(batch(1), partition_id=f"{partition}_late")
        assert results() == [PARKED // 2 * 501]
    client.clear_partition(f"{partition}_late")


def _park_for_ever(info: ZMQServerInfo, partition: str) -> None:
    draw(TransferQueueClient("gone", info), 2, partition, timeout=math.inf)


def test_49_a_client_that_goes_away_takes_its_request_along(
    queue: EmbeddedRuntime, client: TransferQueueClient, partition: str
) -> None:
    """Killed while it waits: it consumes nothing of what comes then."""
    process = multiprocessing.get_context("forkserver").Process(target=_park_for_ever, args=(queue.info, partition))
    process.start()
    parked(client, 1)
    process.kill()
    process.join()
    process.close()
    parked(client, 0)
    client.put(batch(2), partition_id=partition)
    assert draw(client, 2, partition, timeout=0).size == 2
