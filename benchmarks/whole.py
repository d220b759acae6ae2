"""Whole batches from a writer to a reader: put (commit included), draw, get to a view, every byte touched.

The writer puts a batch into a partition; the reader draws all its rows under a task of its own per way of reading, and
reads them. Bytes are counted once. What the reader read is compared with what was put after every round.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import batches, floors
from benchmarks.accounting import processes, watched
from benchmarks.figures import RATE, Report, Series
from benchmarks.placement import Stage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from tensordict import TensorDict

    from transfer_queue import BatchMeta, TransferQueueClient

PARTITION = "batch"
DRAW = "draw"
VIEW = "get to a view"
TOUCH = "touch every byte"
FETCH = "draw + get + touch"
TOTAL = "put + draw + get + touch"
OURS = "ours"
PUT_TO_MEMCPY = 0.6  # aimed at


@dataclass(frozen=True)
class Way:
    """How a reader reads: into memory of its own or through views, rows as they were put or at random, or verified."""

    name: str
    copy: bool = True
    shuffled: bool = False
    verify: bool = False


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
        self._batches: dict[str, TensorDict] = {}

    def prepare(self, name: str, scale: Scale) -> Facts:
        batch = self._batches[name] = batches.BATCHES[name](scale)
        fields = tuple(str(field) for field in batch.keys())  # noqa: SIM118  iterating yields rows
        return Facts(batch.batch_size[0], fields, batches.size_bytes(batch), batches.touch(batch))

    def put(self, name: str, parts: int = 1) -> float:
        """Put the batch, in so many calls of the same number of rows; return the seconds until all was committed."""
        batch = self._batches[name]
        rows = batch.batch_size[0] // parts
        pieces = [batch] if parts == 1 else [batch[part * rows : (part + 1) * rows] for part in range(parts)]
        begin = time.perf_counter()
        for piece in pieces:
            self._client.put(piece, partition_id=PARTITION)
        return time.perf_counter() - begin

    def clear(self) -> None:
        self._client.clear_partition(PARTITION)

    def forget(self) -> None:
        """Drop what was prepared."""
        self._batches.clear()


class Reader:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def read(self, facts: Facts, way: Way) -> tuple[float, ...]:
        """Return the seconds of draw, get and touch. Raises `ValueError` if other bytes come out than were put."""
        order = torch.randperm(facts.rows, generator=torch.Generator().manual_seed(0)).tolist()
        begin = time.perf_counter()
        meta = self._meta(facts, way.name)
        draw_s = time.perf_counter() - begin
        if way.shuffled:
            meta.reorder(order)
        times = [time.perf_counter()]
        batch = self._client.get_data(meta, copy=way.copy, verify=way.verify)
        times.append(time.perf_counter())
        checksums = batches.touch(batch)
        times.append(time.perf_counter())
        batches.check(checksums, facts.checksums)
        return draw_s, *(after - before for before, after in itertools.pairwise(times))

    def read_drawn(self, facts: Facts, rows: int) -> list[tuple[float, float]]:
        """Read the rows in random order, so many at a time; return the seconds of get and touch of each time.

        Raises `ValueError` as above.
        """
        order = torch.randperm(facts.rows, generator=torch.Generator().manual_seed(0)).tolist()
        meta = self._meta(facts, "drawn")
        meta.reorder(order)
        found = dict.fromkeys(facts.fields, 0)
        durations_s = []
        for part in meta.chunk(facts.rows // rows):
            begin = time.perf_counter()
            batch = self._client.get_data(part)
            got = time.perf_counter()
            checksums = batches.touch(batch)
            durations_s.append((got - begin, time.perf_counter() - got))
            found = {field: found[field] ^ checksum for field, checksum in checksums.items()}
        batches.check(found, facts.checksums)
        return durations_s

    def _meta(self, facts: Facts, task: str) -> BatchMeta:
        return self._client.get_meta(list(facts.fields), facts.rows, PARTITION, task_name=task)


class Reading:
    """The series of a way to read a batch, and of all steps together."""

    def __init__(
        self, report: Report, case: str, *, size_bytes: int, skip: int, draws: bool = True, **place: Any
    ) -> None:
        moving = {"size_bytes": size_bytes, "skip": skip, **place}
        roof = report.find(floors.CASE, floors.MEMCPY)
        draw = [report.series(case, DRAW, skip=skip, **place)] if draws else []
        self.steps = draw + [report.series(case, step, **moving) for step in (VIEW, TOUCH)]
        self.total: Series = report.series(case, TOTAL, against=roof, **moving)

    def add(self, put_s: float, durations_s: Sequence[float]) -> None:
        for series, duration_s in zip(self.steps, durations_s, strict=True):
            series.add(duration_s)
        self.total.add(put_s + sum(durations_s))


def measure(report: Report, scale: Scale, writer: Stage, reader: Stage, name: str) -> None:
    """Add a series per way of reading and step, and what the processes used."""
    facts: Facts = writer.call("prepare", name, scale)
    roof = report.find(floors.CASE, floors.MEMCPY)
    moving: dict[str, Any] = {"size_bytes": facts.size_bytes, "skip": scale.warm_up, "workload": name}
    puts = report.series(name, "put", against=roof, label=OURS, **moving)
    if roof is not None and name == "dense":
        report.compare(name, "put", floors.MEMCPY, [puts], [roof], RATE, at_least=PUT_TO_MEMCPY)
    readings = {way: Reading(report, f"{name}, {way.name}", label=f"{OURS}, {way.name}", **moving) for way in WAYS}
    rounds = scale.warm_up + scale.rounds
    with watched(processes({"writer": writer, "reader": reader})) as watch:
        for _ in range(rounds):
            put_s = writer.call("put", name)
            puts.add(put_s)
            for way, reading in readings.items():
                reading.add(put_s, reader.call("read", facts, way))
            writer.call("clear")
    writer.call("forget")
    watch.report(report, name, moved_bytes=(1 + len(WAYS)) * facts.size_bytes * rounds)
