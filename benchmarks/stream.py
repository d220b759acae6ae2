"""Trajectories that come one by one: many coroutines in several processes put them, consumers draw batches and read.

Each sample carries its number and the moment its put began. The consumers check every value; in the end every number
must have come out once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from benchmarks.accounting import processes, watched
from benchmarks.figures import Report
from benchmarks.placement import PATIENCE_S, Placement, Stage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

CASE = "stream"
TASK = "trainer"
BATCH = 64
CONSUMERS = 4
SAMPLE_VALUES = 3072  # float32: 12 KiB
FIELDS = ("trajectory", "number", "put_at")

_POSITIONS = torch.arange(SAMPLE_VALUES, dtype=torch.float32)
_WAIT_S = 60.0


@dataclass(frozen=True)
class Consumed:
    """What a consumer saw. Moments are on the clock of the host."""

    numbers: list[int]
    delays_s: list[float]  # per sample, from the begin of its put to the return of its draw
    durations_s: list[float]  # per batch, draw and get
    done_at: float


class Producer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def produce(self, partition: str, first: int, coroutines: int, each: int) -> tuple[float, list[float]]:
        """Put samples `first` … in `coroutines` chains; return when it began, and the seconds of each put."""
        return time.monotonic(), asyncio.run(self._produce(partition, first, coroutines, each))

    async def _produce(self, partition: str, first: int, coroutines: int, each: int) -> list[float]:
        chains = (self._chain(partition, range(first + n * each, first + (n + 1) * each)) for n in range(coroutines))
        return [duration_s for chain in await asyncio.gather(*chains) for duration_s in chain]

    async def _chain(self, partition: str, numbers: range) -> list[float]:
        durations_s = []
        for number in numbers:
            values = (_POSITIONS + number).unsqueeze(0)
            begin = time.perf_counter()
            sample = {
                "trajectory": values,
                "number": torch.tensor([number]),
                "put_at": torch.tensor([time.monotonic()], dtype=torch.float64),
            }
            await self._client.async_put(sample, partition_id=partition)
            durations_s.append(time.perf_counter() - begin)
        return durations_s


class Consumer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def consume(self, partition: str, batches: int) -> Consumed:
        """Draw and read. Raises `ValueError` if a sample has other values than it was put with."""
        numbers: list[int] = []
        delays_s: list[float] = []
        durations_s = []
        for _ in range(batches):
            begin = time.perf_counter()
            meta = self._client.get_meta(list(FIELDS), BATCH, partition, task_name=TASK, timeout=_WAIT_S)
            drawn_at = time.monotonic()
            batch = self._client.get_data(meta)
            durations_s.append(time.perf_counter() - begin)
            found = batch["number"]
            wrong = (batch["trajectory"] - found.unsqueeze(1) != _POSITIONS).any(dim=1)
            if wrong.any():
                raise ValueError(f"samples {found[wrong].tolist()} have other values than they were put with")
            numbers += found.tolist()
            delays_s += (drawn_at - batch["put_at"]).tolist()
        return Consumed(numbers, delays_s, durations_s, time.monotonic())

    def clear(self, partition: str) -> None:
        self._client.clear_partition(partition)


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add latencies, rates and the use of memory and processors; one small round before is warm-up."""
    producers = [placement.stage(Producer) for _ in range(scale.stream_producers)]
    consumers = [placement.stage(Consumer) for _ in range(CONSUMERS)]
    stages = {f"producer {n}": stage for n, stage in enumerate(producers)}
    stages |= {f"consumer {n}": stage for n, stage in enumerate(consumers)}
    names = processes(stages)
    _run(producers, consumers, "warm-up", scale.stream_coroutines, CONSUMERS)
    each = scale.stream_each
    with watched(names) as watch:
        began_at, puts_s, consumed = _run(producers, consumers, "stream", scale.stream_coroutines, each)
    case = f"{CASE}, {len(producers)} processes × {scale.stream_coroutines} coroutines"
    report.series(case, "put of one 12 KiB sample").add(*puts_s)
    report.series(case, "from put to draw").add(*(delay for one in consumed for delay in one.delays_s))
    report.series(case, f"draw and get of {BATCH}").add(*(duration for one in consumed for duration in one.durations_s))
    elapsed_s = max(one.done_at for one in consumed) - began_at
    report.quantity(case, "samples put, drawn and read", len(puts_s) / elapsed_s, "1/s")
    report.quantity(case, "samples compared", len(puts_s), "samples")
    watch.report(report, case, moved_bytes=2 * len(puts_s) * SAMPLE_VALUES * 4)


def _run(
    producers: list[Stage], consumers: list[Stage], partition: str, coroutines: int, each: int
) -> tuple[float, list[float], list[Consumed]]:
    """Let all of them work at once. Raises `ValueError` if a sample was lost or came twice."""
    share = coroutines * each
    total = share * len(producers)
    batches, rest = divmod(total, BATCH * len(consumers))
    if rest:
        raise ValueError(f"{total} samples cannot be shared by {len(consumers)} consumers in batches of {BATCH}")
    reading = [consumer.begin("consume", partition, batches) for consumer in consumers]
    writing = [
        producer.begin("produce", partition, n * share, coroutines, each) for n, producer in enumerate(producers)
    ]
    produced = [answer.result(PATIENCE_S) for answer in writing]
    consumed: list[Consumed] = [answer.result(PATIENCE_S) for answer in reading]
    numbers = np.sort(np.concatenate([one.numbers for one in consumed]))
    if not np.array_equal(numbers, np.arange(total)):
        raise ValueError(f"of {total} samples {len(np.unique(numbers))} came out, {len(numbers)} with repetitions")
    consumers[0].call("clear", partition)
    began_at = min(moment for moment, _ in produced)
    return began_at, [duration_s for _, durations_s in produced for duration_s in durations_s], consumed
