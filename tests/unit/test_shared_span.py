"""Many puts at once share one span, and ask for the next one once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import torch

import transfer_queue
from benchmarks.accounting import unit_stats
from transfer_queue import TransferQueueClient
from transfer_queue.client.drivers import arun, run
from transfer_queue.client.steps import Operation, Wait
from transfer_queue.client.units import LARGEST_SPAN_BYTES, SHARED_SPAN_BYTES, SharedSpan

ARENA_BYTES = 2 * LARGEST_SPAN_BYTES
IN_FLIGHT = 64
ROUNDS = 4


@pytest.fixture
def client() -> Iterator[TransferQueueClient]:
    """One that reaches the servers over sockets, so that puts are in flight together."""
    conf = transfer_queue.init({"runtime": "embedded", "backend": {"SimpleStorage": {"arena_bytes": ARENA_BYTES}}})
    with TransferQueueClient("putter", conf.controller.zmq_info) as made:
        yield made
    transfer_queue.close()


async def put_together(client: TransferQueueClient) -> None:
    for _ in range(ROUNDS):
        sample = {"x": torch.zeros(1, 3072)}
        await asyncio.gather(*(client.async_put(sample, partition_id="p") for _ in range(IN_FLIGHT)))


def test_concurrent_puts_do_not_reserve_a_span_each(client: TransferQueueClient) -> None:
    """Where each of 64 puts reserved a span whenever one was full, 3 MB of samples took 64 MB and more."""
    asyncio.run(put_together(client))
    assert client.audit("p")["partitions"]["p"]["live"] == ROUNDS * IN_FLIGHT
    assert unit_stats()["bytes_arenas"] <= 2 * ARENA_BYTES


def test_a_span_that_never_comes_holds_nobody_up(client: TransferQueueClient) -> None:
    """If the put that asked for a span was abandoned, the others ask again."""
    client.put({"x": torch.zeros(1)}, partition_id="p")
    (unit,) = client._core.transfer.units._handles.values()
    unit.span.replace(None, None)
    assert unit.span.ask(None) is None  # as if by a put that never ends
    begin = time.monotonic()
    asyncio.run(put_together(client))
    client.put({"x": torch.zeros(1)}, partition_id="p")
    assert time.monotonic() - begin < 5.0
    assert client.audit("p")["partitions"]["p"]["live"] == 2 + ROUNDS * IN_FLIGHT


@pytest.mark.parametrize("done", [True, False])
def test_waiting_for_another_operation(done: bool) -> None:
    """Both drivers tell whether the future was done in time."""
    future: Future[None] = Future()
    if done:
        future.set_result(None)

    def operation() -> Operation[bool]:
        return (yield Wait(future, 0.01))

    assert run(operation()) is done
    assert asyncio.run(arun(operation())) is done


def test_a_writer_in_a_hurry_gets_larger_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each span that is filled quickly is followed by one of twice the size; after a pause it starts over."""
    span = SharedSpan(set())
    sizes = []
    for _ in range(6):
        span.replace(None, None)
        sizes.append(span.next_bytes)
    assert sizes == [SHARED_SPAN_BYTES << min(n, 3) for n in range(6)]
    later = time.monotonic() + 1.0
    monkeypatch.setattr(time, "monotonic", lambda: later)
    span.replace(None, None)
    assert span.next_bytes == SHARED_SPAN_BYTES
