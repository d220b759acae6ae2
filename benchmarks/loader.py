"""A `StreamingDataLoader`: how long it takes from one micro-batch to the next, and that every sample comes once.

The first for a loop that asks for the next at once, so that it sees what a micro-batch costs all processes together,
and for one that computes in between, as trainers do, so that it sees how long they wait for data that is there. Workers
are forked, as a `DataLoader` does it by itself on Linux.

The second runs 4 ranks with 2 workers each, under leases. One rank is stopped in the middle and another takes its
place: what the first had drawn ahead has to come again, what it had handed out must not.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

import transfer_queue
from benchmarks.figures import Report
from benchmarks.placement import PATIENCE_S, Placement, Stage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

ROWS = 64  # of a micro-batch
ROW_BYTES = 16 << 10  # a micro-batch is 1 MiB
BATCH = 4 * ROWS
RANKS = 4
WORKERS = 2
LEASE_S = 60.0
STEP_S = 0.010  # of the loop that computes
NEXT = "to the next 1 MiB micro-batch"


@dataclass(frozen=True)
class Seen:
    """Numbers of the samples in the order in which they came, and the seconds between two micro-batches."""

    numbers: list[int]
    gaps_s: list[float]


class Rank:
    """Puts, and iterates as a trainer does."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def put(self, partition: str, rows: int, row_bytes: int) -> None:
        """Put numbered samples, and say that these are all."""
        step = max(BATCH, (64 << 20) // row_bytes)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            numbers = torch.arange(first, first + count)
            data = {"number": numbers, "values": numbers.unsqueeze(1).expand(-1, row_bytes // 8).contiguous()}
            self._client.put(data, partition_id=partition, is_last=first + count == rows)

    def consume(
        self, partition: str, workers: int, lease: float | None, most: int | None = None, step_s: float = 0.0
    ) -> Seen:
        """Iterate to the end, or over `most` micro-batches, and compute for `step_s` on each.

        Raises `ValueError` if a sample has other values than it was put with.
        """
        from transfer_queue.dataloader import StreamingDataLoader, StreamingDataset

        conf, fields = transfer_queue.init(), ["number", "values"]
        stream = StreamingDataset(
            conf, BATCH, ROWS, fields, partition, "trainer", 0, True, lease=lease, keep_batches=False
        )
        numbers: list[int] = []
        gaps_s = []
        context = "fork" if workers else None
        with closing(StreamingDataLoader(stream, num_workers=workers, multiprocessing_context=context)) as loader:
            pieces = iter(loader)
            with closing(pieces):  # type: ignore[type-var]  # a generator
                asked = time.perf_counter()
                for data, _ in islice(pieces, most):
                    gaps_s.append(time.perf_counter() - asked)
                    found = data["number"]
                    if (data["values"][:, 0] != found).any() or (data["values"][:, -1] != found).any():
                        raise ValueError(f"samples {found.tolist()} have other values than they were put with")
                    numbers += found.tolist()
                    _compute(step_s)
                    asked = time.perf_counter()
        return Seen(numbers, gaps_s)

    def clear(self, partition: str) -> None:
        self._client.clear_partition(partition)


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add the gaps between micro-batches of 1 MiB that are there, and the count of samples that came once."""
    one = placement.stage(Rank)
    rows = scale.loader_batches * BATCH
    for workers, step_s in itertools.product((0, WORKERS), (0.0, STEP_S)):
        case = case_of(workers, step_s)
        one.call("put", case, rows, ROW_BYTES)
        seen = one.call("consume", case, workers, None, None, step_s)
        one.call("clear", case)
        _check(seen.numbers, rows)
        series = report.series(case, NEXT)
        series.skip = min(8, len(seen.gaps_s) // 2)
        series.add(*seen.gaps_s)
    _count(report, scale, placement, one)


def case_of(workers: int, step_s: float) -> str:
    computing = f", {1e3 * step_s:.0f} ms of work in between" if step_s else ""
    return f"loader, {workers} workers{computing}"


def _compute(step_s: float) -> None:
    """Take so much time of a processor."""
    end = time.perf_counter() + step_s
    while time.perf_counter() < end:
        pass


def _count(report: Report, scale: Scale, placement: Placement, one: Stage) -> None:
    """Samples of 64 bytes; the rank that is stopped takes an eighth of its share before."""
    total, partition = scale.loader_samples, "counted"
    one.call("put", partition, total, 64)
    ranks = [placement.stage(Rank) for _ in range(RANKS)]
    began = time.perf_counter()
    stopped = ranks[0].begin("consume", partition, WORKERS, LEASE_S, max(1, total // ROWS // RANKS // 8))
    others = [rank.begin("consume", partition, WORKERS, LEASE_S) for rank in ranks[1:]]
    first = stopped.result(PATIENCE_S)
    successor = placement.stage(Rank).begin("consume", partition, WORKERS, LEASE_S)
    seen = [first, *(answer.result(PATIENCE_S) for answer in (*others, successor))]
    elapsed_s = time.perf_counter() - began
    one.call("clear", partition)
    _check([number for part in seen for number in part.numbers], total)
    case = f"loader, {RANKS} ranks × {WORKERS} workers, one restarted"
    report.quantity(case, "samples that came exactly once", total, "samples")
    report.quantity(case, "samples drawn, read and handed out", total / elapsed_s, "1/s")


def _check(numbers: list[int], total: int) -> None:
    counts = Counter(numbers)
    twice = [number for number, count in counts.items() if count > 1]
    if twice or len(counts) != total:
        raise ValueError(f"{total - len(counts)} of {total} samples did not come, {len(twice)} came more than once")
