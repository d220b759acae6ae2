"""Counts of everything, to be taken in small pieces: each costs whoever serves the queue little time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.drawing import Drawing
from transfer_queue.ledger.leases import Lease
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.table import NO_VERSION
from transfer_queue.ledger.versions import Versions
from transfer_queue.ledger.waiting import WaitingRoom
from transfer_queue.messages import UNIT_SHIFT

Int64s: TypeAlias = NDArray[np.int64]

SLOTS_AT_ONCE = 1 << 16
PARTITIONS_AT_ONCE = 32


class PartitionFigures(NamedTuple):
    """to_come   rows that the partition was said to get and did not
    produced  for each task that asked for rows, the share of the cells it asks for that are there, 0 to 1
    """

    name: str
    number: int
    to_come: int
    produced: dict[str, float]


class Slots(NamedTuple):
    """A copy of a stretch of the table: the number of each row's partition, its version, what tasks did with it."""

    partition: NDArray[np.int32]
    version: Int64s | None  # None: no row has one
    tasks: dict[str, tuple[NDArray[np.int8], NDArray[np.bool_]]]  # consumed, reserved


class Totals(NamedTuple):
    """What is known at once. `stale`, `ended` and `redelivered` only rise; after a restart some are counted again."""

    partitions: tuple[str, ...]
    next_number: int  # of a partition
    capacity: int  # slots of the table
    fields: tuple[str, ...]
    policy_version: int
    waiting: int
    leases: tuple[Lease, ...]  # those that are open
    stale: int
    ended: Counter[str]  # leases, by how
    redelivered: Counter[str]  # rows, by task


class WaitingFigures(NamedTuple):
    """Parked draws of a task that lack a field; "" if no field is missing, but rows are."""

    task: str
    missing: str
    draws: int
    since: float  # of the oldest


class Figures:
    """Read-only counts of the ledger."""

    def __init__(self, rows: Rows, drawing: Drawing, waiting: WaitingRoom, versions: Versions) -> None:
        self._rows = rows
        self._waiting = waiting
        self._versions = versions
        self._leases = drawing.leasing.book

    def totals(self) -> Totals:
        """O(partitions + open leases), some nanoseconds for each."""
        return Totals(
            partitions=tuple(self._rows.partitions),
            next_number=self._rows.next_number,
            capacity=self._rows.table.capacity,
            fields=tuple(self._rows.table.columns),
            policy_version=self._versions.current,
            waiting=len(self._waiting),
            leases=tuple(self._leases.open.values()),
            stale=self._versions.dropped,
            ended=self._leases.ended_by.copy(),
            redelivered=self._leases.redelivered.copy(),
        )

    def partitions(self, names: Sequence[str]) -> list[PartitionFigures]:
        """Of those of these partitions that are there. O(tasks × fields) for each."""
        known = (self._rows.partitions.get(name) for name in names)
        return [_figures(partition) for partition in known if partition is not None]

    def slots(self, start: int) -> Slots:
        """`SLOTS_AT_ONCE` rows of the table. O(tasks) copies."""
        table, part = self._rows.table, slice(start, start + SLOTS_AT_ONCE)
        version = table.version[part]
        return Slots(
            partition=table.partition[part].copy(),
            version=version.copy() if (version != NO_VERSION).any() else None,
            tasks={
                name: (task.consumed[part].copy(), task.reserved[part].copy()) for name, task in table.tasks.items()
            },
        )

    def units_of(self, field: str, start: int) -> Int64s:
        """[≤ SLOTS_AT_ONCE] for each slot the number of the unit that has this field of its row, 0 for none."""
        column = self._rows.table.columns.get(field)
        if column is None:
            return np.empty(0, np.int64)
        part = slice(start, start + SLOTS_AT_ONCE)
        return np.where(column.ready[part], column.block[part] >> UNIT_SHIFT, 0)

    def waiting_draws(self) -> list[WaitingFigures]:
        """Parked draws by task and missing field. A draw that lacks several fields counts for each of them."""
        kinds: dict[tuple[str, str, tuple[str, ...]], list[float]] = {}
        for waiting in self._waiting.all_draws():
            kind = (waiting.draw.task_name, waiting.partition, waiting.draw.fields)
            kinds.setdefault(kind, []).append(waiting.since)
        found: dict[tuple[str, str], list[float]] = {}
        for (task, name, fields), since in kinds.items():
            for field in _missing(self._rows.partitions.get(name), fields) or ("",):
                found.setdefault((task, field), []).extend(since)
        return [WaitingFigures(*key, len(since), min(since)) for key, since in found.items()]


class RowCounts:
    """Adds up what copies of the table say about some partitions. Needs no lock.

    oldest     [partitions] the lowest version of any row, `NEWEST` where no row has one
    consumed   by task, [partitions] rows; so is `reserved`
    """

    NEWEST = np.iinfo(np.int64).max

    def __init__(self, partitions: Sequence[PartitionFigures], next_number: int) -> None:
        self._size = len(partitions)
        self._places = np.full(next_number + 2, self._size, np.int64)  # by number + 1; ends for FREE and for later ones
        self._places[[partition.number + 1 for partition in partitions]] = np.arange(self._size)
        self.rows = self._none()
        self.oldest = np.full(self._size + 1, self.NEWEST)
        self.consumed: dict[str, Int64s] = {}
        self.reserved: dict[str, Int64s] = {}

    def add(self, slots: Slots) -> None:
        places = self._places.take(slots.partition + 1, mode="clip")
        self.rows += self._count(places)
        for task, (consumed, reserved) in slots.tasks.items():
            if task not in self.consumed:
                self.consumed[task], self.reserved[task] = self._none(), self._none()
            self.consumed[task] += self._count(places[consumed.view(np.bool_)])
            self.reserved[task] += self._count(places[reserved])
        if slots.version is not None:
            known = slots.version != NO_VERSION
            np.minimum.at(self.oldest, places[known], slots.version[known])

    def _count(self, places: Int64s) -> Int64s:
        return np.bincount(places, minlength=self._size + 1)

    def _none(self) -> Int64s:
        return np.zeros(self._size + 1, np.int64)  # and one for all others


class RowsAtUnits:
    """Counts the rows that have data at each of some units: a row counts once, however many fields it has there.

    `add` the units of one field after the other for the same slots, then `next_slots`. Needs no lock.
    """

    def __init__(self, units: Sequence[int]) -> None:
        self._units = list(units)
        self._places = np.full(max(units, default=0) + 2, len(units), np.int64)  # by number; 0 is no unit
        self._places[self._units] = np.arange(len(units))
        self._rows = np.zeros(len(units) + 1, np.int64)  # and one for all others
        self._seen = np.zeros((len(units) + 1, SLOTS_AT_ONCE), np.bool_)

    def add(self, units: Int64s) -> None:
        """`units`: as `Figures.units_of` returns them."""
        self._seen[self._places.take(units, mode="clip"), np.arange(len(units))] = True

    def next_slots(self) -> None:
        self._rows += np.count_nonzero(self._seen, axis=1)
        self._seen[:] = False

    def by_unit(self) -> dict[int, int]:
        return dict(zip(self._units, self._rows.tolist(), strict=False))


def _figures(partition: Partition) -> PartitionFigures:
    asked: dict[str, set[str]] = {}
    for task, fields in partition.ready:
        asked.setdefault(task, set()).update(fields)
    produced = {task: _produced(partition, asked.get(task) or partition.fields) for task in partition.accounts}
    return PartitionFigures(partition.name, partition.number, _to_come(partition), produced)


def _to_come(partition: Partition) -> int:
    return max(0, partition.expected - partition.inserted)


def _produced(partition: Partition, fields: Collection[str]) -> float:
    cells = (partition.live + _to_come(partition)) * len(fields)
    return sum(partition.fields[name].rows for name in fields if name in partition.fields) / cells if cells else 0.0


def _missing(partition: Partition | None, fields: Sequence[str]) -> list[str]:
    if partition is None:
        return list(fields)
    states = partition.fields
    return [name for name in fields if name not in states or states[name].rows < partition.live]
