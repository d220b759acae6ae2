"""Batches from a writer to a reader: put (commit included), draw, get to a view, every byte touched.

The writer puts a batch into a partition; the reader draws all its rows under a task of its own per way of reading, and
reads them. Bytes are counted once. What the reader read is compared with what was put after every round.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from benchmarks import batches, floors
from benchmarks.figures import Report, Series
from benchmarks.placement import Placement, Stage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from tensordict import TensorDict

    from transfer_queue import TransferQueueClient

PARTITION = "batch"
STEPS = ("draw", "get to a view", "touch every byte")
TOTAL = "put + draw + get + touch"


@dataclass(frozen=True)
class Way:
    """How a reader reads: into memory of its own or through views, rows as they were put or at random."""

    name: str
    copy: bool = True
    shuffled: bool = False


WAYS = (Way("copied"), Way("copy=False", copy=False), Way("copied, rows at random", shuffled=True))


@dataclass(frozen=True)
class Facts:
    """What a writer has ready to put."""

    rows: int
    fields: tuple[str, ...]
    size_bytes: int
    checksums: dict[str, int]


class Writer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._batch: TensorDict | None = None

    def prepare(self, name: str, scale: Scale) -> Facts:
        batch = self._batch = batches.BATCHES[name](scale)
        fields = tuple(str(field) for field in batch.keys())  # noqa: SIM118  iterating yields rows
        return Facts(batch.batch_size[0], fields, batches.size_bytes(batch), batches.touch(batch))

    def put(self) -> float:
        """Return the seconds until the batch was committed."""
        begin = time.perf_counter()
        self._client.put(self._batch, partition_id=PARTITION)
        return time.perf_counter() - begin

    def clear(self) -> None:
        self._client.clear_partition(PARTITION)


class Reader:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def read(self, facts: Facts, way: Way) -> tuple[float, ...]:
        """Return the seconds of each of `STEPS`. Raises `ValueError` if other bytes come out than were put."""
        order = torch.randperm(facts.rows, generator=torch.Generator().manual_seed(0)).tolist()
        begin = time.perf_counter()
        meta = self._client.get_meta(list(facts.fields), facts.rows, PARTITION, task_name=way.name)
        draw_s = time.perf_counter() - begin
        if way.shuffled:
            meta.reorder(order)
        times = [time.perf_counter()]
        batch = self._client.get_data(meta, copy=way.copy)
        times.append(time.perf_counter())
        checksums = batches.touch(batch)
        times.append(time.perf_counter())
        if checksums != facts.checksums:
            wrong = [field for field in facts.fields if checksums.get(field) != facts.checksums[field]]
            raise ValueError(f"{way.name}: what was read differs from what was put in {wrong}")
        return draw_s, *(after - before for before, after in itertools.pairwise(times))


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add a series per batch, way of reading and step to the report."""
    writer, reader = placement.stage(Writer), placement.stage(Reader)
    for name in batches.BATCHES:
        _measure_batch(report, scale, name, writer, reader)


def _measure_batch(report: Report, scale: Scale, name: str, writer: Stage, reader: Stage) -> None:
    facts: Facts = writer.call("prepare", name, scale)
    options = {"size_bytes": facts.size_bytes, "skip": scale.warm_up}
    roof = report.find(floors.CASE, floors.MEMCPY)
    puts = report.series(name, "put", against=roof, **options)
    steps: dict[Way, list[Series]] = {}
    totals: dict[Way, Series] = {}
    for way in WAYS:
        case = f"{name}, {way.name}"
        draw = report.series(case, STEPS[0], skip=scale.warm_up)
        steps[way] = [draw, *(report.series(case, step, **options) for step in STEPS[1:])]
        totals[way] = report.series(case, TOTAL, against=roof, **options)
    for _ in range(scale.warm_up + scale.rounds):
        put_s = writer.call("put")
        puts.add(put_s)
        for way in WAYS:
            durations_s = reader.call("read", facts, way)
            for series, duration_s in zip(steps[way], durations_s, strict=True):
                series.add(duration_s)
            totals[way].add(put_s + sum(durations_s))
        writer.call("clear")
