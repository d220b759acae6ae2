"""Latencies of small calls, from processes other than the controller's (unless the runtime is embedded)."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from typing import TYPE_CHECKING, Any

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
WAKE_UPS = "wake-ups"  # the partition
FILL_ROWS = 1 << 14  # of one put
NEVER = "never put"  # the field that the crowd waits for

_PAUSE_S = 0.005  # between a wake-up and the next put: the reader asks and is parked in a fraction of it
_PARKED_S = 0.002
_WAIT_S = 20.0
_CROWD_S = 3600.0
_CROWD_TASKS = 100


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

    def put_steadily(self, partition: str, each: int) -> tuple[float, list[float]]:
        """Put samples in `IN_FLIGHT` chains of `each`; return the seconds in all, and those of each put."""
        begin = time.perf_counter()
        durations_s = asyncio.run(self._put_steadily(partition, each))
        elapsed_s = time.perf_counter() - begin
        self._client.clear_partition(partition)
        return elapsed_s, durations_s

    async def _put_steadily(self, partition: str, each: int) -> list[float]:
        chains = await asyncio.gather(*(self._chain(partition, each) for _ in range(IN_FLIGHT)))
        return [duration_s for chain in chains for duration_s in chain]

    async def _chain(self, partition: str, each: int) -> list[float]:
        sample = {"x": torch.zeros(1, SAMPLE_VALUES)}
        durations_s = []
        for _ in range(each):
            begin = time.perf_counter()
            await self._client.async_put(sample, partition_id=partition)
            durations_s.append(time.perf_counter() - begin)
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

    def reset(self, partition: str) -> None:
        """Give back all that was drawn."""
        self._client.reset_consumption(partition, TASK)


class Crowd:
    """Draws that wait for a field that nobody puts. They wait in an event loop in a thread of its own."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._waiting: list[concurrent.futures.Future[object]] = []

    def park(self, partition: str, count: int) -> None:
        """Return once `count` draws of `_CROWD_TASKS` tasks are parked at the controller."""
        parked = self._client.audit()["waiting"]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="crowd")
        self._thread.start()
        for number in range(count):
            task = f"crowd-{number % _CROWD_TASKS}"
            draw = self._client.async_get_meta(["x", NEVER], 1, partition, task_name=task, timeout=_CROWD_S)
            self._waiting.append(asyncio.run_coroutine_threadsafe(draw, self._loop))
        deadline = time.monotonic() + _WAIT_S
        while self._client.audit()["waiting"] < parked + count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count} draws are not parked after {_WAIT_S} s")
            time.sleep(_PARKED_S)

    def leave(self) -> None:
        """Withdraw all of them."""
        if self._loop is None or self._thread is None:
            return
        for one in self._waiting:
            one.cancel()
        asyncio.run_coroutine_threadsafe(_ended(self._loop), self._loop).result(_WAIT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._waiting, self._loop, self._thread = [], None, None


async def _ended(loop: asyncio.AbstractEventLoop) -> None:
    """Wait for all other tasks of a loop."""
    others = asyncio.all_tasks(loop) - {asyncio.current_task(loop)}
    await asyncio.gather(*others, return_exceptions=True)


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add a series per latency to the report."""
    writer, reader = placement.stage(Writer), placement.stage(Reader)
    _measure_draws(report, scale, writer, reader)
    beside = f"beside {_count(scale.partition_rows[-1])} samples"
    floor = report.find(floors.CASE, floors.UNIX_ROUND_TRIP)
    skip = scale.calls // 10
    single = report.series("put of one 12 KiB sample", beside, skip=skip, against=floor)
    single.add(*writer.call("put_samples", "single", scale.calls + skip))
    together = report.series("put of one 12 KiB sample", f"{IN_FLIGHT} in flight, per put", skip=scale.warm_up)
    together.add(*writer.call("put_together", "together", scale.warm_up + scale.rounds))
    _measure_steady_puts(report, scale, writer)
    floor = report.find(floors.CASE, floors.UNIX_ROUND_TRIP)
    measure_wake_ups(report, scale, writer, reader, "parked get_meta(1)", against=floor)
    crowd = placement.stage(Crowd)
    for partition, where in (("elsewhere", "elsewhere"), (WAKE_UPS, "for the same samples")):
        crowd.call("park", partition, scale.crowd)
        case = f"parked get_meta(1), {scale.crowd} others wait {where}"
        measure_wake_ups(report, scale, writer, reader, case, against=floor)
        crowd.call("leave")


def _measure_steady_puts(report: Report, scale: Scale, writer: Stage) -> None:
    for _ in range(1 + scale.warm_up):
        elapsed_s, durations_s = writer.call("put_steadily", "steadily", scale.steady_puts)
    case = "put of one 12 KiB sample"
    report.series(case, f"{IN_FLIGHT} in flight all the time").add(*durations_s)
    report.quantity(case, f"puts, {IN_FLIGHT} in flight all the time", len(durations_s) / elapsed_s, "1/s")


def _measure_draws(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    """One partition that grows from one size to the next."""
    against = report.find(floors.CASE, floors.UNIX_ROUND_TRIP)
    skip = scale.calls // 10
    present = 0
    for rows in scale.partition_rows:
        while present < rows:
            added = min(FILL_ROWS, rows - present)
            writer.call("fill", "draws", added)
            present += added
        series = report.series(f"get_meta({BATCH})", f"{_count(rows)} samples", skip=skip, against=against)
        series.add(*reader.call("draw", "draws", rows, scale.calls + skip))
        against = report.find(*_smallest(scale))


def _smallest(scale: Scale) -> tuple[str, str]:
    return f"get_meta({BATCH})", f"{_count(scale.partition_rows[0])} samples"


def measure_wake_ups(report: Report, scale: Scale, writer: Stage, reader: Stage, case: str, **options: Any) -> None:
    """Add two series, since the put began and since it returned.

    A call counts if the reader had been waiting when the put began.
    """
    skip = scale.wake_ups // 10
    calls = scale.wake_ups + skip
    since_begin = report.series(case, "since the put began", skip=skip, **options)
    since_end = report.series(case, "since the put returned", skip=skip, **{**options, "against": None})
    waiting = reader.begin("wait", WAKE_UPS, calls)
    puts = writer.call("complete", WAKE_UPS, calls)
    for (put_at, done_at), (asked_at, woken_at) in zip(puts, waiting.result(PATIENCE_S), strict=True):
        if asked_at + _PARKED_S < put_at:
            since_begin.add(woken_at - put_at)
            since_end.add(max(0.0, woken_at - done_at))
    writer.call("clear", WAKE_UPS)


def _count(rows: int) -> str:
    """1024 as 1k, 2^20 as 1M."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "k")):
        if rows % unit == 0:
            return f"{rows // unit}{name}"
    return str(rows)
