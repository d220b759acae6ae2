"""The ready rows of one (partition, task, field set), kept up to date by what changes, never by a scan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.bits import OrderedBits
from transfer_queue.ledger.groups import GroupIndex
from transfer_queue.samplers import ReadyView

if TYPE_CHECKING:
    from transfer_queue.ledger.partition import Partition

Int64s: TypeAlias = NDArray[np.int64]

_NOTHING: Int64s = np.empty(0, dtype=np.int64)


class ReadySet:
    """Rows that have every field of the set and are neither consumed nor reserved by the task."""

    def __init__(self, partition: Partition, task: str, fields: tuple[str, ...]) -> None:
        self.partition = partition
        self.task = task
        self.fields = frozenset(fields)
        self._bits = OrderedBits()
        self._groups: dict[int, GroupIndex] = {}

    def __len__(self) -> int:
        return self._bits.total

    def add(self, ordinals: Int64s) -> None:
        self._tell_groups(self._bits.add(ordinals - self.partition.base), 1)

    def add_new(self, ordinals: Int64s) -> None:
        """The same for rows that were just inserted, whose ordinals follow each other."""
        begin = int(ordinals[0]) - self.partition.base
        self._bits.add_range(begin, begin + len(ordinals))
        if self._groups:
            self._tell_groups(ordinals - self.partition.base, 1)

    def discard(self, ordinals: Int64s) -> None:
        self._tell_groups(self._bits.discard(ordinals - self.partition.base), -1)

    def holds(self, rows: Int64s) -> NDArray[np.bool_]:
        """[n] bool: the row is ready, and of this partition."""
        return self.partition.owns(rows) & self._bits.contains(self.partition.ordinals(rows) - self.partition.base)

    def first(self, count: int) -> Int64s:
        """Global indexes of the first `count` ready rows in allocation order, or of all."""
        return self.partition.indexes[self._bits.first(count)]

    def groups(self, size: int) -> GroupIndex:
        """The index of complete groups; made by one scan at its first use, incremental from then on."""
        index = self._groups.get(size)
        if index is None:
            index = self._groups[size] = GroupIndex(self.partition.groups, size, self.partition.base)
            positions = self._bits.first(self._bits.total)
            if len(positions):
                index.change(positions + self.partition.base, self.partition.group_numbers(positions), 1)
        return index

    def group_indexes(self) -> list[GroupIndex]:
        return list(self._groups.values())

    def _tell_groups(self, positions: Int64s, step: int) -> None:
        if len(positions) == 0:
            return
        for index in self._groups.values():
            index.change(positions + self.partition.base, self.partition.group_numbers(positions), step)


class RowsView(ReadyView):
    """The ready rows, as samplers see them. `given`: the last array that was handed out, distinct ready rows."""

    def __init__(self, ready: ReadySet) -> None:
        self.given: Int64s = _NOTHING
        self._ready = ready

    def __len__(self) -> int:
        return len(self._ready)

    @property
    def partition(self) -> Partition:
        return self._ready.partition

    def holds(self, rows: Int64s) -> NDArray[np.bool_]:
        """[n] bool: the row is in this view."""
        return self._ready.holds(rows)

    @overload
    def __getitem__(self, key: int) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> Any: ...
    def __getitem__(self, key: int | slice) -> Any:
        if isinstance(key, slice):
            stop = len(self) if key.stop is None or key.stop < 0 or (key.start or 0) < 0 else key.stop
            return self._give(self._first(stop)[key])
        position = key if key >= 0 else key + len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"position {key} of {len(self)} ready rows")
        return int(self._first(position + 1)[position])

    def groups(self, count: int, size: int) -> tuple[int, Int64s]:
        found, rows = self._rows_of_groups(count, size)
        return found, self._give(rows)

    def _rows_of_groups(self, count: int, size: int) -> tuple[int, Int64s]:
        found, ordinals = self._ready.groups(size).first(count)
        if not found:
            return 0, np.empty(0, dtype=np.int64)
        return found, self.partition.rows_at(np.concatenate(ordinals))

    def _give(self, rows: Int64s) -> Int64s:
        rows.flags.writeable = False
        self.given = rows
        return rows

    def _first(self, count: int) -> Int64s:
        return self._ready.first(count)


class GroupHeadsView(RowsView):
    """One row per complete group, its first; lets a sampler that knows no groups choose among groups.

    `groups` hands out whole groups here too, which are no rows of this view.
    """

    def __init__(self, ready: ReadySet, size: int) -> None:
        super().__init__(ready)
        self._size = size

    def __len__(self) -> int:
        return self._ready.groups(self._size).total

    def holds(self, rows: Int64s) -> NDArray[np.bool_]:
        found = self._ready.holds(rows)
        inside = rows[found]
        ordinals = self.partition.ordinals(inside)
        positions = ordinals - self.partition.base
        found[found] = self._ready.groups(self._size).leads(ordinals, self.partition.group_numbers(positions))
        return found

    def groups(self, count: int, size: int) -> tuple[int, Int64s]:
        return self._rows_of_groups(count, size)

    def _first(self, count: int) -> Int64s:
        _, ordinals = self._ready.groups(self._size).first(count)
        return self.partition.rows_at(np.array([rows[0] for rows in ordinals], dtype=np.int64))
