"""One field of 2 GB and one above 4 GiB: put, get as a view, get as a copy; what is at both ends and at the 4 GiB line.

The writer has the data; the arena is one copy of it, the result of a default `get_data` another. Memory is reported as
multiples of the data: the private bytes of each process beyond those it had before (the writer's tensor is there
before), and what the arenas grew by, once for the host.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING

import torch

from benchmarks import floors
from benchmarks.accounting import processes, watched
from benchmarks.figures import Report
from benchmarks.placement import Placement
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

PARTITION = "large"
FIELD = "video"
ROWS = 4
WAYS = {"view": False, "copy": True}  # name: the argument `copy`

_LINE = 1 << 32


def pattern(size_bytes: int) -> torch.Tensor:
    """[ROWS, size_bytes / ROWS / 8] int64: each word is its own position, so that no two places look alike."""
    return torch.arange(size_bytes // (8 * ROWS) * ROWS).view(ROWS, -1)


def check(values: torch.Tensor, size_bytes: int) -> int:
    """Return the sum of all words. Raises `ValueError` if a word at an end or beside a 4 GiB line is wrong."""
    words = values.view(-1)
    count = size_bytes // (8 * ROWS) * ROWS
    if len(words) != count:
        raise ValueError(f"{len(words)} words came out, {count} were put")
    lines = range(_LINE // 8, count, _LINE // 8)
    for at in {0, count - 1, *lines, *(line - 1 for line in lines)}:
        if int(words[at]) != at:
            raise ValueError(f"word {at} of {count} is {int(words[at])}")
    return int(words.sum())


class Writer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._values = torch.empty(0)

    def prepare(self, size_bytes: int) -> int:
        """Make the data; return the sum of its words."""
        self._values = pattern(size_bytes)
        return check(self._values, size_bytes)

    def put(self) -> float:
        begin = time.perf_counter()
        self._client.put({FIELD: self._values}, partition_id=PARTITION)
        return time.perf_counter() - begin

    def clear(self) -> None:
        self._client.clear_partition(PARTITION)

    def forget(self) -> None:
        self._values = torch.empty(0)


class Reader:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def read(self, way: str, size_bytes: int, total: int) -> tuple[float, float]:
        """Return seconds of the get and of reading every byte. Raises `ValueError` if other words come out."""
        meta = self._client.get_meta([FIELD], ROWS, PARTITION, task_name=way)
        begin = time.perf_counter()
        batch = self._client.get_data(meta, copy=WAYS[way])
        middle = time.perf_counter()
        found = check(batch[FIELD], size_bytes)
        end = time.perf_counter()
        if found != total:
            raise ValueError(f"the words read as {way} sum up to {found}, not {total}")
        del batch
        gc.collect()
        return middle - begin, end - middle


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add put, get and touch of each size, first time and warm, and the memory of every process."""
    writer, reader = placement.stage(Writer), placement.stage(Reader)
    names = processes({"writer": writer, "reader": reader})
    roof = report.find(floors.CASE, floors.MEMCPY)
    for size in scale.large_bytes:
        case = f"one field of {size / 1e9:.3g} GB"
        total = writer.call("prepare", size)
        options = {"size_bytes": size, "skip": 1, "against": roof}
        puts = report.series(case, "put", **options)
        reads = {
            way: (report.series(case, f"get, {way}", **options), report.series(case, f"touch, {way}", **options))
            for way in WAYS
        }
        with watched(names, sample=True) as watch:
            for _ in range(1 + scale.large_rounds):
                puts.add(writer.call("put"))
                for way, (gets, touches) in reads.items():
                    get_s, touch_s = reader.call("read", way, size, total)
                    gets.add(get_s)
                    touches.add(touch_s)
                writer.call("clear")
        writer.call("forget")
        for name, private in watch.private_bytes.items():
            report.quantity(case, f"peak private memory beyond the start, {name}", private / size, "× the data")
        report.quantity(case, "arenas made, once for the host", watch.arena_bytes / size, "× the data")
        watch.report(report, case, moved_bytes=3 * size * (1 + scale.large_rounds))
