"""Limits as their users meet them: puts wait for consumers, in order, and memory stays bounded."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer_queue as tq
from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.errors import CapacityExceeded
from transfer_queue.messages import GetUnitStats
from transfer_queue.metadata import BatchMeta
from transfer_queue.runtime.embedded import EmbeddedRuntime

WAIT_S = 20.0
ROW_BYTES = 40_000

Connect = Callable[..., TransferQueueClient]


@pytest.fixture(params=["in_process", "unix", "tcp"])
def limited(request: pytest.FixtureRequest) -> Iterator[Callable[..., Connect]]:
    """Starts a queue with limits; returns what makes clients of it."""
    opened: list[Any] = []

    def start(**limits: int) -> Connect:
        conf = merged({"runtime": "embedded", "limits": limits, "backend": {"SimpleStorage": {"arena_bytes": 4 << 20}}})
        runtime = EmbeddedRuntime(settings(conf))
        opened.append(runtime)

        def connect(name: str = "tester") -> TransferQueueClient:
            transport = "tcp" if request.param == "tcp" else "auto"
            connector = runtime if request.param == "in_process" else None
            client = TransferQueueClient(name, runtime.info, transport=transport, connector=connector)
            opened.append(client)
            return client

        return connect

    yield start
    for each in reversed(opened):
        each.close()


def rows(count: int) -> dict[str, torch.Tensor]:
    return {"x": torch.zeros(count, ROW_BYTES // 4)}


def waiting(client: TransferQueueClient, count: int) -> None:
    """Wait until so many puts wait."""
    deadline = time.monotonic() + WAIT_S
    while client.audit()["waiting"] < count:
        assert time.monotonic() < deadline, "nobody waits"
        time.sleep(0.005)


def stored(client: Any) -> int:
    unit = client._core.transfer.units.get(1)
    return int(unit.peer.begin(GetUnitStats()).result(WAIT_S).entries["bytes_live"])


def in_thread(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except CapacityExceeded as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, result


def test_a_put_waits_until_there_is_room(limited: Callable[..., Connect]) -> None:
    """Draws, acknowledgements, added fields and clears pass meanwhile; what waits holds no memory."""
    connect = limited(total_bytes=4 * ROW_BYTES + 4096)
    producer, consumer = connect("producer"), connect("consumer")
    first = producer.put(rows(4), partition_id="p")
    thread, result = in_thread(lambda: producer.put(rows(2), partition_id="p", timeout=WAIT_S))
    waiting(consumer, 1)
    assert stored(producer) < 5 * ROW_BYTES
    meta = consumer.get_meta(["x"], 2, "p", task_name="t", lease=30)
    consumer.put({"reward": torch.ones(2)}, metadata=meta)
    assert consumer.ack(meta) == 2 and not result
    consumer.clear_samples(meta)
    thread.join(WAIT_S)
    assert len(result[0]) == 2
    assert producer.get_data(BatchMeta.concat([first[2:], result[0]]))["x"].shape == (4, ROW_BYTES // 4)


def test_a_put_that_waits_in_vain(limited: Callable[..., Connect]) -> None:
    """At its deadline it says what is missing, who holds it, and leaves nothing behind."""
    connect = limited(total_bytes=4 * ROW_BYTES + 4096)
    holder, late = connect("holder"), connect("late")
    holder.put(rows(3), partition_id="p")
    live = stored(holder)
    with pytest.raises(CapacityExceeded, match=r"limits.total_bytes is .* held, .* too many") as caught:
        late.put(rows(2), partition_id="q", timeout=0.1)
    assert "partition 'p' holds" in str(caught.value) and "client 'holder' holds" in str(caught.value)
    assert caught.value.details["excess"] > 0
    assert stored(holder) == live and late.get_partition_list() == ["p"]
    assert len(late.put(rows(1), partition_id="q")) == 1


def test_a_put_that_can_never_fit(limited: Callable[..., Connect]) -> None:
    """It raises at once, whatever its timeout."""
    connect = limited(partition_bytes=4 * ROW_BYTES, producer_samples=100)
    client = connect()
    began = time.monotonic()
    with pytest.raises(CapacityExceeded, match=r"limits.partition_bytes is 160000"):
        client.put(rows(5), partition_id="p", timeout=WAIT_S)
    with pytest.raises(CapacityExceeded, match=r"101 samples exceeds .* limits.producer_samples is 100"):
        client.put({"i": torch.arange(101)}, partition_id="p", timeout=WAIT_S)
    assert time.monotonic() - began < WAIT_S / 2


def test_puts_pass_in_the_order_in_which_they_came(limited: Callable[..., Connect]) -> None:
    """A small put waits behind a large one of the same partition; others pass."""
    connect = limited(partition_samples=8)
    client = connect()
    client.put({"i": torch.arange(6)}, partition_id="p")
    order: list[str] = []
    threads = []
    for number, (name, count) in enumerate([("large", 8), ("small", 1), ("smaller", 1)], start=1):
        peer = connect(name)

        def put(peer: Any = peer, name: str = name, count: int = count) -> None:
            meta = peer.put({"i": torch.arange(count)}, partition_id="p", timeout=WAIT_S)
            order.append(name)
            peer.clear_samples(meta)

        threads.append(in_thread(put)[0])
        waiting(client, number)
    assert len(client.put({"i": torch.arange(8)}, partition_id="elsewhere")) == 8
    client.clear_samples(client.get_meta(["i"], 6, "p", task_name="t"))
    for thread in threads:
        thread.join(WAIT_S)
    assert order[0] == "large" and sorted(order[1:]) == ["small", "smaller"]


def test_many_puts_of_one_loop_share_a_limit(limited: Callable[..., Connect]) -> None:
    """64 at a time while one consumer empties the queue: all come through, and the limit holds at every moment."""
    connect = limited(total_samples=16, total_bytes=1 << 30)
    producer, consumer = connect("producer"), connect("consumer")
    most: list[int] = []

    async def produce() -> None:
        await asyncio.gather(*(producer.async_put({"i": torch.tensor([n])}, partition_id="p") for n in range(64)))

    def consume() -> list[int]:
        seen: list[int] = []
        while len(seen) < 64:
            with consumer.leased(["i"], 4, "p", task_name="t", timeout=WAIT_S) as (meta, data):
                most.append(consumer.get_meta([], 1, "p", mode="force_fetch").size)
                seen += data["i"].tolist()
            consumer.clear_samples(meta)
        return seen

    thread, result = in_thread(consume)
    asyncio.run(produce())
    thread.join(WAIT_S)
    assert sorted(result[0]) == list(range(64))
    assert max(most) <= 16


def test_a_cancelled_put_gives_its_place_and_its_bytes_back(limited: Callable[..., Connect]) -> None:
    """Those behind it go on; nothing of it is visible."""
    connect = limited(partition_samples=4)
    client, other = connect(), connect("other")
    client.put(rows(4), partition_id="p")
    live = stored(client)

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(client.async_put(rows(2), partition_id="p"), 0.1)

    asyncio.run(main())
    assert other.audit()["waiting"] == 0
    deadline = time.monotonic() + WAIT_S
    while stored(client) > live:
        assert time.monotonic() < deadline, "the block of a cancelled put is held"
        time.sleep(0.005)


# ---------------------------------------------------------------- memory

LIMIT_BYTES = 256 << 20

_WORKER = """
import sys, threading, time
import torch
import transfer_queue as tq

role, address, puts = sys.argv[1], sys.argv[2], int(sys.argv[3])
tq.init({"address": address})
client = tq.get_client()

data = {"x": torch.zeros(8, (1 << 20) // 32)}

def produce():
    for _ in range(puts // 4):
        client.put(data, partition_id="p")

def consume():
    for _ in range(puts):
        with client.leased(["x"], 8, "p", task_name="t") as (meta, data):
            time.sleep(0.005)
        del data
        client.clear_samples(meta)

print("ready", flush=True)
sys.stdin.readline()
if role == "producer":
    threads = [threading.Thread(target=produce) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
else:
    consume()
print("done", flush=True)
sys.stdin.readline()
tq.close()
"""


def memory(pid: int) -> tuple[int, int]:
    """(peak of the resident bytes including shared ones, shared resident bytes now) of a process."""
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return tuple(int(lines[name].split()[0]) << 10 for name in ("VmHWM", "RssShmem"))  # type: ignore[return-value]


def children() -> list[int]:
    return list(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_memory_stays_bounded_when_producers_are_faster(forked: Any) -> None:
    """One that could put ten times as fast as the consumer takes: no process grows beyond the limit and 15 %.

    What counts is resident memory, shared memory included, beyond what the process had before any traffic.
    """
    puts = 384
    before = set(children())
    conf = tq.init({"runtime": "processes", "limits": {"total_bytes": LIMIT_BYTES}})
    with contextlib.ExitStack() as ending:
        ending.callback(tq.close)
        servers = set(children()) - before
        workers = [
            ending.enter_context(forked(_WORKER, role, conf.address, str(puts))) for role in ("producer", "consumer")
        ]
        for worker in workers:
            assert worker.stdout.readline() == "ready\n"
        processes = [*servers, *(worker.pid for worker in workers)]
        at_rest = {pid: peak - shared for pid, (peak, shared) in ((pid, memory(pid)) for pid in processes)}
        for worker in workers:
            print(file=worker.stdin, flush=True)
        for worker in workers:
            assert worker.stdout.readline() == "done\n"
        growth = {pid: memory(pid)[0] - at_rest[pid] for pid in processes}
        assert len(servers) == 2 and max(growth.values()) <= 1.15 * LIMIT_BYTES, growth
        assert min(growth[worker.pid] for worker in workers) > 0.8 * LIMIT_BYTES, "the limit was not reached"
        for worker in workers:
            worker.communicate("\n", timeout=WAIT_S)
        account = tq.get_client().audit("p")["partitions"]["p"]
        assert (account["inserted"], account["tasks"]["t"]["consumed"]) == (8 * puts, 8 * puts)
