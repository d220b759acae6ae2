"""One client object under many threads, loops and coroutines, as frameworks use it (checklist 40).

The processes imitate the agent loops, executors and call-by-call loops of the projects in the drop-in table; they do
not run those projects.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import transfer_queue as tq
from tests.dropin.columns import batch
from tests.dropin.processes import descriptors, in_processes, threads

CONF = {"runtime": "embedded", "layout": "jagged", "backend": {"SimpleStorage": {"capacity_bytes": 256 << 20}}}
PROCESSES, COROUTINES = 4, 1000
CALLS, THREADS = 200, 16
SPARE = 40  # descriptors and threads beside those of an idle process: connections that are kept for the next calls


@pytest.fixture
def conf() -> Iterator[Any]:
    tq.close()
    yield tq.init(CONF)
    tq.close()


def grown(before: tuple[int, int]) -> tuple[int, int]:
    """Descriptors and threads that are there now and were not then."""
    return descriptors() - before[0], threads() - before[1]


# ---------------------------------------------------------------- in other processes


async def _episode(name: str, partition: str, most: list[tuple[int, int]], before: tuple[int, int]) -> None:
    """What an agent loop does for one prompt: three puts, one of them of data."""
    await tq.async_kv_put(key=name, tag={"status": "running"}, partition_id=partition)
    fields = TensorDict({"responses": torch.full((1, 16), len(name)), "reward": torch.ones(1)}, batch_size=1)
    tags = [{"status": "success", "seq_len": 16}]
    await tq.async_kv_batch_put(keys=[f"{name}_0_0"], fields=fields, tags=tags, partition_id=partition)
    await tq.async_kv_put(key=name, tag={"status": "finished"}, partition_id=partition)
    most.append(grown(before))


def _agent_loop(conf: Any, number: int, partition: str) -> tuple[int, int]:
    """A thousand episodes at once on one loop; returns the most descriptors and threads above those at the start."""
    tq.init(conf)
    tq.kv_list(partition)
    before = descriptors(), threads()
    most: list[tuple[int, int]] = []

    async def run() -> None:
        await asyncio.gather(*(_episode(f"{number}-{row}", partition, most, before) for row in range(COROUTINES)))

    asyncio.run(run())
    tq.close()
    return max(files for files, _ in most), max(tasks for _, tasks in most)


def _one_loop_per_call(conf: Any, partition: str) -> tuple[int, int]:
    """Two hundred loops that live for one call each; returns what was left of them."""
    tq.init(conf)
    client = tq.get_client()

    async def call(row: int) -> None:
        meta = await client.async_put(data=batch(1, x=torch.tensor([row])), partition_id=partition)
        assert (await client.async_get_data(meta))["x"].tolist() == [row]

    asyncio.run(call(0))
    before = descriptors(), threads()
    for row in range(1, CALLS):
        asyncio.run(call(row))
    left = grown(before)
    tq.close()
    return left


def _sixteen_threads(conf: Any, partition: str) -> tuple[int, int]:
    """Each puts, reads and clears keys of its own; returns what is left when they have ended."""
    tq.init(conf)
    before = descriptors(), threads()
    most: list[tuple[int, int]] = []

    def work(number: int) -> None:
        keys = [f"{number}-{row}" for row in range(8)]
        for turn in range(10):
            tq.kv_batch_put(keys=keys, fields=batch(8, x=torch.full((8,), turn)), partition_id=partition)
            assert tq.kv_batch_get(keys=keys, partition_id=partition)["x"].tolist() == [turn] * 8
            most.append(grown(before))
        tq.kv_clear(keys=keys[4:], partition_id=partition)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    left = grown(before)
    tq.close()
    assert max(files for files, _ in most) <= SPARE + 2 * THREADS  # each may wait for the controller and for a unit
    assert max(tasks for _, tasks in most) <= SPARE + THREADS
    return left


def _blocking_calls_where_a_loop_runs(conf: Any, partition: str) -> list[int]:
    """They block the loop and end; coroutines of the same loop go on behind them."""
    tq.init(conf)
    client = tq.get_client()

    async def run() -> list[int]:
        later = asyncio.create_task(client.async_get_meta(["x"], 2, partition, task_name="t", timeout=30))
        await asyncio.sleep(0)
        client.put(batch(1), partition_id=partition)
        tq.kv_put("a", partition, {"x": torch.tensor([1])})
        data = client.get_data(await later)
        return [int(row.item()) for row in data["x"].unbind()]

    found = asyncio.run(run())
    tq.close()
    return found


# ---------------------------------------------------------------- tests


def test_40_a_thousand_coroutines_in_each_of_four_processes(conf: Any, partition: str) -> None:
    """All is there, in full, and the processes stay small while it comes."""
    found = in_processes(_agent_loop, [(conf, number, partition) for number in range(PROCESSES)])
    listing = tq.kv_list(partition)[partition]
    assert len(listing) == 2 * PROCESSES * COROUTINES
    prompts = {key: tag for key, tag in listing.items() if not key.endswith("_0_0")}
    assert all(tag == {"status": "finished"} for tag in prompts.values())
    data = tq.kv_batch_get([f"{key}_0_0" for key in prompts], partition, ["responses", "reward"])
    assert data["responses"].to_padded_tensor(0).tolist() == [[len(key)] * 16 for key in prompts]
    assert all(files <= SPARE and tasks <= SPARE for files, tasks in found), found


@pytest.mark.parametrize("pattern", [_one_loop_per_call, _sixteen_threads])
def test_40_descriptors_and_threads_stay_bounded(conf: Any, partition: str, pattern: Callable[..., Any]) -> None:
    """Whatever the number of loops and threads; other processes do the same at the same time."""
    found = in_processes(pattern, [(conf, f"{partition}-{number}") for number in range(2)])
    assert all(files <= SPARE and tasks <= SPARE for files, tasks in found), found
    for number in range(2):
        tq.get_client().clear_partition(f"{partition}-{number}")


def test_40_blocking_calls_in_a_running_loop(conf: Any, partition: str) -> None:
    assert in_processes(_blocking_calls_where_a_loop_runs, [(conf, partition)]) == [[0, 1]]


def test_40_the_same_in_the_process_that_has_the_queue(conf: Any, partition: str) -> None:
    """Threads, coroutines and a loop per call on one client, at the same time."""
    client = tq.get_client()
    before = descriptors(), threads()

    def loops(number: int) -> None:
        for row in range(20):
            asyncio.run(client.async_kv_put(f"loop-{number}-{row}", partition, tag={"n": row}))

    async def coroutines() -> None:
        puts = (client.async_kv_put(f"task-{row}", partition, {"x": torch.ones(2)}, {}) for row in range(COROUTINES))
        await asyncio.gather(*puts)
        client.kv_put("blocking", partition, tag={})

    workers = [threading.Thread(target=loops, args=(number,)) for number in range(10)]
    workers.append(threading.Thread(target=lambda: asyncio.run(coroutines())))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(tq.kv_list(partition)[partition]) == 200 + COROUTINES + 1
    left = grown(before)
    assert left[0] <= SPARE and left[1] <= SPARE, left
