"""A `StreamingDataLoader`: how long it takes from one micro-batch to the next, and that every sample comes once.

The second runs 4 ranks with 2 workers each, under leases. One rank is stopped in the middle and another takes its
place: what the first had drawn ahead has to come again, what it had handed out must not.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Seen:
    """Numbers of the samples in the order in which they came, and the seconds between two micro-batches."""

    numbers: list[int]
    gaps_s: list[float]


class Rank:
    """Trains on nothing: it asks for the next micro-batch at once."""

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

    def consume(self, partition: str, workers: int, lease: float | None, most: int | None = None) -> Seen:
        """Iterate to the end, or over `most` micro-batches. Raises `ValueError` if a sample has other values."""
        from transfer_queue.dataloader import StreamingDataLoader, StreamingDataset

        conf, fields = transfer_queue.init(), ["number", "values"]
        stream = StreamingDataset(
            conf, BATCH, ROWS, fields, partition, "trainer", 0, True, lease=lease, keep_batches=False
        )
        numbers: list[int] = []
        gaps_s = []
        with closing(StreamingDataLoader(stream, num_workers=workers)) as loader:
            pieces = iter(loader)
            with closing(pieces):  # type: ignore[type-var]  # a generator
                asked = time.perf_counter()
                for data, _ in islice(pieces, most):
                    gaps_s.append(time.perf_counter() - asked)
                    found = data["number"]
                    if (data["values"][:, 0] != found).any() or (data["values"][:, -1] != found).any():
                        raise ValueError(f"samples {found.tolist()} have other values than they were put with")
                    numbers += found.tolist()
                    asked = time.perf_counter()
        return Seen(numbers, gaps_s)

    def clear(self, partition: str) -> None:
        self._client.clear_partition(partition)


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add the gaps between micro-batches of 1 MiB that are there, and the count of samples that came once."""
    one = placement.stage(Rank)
    rows = scale.loader_batches * BATCH
    for workers in (0, WORKERS):
        partition = f"gaps, {workers} workers"
        one.call("put", partition, rows, ROW_BYTES)
        seen = one.call("consume", partition, workers, None)
        one.call("clear", partition)
        _check(seen.numbers, rows)
        series = report.series(f"loader, {workers} workers", "to the next 1 MiB micro-batch")
        series.skip = min(8, len(seen.gaps_s) // 2)
        series.add(*seen.gaps_s)
    _count(report, scale, placement, one)


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
