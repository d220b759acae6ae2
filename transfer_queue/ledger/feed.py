"""The change feed: which keys changed after a moment, and which are gone since.

Changes are numbered. Each row has the number of its last change, a bounded ring has the latest removals. None of this
is part of the state: a ledger that was loaded or started again begins a new epoch with numbers of its own.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.table import RowTable

if TYPE_CHECKING:
    from transfer_queue.ledger.partition import Partition

Int64s: TypeAlias = NDArray[np.int64]

RING = 1 << 16  # removals that are remembered

_NO_KEY = -1


class Removal(NamedTuple):
    """A key that is gone: when it went and when it came, by number of the change."""

    number: int
    created: int
    partition: str
    key: str


class Feed:
    """Numbers the changes of rows with keys, and collects those of watched partitions until they are taken."""

    def __init__(self, table: RowTable) -> None:
        self.life = ""  # names this life of the controller among all
        self.dirty: dict[str, list[Int64s]] = {}  # rows that changed, by watched partition
        self.shrunk: set[str] = set()  # watched partitions that lost keys
        self.stirred: set[str] = set()  # the partitions that have such rows
        self.anew: set[str] = set()  # watched partitions of which nothing is as it was
        self._table = table
        self._number = 0
        self._epoch = 0
        self._changed = np.zeros(0, np.int64)  # by row; 0: not in this epoch
        self._created = np.zeros(0, np.int64)  # by row; 0: before this epoch
        self._removals: deque[Removal] = deque()
        self._forgotten = 0  # number of the last removal that fell out of the ring

    def __repr__(self) -> str:
        return f"<Feed at {self.cursor!r}: {len(self._removals)} removals known>"

    # ------------------------------------------------------------ what happens

    def touch(self, partition: Partition, rows: Int64s) -> None:
        """Rows were inserted, tagged or written, or lost fields."""
        self._next()
        self._changed[rows] = self._number
        self._created[rows[self._created[rows] == _NO_KEY]] = self._number
        self._note(partition.name, rows)

    def remove(self, partition: Partition, rows: Int64s) -> None:
        """Rows are about to go."""
        if partition.keys:
            self._next()
            self._remember(partition, rows)
            if partition.name in self.dirty:
                self.shrunk.add(partition.name)
            self._note(partition.name, rows)
        if len(self._changed):
            known = rows[rows < len(self._changed)]
            self._changed[known] = 0
            self._created[known] = _NO_KEY

    def begin_again(self) -> None:
        """The table was filled anew."""
        self._epoch += 1
        self._number = self._forgotten = 0
        self._removals.clear()
        self._changed, self._created = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self._reach()
        self._created[np.fromiter(self._table.keys, np.int64)] = 0
        self.anew.update(self.dirty)
        self.stirred.update(self.dirty)

    # ------------------------------------------------------------ what happened

    @property
    def cursor(self) -> str:
        """Names this moment."""
        return f"{self._prefix}{self._number}"

    def read(self, cursor: str) -> int | None:
        """The number of the last change before a cursor; None if what followed is not known (any more)."""
        number = cursor.removeprefix(self._prefix)
        if number == cursor or not (number.isascii() and number.isdecimal()) or len(number) > 18:
            return None
        return int(number) if self._forgotten <= int(number) <= self._number else None

    def changed_after(self, number: int) -> Int64s:
        """Rows that are there and changed, in the order in which they did."""
        rows = np.flatnonzero(self._changed > number)
        return rows[np.argsort(self._changed[rows], kind="stable")]

    def has_changed(self, row: int, number: int) -> bool:
        """Whether the row changed after that."""
        return row < len(self._changed) and bool(self._changed[row] > number)

    def removed_after(self, number: int, partition: str | None) -> list[Removal]:
        """Keys that were there at that number and went after it, of one partition or of all, in order."""
        found = []
        for removal in reversed(self._removals):
            if removal.number <= number:
                break
            if removal.created <= number and partition in (None, removal.partition):
                found.append(removal)
        return found[::-1]

    # ------------------------------------------------------------ inside

    @property
    def _prefix(self) -> str:
        return f"{self.life}.{self._epoch}."

    def _remember(self, partition: Partition, rows: Int64s) -> None:
        if len(rows) >= RING:
            self._removals.clear()
            self._forgotten = self._number
            return
        keys = self._table.keys
        for row, created in zip(rows.tolist(), self._created[rows].tolist(), strict=True):
            if row in keys:
                self._removals.append(Removal(self._number, created, partition.name, keys[row]))
        while len(self._removals) > RING:
            self._forgotten = self._removals.popleft().number

    def _next(self) -> None:
        self._number += 1
        if len(self._changed) < self._table.capacity:
            self._reach()

    def _reach(self) -> None:
        more = self._table.capacity - len(self._changed)
        self._changed = np.concatenate([self._changed, np.zeros(more, np.int64)])
        self._created = np.concatenate([self._created, np.full(more, _NO_KEY, np.int64)])

    def _note(self, partition: str, rows: Int64s) -> None:
        known = self.dirty.get(partition)
        if known is not None:
            known.append(rows)
            self.stirred.add(partition)
