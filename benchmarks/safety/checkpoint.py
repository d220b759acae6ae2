"""What a checkpoint takes: its time beside that of writing or reading a plain file, and the pauses that others see."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from benchmarks import batches
from benchmarks.control import BATCH, SAMPLE_VALUES, TASK
from benchmarks.figures import LONGER, Report
from benchmarks.safety.sides import WITHOUT, Sides, SideStage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

SAVE, LOAD = "save", "load"
WRITE, READ = "write of a plain file, synced", "read of a plain file"
GET_META, PUT = f"get_meta({BATCH})", "put of one 12 KiB sample"
PAUSE = "longest call"
PAUSE_AT_MOST_MS = 50.0  # beyond what copying the metadata takes

_SAVED, _PROBED, _OWN = "saved", "probed", "own"
_SMALL_VALUES = 64
_PUTS = 64  # of a partition before it is cleared
_SETTLE_S = 0.2  # between two saves

Call: TypeAlias = "tuple[str, float, float]"  # name, begin and end on the clock of the host


class Prober:
    """Draws and puts all the time, in a thread."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._calls: list[Call] = []

    def start(self) -> None:
        self._client.put({"x": torch.rand(16 * BATCH, 1)}, partition_id=_PROBED)
        self._over.clear()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> list[Call]:
        assert self._thread is not None
        self._over.set()
        self._thread.join()
        self._client.clear_partition(_PROBED)
        calls, self._calls = self._calls, []
        return calls

    def _run(self) -> None:
        sample = {"x": torch.zeros(1, SAMPLE_VALUES)}
        while not self._over.is_set():
            self._client.reset_consumption(_PROBED, TASK)
            for _ in range(_PUTS // 4):
                begin = time.monotonic()
                self._client.get_meta(["x"], BATCH, _PROBED, task_name=TASK)
                middle = time.monotonic()
                self._client.put(sample, partition_id=_OWN)
                self._calls += [(GET_META, begin, middle), (PUT, middle, time.monotonic())]
            self._client.clear_partition(_OWN)


@dataclass(frozen=True)
class _Content:
    """What is saved: a name, and how it gets into the queue."""

    name: str
    size_bytes: int
    batch: dict[str, torch.Tensor]
    puts: int

    def fill(self, client: TransferQueueClient) -> None:
        client.clear_partition(_SAVED)
        for _ in range(self.puts):
            client.put(self.batch, partition_id=_SAVED)


def _contents(scale: Scale) -> Iterator[_Content]:
    dense = batches.dense(scale)
    size = batches.size_bytes(dense)
    yield _Content(f"{size / 1e6:.0f} MB", size, {str(name): dense[name] for name in dense.keys()}, 1)  # noqa: SIM118
    puts = max(1, scale.recovered_samples[-1] // BATCH)
    batch = {"x": torch.rand(BATCH, _SMALL_VALUES)}
    yield _Content(f"{puts * BATCH:,} small samples", puts * batch["x"].nbytes, batch, puts)


def measure(report: Report, scale: Scale) -> None:
    """Add save and load of large and of many samples, on a disk."""
    with Sides({WITHOUT: {}}) as sides, tempfile.TemporaryDirectory(prefix="tq-benchmark-") as folder:
        client, prober = sides.client(WITHOUT), sides.stage(Prober)
        for content in _contents(scale):
            content.fill(client)
            _measure_alone(report, scale, client, Path(folder), content)
            _measure_pauses(report, scale, client, prober, Path(folder), content)


def _measure_alone(report: Report, scale: Scale, client: TransferQueueClient, folder: Path, content: _Content) -> None:
    """Save and load with nobody else about, in turn with files of the same bytes."""
    names = (SAVE, WRITE, LOAD, READ)
    series = {name: report.series(content.name, name, size_bytes=content.size_bytes, skip=1) for name in names}
    report.compare(content.name, SAVE, WRITE, [series[SAVE]], [series[WRITE]], LONGER)
    report.compare(content.name, LOAD, READ, [series[LOAD]], [series[READ]], LONGER)
    path, file = folder / "checkpoint", folder / "plain"
    for _ in range(1 + scale.checkpoints):
        series[SAVE].add(_timed(lambda: client.save_checkpoint(path)))
        size = sum(part.stat().st_size for part in path.iterdir())
        data = np.ones(size, np.uint8)
        series[WRITE].add(_timed(functools.partial(_write, file, data)))
        series[LOAD].add(_timed(lambda: client.load_checkpoint(path)))
        series[READ].add(_timed(file.read_bytes))
        file.unlink()
    shutil.rmtree(path)


def _measure_pauses(
    report: Report, scale: Scale, client: TransferQueueClient, prober: SideStage, folder: Path, content: _Content
) -> None:
    """What draws and puts of another process take while checkpoints are saved, and in between."""
    path = folder / "checkpoint"
    saves = []
    prober.call(WITHOUT, "start")
    time.sleep(_SETTLE_S)
    for _ in range(scale.checkpoints):
        begin = time.monotonic()
        client.save_checkpoint(path)
        saves.append((begin, time.monotonic()))
        time.sleep(_SETTLE_S)
    calls = prober.call(WITHOUT, "stop")
    shutil.rmtree(path)
    for name in (GET_META, PUT):
        during = report.series(f"{content.name}, {name}", "while a checkpoint is saved")
        between = report.series(f"{content.name}, {name}", "in between")
        for called, begin, end in calls:
            if called == name:
                saving = any(begin < saved and end > started for started, saved in saves)
                (during if saving else between).add(end - begin)
        for series in (during, between):
            if series.durations_s:
                report.quantity(series.case, f"{PAUSE}, {series.measure}", 1e3 * max(series.durations_s), "ms")


def _timed(do: Callable[[], object]) -> float:
    begin = time.perf_counter()
    do()
    return time.perf_counter() - begin


def _write(file: Path, data: np.ndarray) -> None:
    with file.open("wb") as out:
        out.write(data.data)
        out.flush()
        os.fsync(out.fileno())
