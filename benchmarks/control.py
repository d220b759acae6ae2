"""Latencies of small calls, from processes other than the controller's (unless the runtime is embedded)."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import torch

from benchmarks import floors
from benchmarks.figures import Report
from benchmarks.placement import PATIENCE_S, Placement, Stage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

BATCH = 64
TASK = "reader"
SAMPLE_VALUES = 3072  # float32: 12 KiB
IN_FLIGHT = 64

_FILL_ROWS = 1 << 14
_PAUSE_S = 0.005  # between a wake-up and the next put: the reader asks and is parked in a fraction of it
_PARKED_S = 0.002
_WAIT_S = 20.0


class Writer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def fill(self, partition: str, rows: int) -> None:
        """Add rows of one small field."""
        self._client.put({"x": torch.zeros(rows)}, partition_id=partition)

    def put_samples(self, partition: str, calls: int) -> list[float]:
        """Return the seconds of each put of one sample; the partition is cleared afterwards."""
        sample = {"x": torch.zeros(1, SAMPLE_VALUES)}
        durations_s = []
        for _ in range(calls):
            begin = time.perf_counter()
            self._client.put(sample, partition_id=partition)
            durations_s.append(time.perf_counter() - begin)
        self._client.clear_partition(partition)
        return durations_s

    def put_together(self, partition: str, rounds: int) -> list[float]:
        """Return for each round the seconds per put, of `IN_FLIGHT` puts started at once."""
        return asyncio.run(self._put_together(partition, rounds))

    async def _put_together(self, partition: str, rounds: int) -> list[float]:
        sample = {"x": torch.zeros(1, SAMPLE_VALUES)}
        durations_s = []
        for _ in range(rounds):
            begin = time.perf_counter()
            await asyncio.gather(*(self._client.async_put(sample, partition_id=partition) for _ in range(IN_FLIGHT)))
            durations_s.append((time.perf_counter() - begin) / IN_FLIGHT)
        await self._client.async_clear_partition(partition)
        return durations_s

    def complete(self, partition: str, calls: int) -> list[tuple[float, float]]:
        """Put one sample after the other; return when each put began and returned, on the clock of the host."""
        sample = {"x": torch.zeros(1, SAMPLE_VALUES)}
        moments = []
        for _ in range(calls):
            time.sleep(_PAUSE_S)
            begin = time.monotonic()
            self._client.put(sample, partition_id=partition)
            moments.append((begin, time.monotonic()))
        return moments

    def clear(self, partition: str) -> None:
        self._client.clear_partition(partition)


class Reader:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def draw(self, partition: str, rows: int, calls: int) -> list[float]:
        """Return the seconds of each draw of `BATCH` of `rows` samples; what was drawn is given back in between."""
        durations_s = []
        for call in range(calls):
            if call % (rows // BATCH) == 0:
                self._client.reset_consumption(partition, TASK)
            begin = time.perf_counter()
            self._client.get_meta(["x"], BATCH, partition, task_name=TASK)
            durations_s.append(time.perf_counter() - begin)
        return durations_s

    def wait(self, partition: str, calls: int) -> list[tuple[float, float]]:
        """Draw samples that come one by one; return when each call began and returned, on the clock of the host."""
        moments = []
        for _ in range(calls):
            begin = time.monotonic()
            self._client.get_meta(["x"], 1, partition, task_name=TASK, timeout=_WAIT_S)
            moments.append((begin, time.monotonic()))
        return moments


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add a series per latency to the report."""
    writer, reader = placement.stage(Writer), placement.stage(Reader)
    _measure_draws(report, scale, writer, reader)
    beside = f"beside {_count(scale.partition_rows[-1])} samples"
    floor = report.find(floors.CASE, floors.IPC_ROUND_TRIP)
    skip = scale.calls // 10
    single = report.series("put of one 12 KiB sample", beside, skip=skip, against=floor)
    single.add(*writer.call("put_samples", "single", scale.calls + skip))
    together = report.series("put of one 12 KiB sample", f"{IN_FLIGHT} in flight, per put", skip=scale.warm_up)
    together.add(*writer.call("put_together", "together", scale.warm_up + scale.rounds))
    _measure_wake_ups(report, scale, writer, reader)


def _measure_draws(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    """One partition that grows from one size to the next."""
    against = report.find(floors.CASE, floors.IPC_ROUND_TRIP)
    skip = scale.calls // 10
    present = 0
    for rows in scale.partition_rows:
        while present < rows:
            added = min(_FILL_ROWS, rows - present)
            writer.call("fill", "draws", added)
            present += added
        series = report.series(f"get_meta({BATCH})", f"{_count(rows)} samples", skip=skip, against=against)
        series.add(*reader.call("draw", "draws", rows, scale.calls + skip))
        against = report.find(*_smallest(scale))


def _smallest(scale: Scale) -> tuple[str, str]:
    return f"get_meta({BATCH})", f"{_count(scale.partition_rows[0])} samples"


def _measure_wake_ups(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    """A call counts if the reader had been waiting when the put began."""
    skip = scale.wake_ups // 10
    calls = scale.wake_ups + skip
    floor = report.find(floors.CASE, floors.IPC_ROUND_TRIP)
    since_begin = report.series("parked get_meta(1)", "since the put began", skip=skip, against=floor)
    since_end = report.series("parked get_meta(1)", "since the put returned", skip=skip)
    waiting = reader.begin("wait", "wake-ups", calls)
    puts = writer.call("complete", "wake-ups", calls)
    for (put_at, done_at), (asked_at, woken_at) in zip(puts, waiting.result(PATIENCE_S), strict=True):
        if asked_at + _PARKED_S < put_at:
            since_begin.add(woken_at - put_at)
            since_end.add(max(0.0, woken_at - done_at))
    writer.call("clear", "wake-ups")


def _count(rows: int) -> str:
    """1024 as 1k, 2^20 as 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if rows % unit == 0:
            return f"{rows // unit}{name}"
    return str(rows)
