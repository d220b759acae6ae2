"""Rows that go: cleared, dropped for a reason, or too old for the policy.

A row that falls out of the version window is dropped in the same step, unless

    somebody has it   it is under an open lease, or in the slice that a rank got of a data-parallel draw whose other
                      ranks are still waited for; it is dropped in the step that gives it back
    nobody waits      every task that asked for rows of its partition has consumed it: what was used is not lost, and is
                      there until it is cleared; if it would be pending again, for an old task or a new one, it is
                      dropped instead
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.drawing import Drawing
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.stirring import Stirred
from transfer_queue.ledger.table import ANY_GENERATION
from transfer_queue.ledger.versions import Versions

Int64s: TypeAlias = NDArray[np.int64]

CLEARED, QUARANTINED, STALE = "cleared", "quarantined", "stale"


class Removing:
    """Takes rows out, and settles the groups, leases and data-parallel draws that had them."""

    def __init__(self, rows: Rows, drawing: Drawing, versions: Versions, stirred: Stirred) -> None:
        self._rows = rows
        self._drawing = drawing
        self._leasing = drawing.leasing
        self._versions = versions
        self._stirred = stirred

    def remove(self, partition: Partition, rows: Int64s, reason: str) -> int:
        """End the life of rows; returns their number."""
        if len(rows):
            if reason != CLEARED:
                self._versions.forget(rows)
            self._rows.remove(partition, rows, reason)
            self._leasing.forget_rows(partition, lambda held: ~self._rows.table.fresh(*held))
            self._drawing.reserving.after_clear(partition)
        if partition.step is not None:
            self._stirred.window_freed = True
        self._stirred.stir(partition.name)
        return len(rows)

    def drop(self, partition: Partition, rows: Int64s, reason: str) -> None:
        """The same; their groups settle without them."""
        ordinals = partition.ordinals(rows)
        shrunk = partition.shrink_groups(rows)
        self.remove(partition, rows, reason)
        for group in shrunk:
            partition.recheck_group(group)
        partition.recheck_positions(ordinals)

    def quarantine(self, partition: Partition, rows: Int64s) -> None:
        """Rows that were given back too often are dropped; the partition remembers what they were."""
        if len(rows):
            partition.remember_quarantined(rows)
            self.drop(partition, rows, QUARANTINED)

    def clear(self, rows: Int64s, generations: Int64s | None) -> int:
        """Remove rows by name; those that are gone already are left out, whatever is in their slots now."""
        meant = np.full_like(rows, ANY_GENERATION) if generations is None else generations
        rows = np.unique(rows[self._rows.table.fresh(rows, meant)])
        for partition, positions in self._rows.owners(rows):
            self.remove(partition, rows[positions], CLEARED)
        return len(rows)

    def clear_keys(self, partition: Partition, keys: Iterable[str]) -> int:
        """Remove the rows that have one of these keys; returns their number."""
        rows = {partition.keys[key] for key in keys if key in partition.keys}
        return self.remove(partition, np.array(sorted(rows), np.int64), CLEARED)

    def drop_stale(self) -> int:
        """Drop the rows outside the version window that nobody has or is done with; returns their number."""
        count = 0
        for partition, _ in self._rows.owners(self._versions.beyond()):
            self._drawing.reserving.after_clear(partition)
        while len(rows := self._to_drop()):  # a slice that breaks may end the wait for the others
            count += len(rows)
            for partition, positions in self._rows.owners(rows):
                self._versions.count_stale(partition, rows[positions])
                self.drop(partition, rows[positions], STALE)
        return count

    def _to_drop(self) -> Int64s:
        rows = self._versions.beyond()
        if len(rows) == 0:
            return rows
        kept = np.zeros(len(rows), np.bool_)
        for partition, positions in self._rows.owners(rows):
            mine = rows[positions]
            kept[positions] = partition.used(mine) | np.isin(mine, self._in_hands(partition))
        return rows[~kept]

    def _in_hands(self, partition: Partition) -> Int64s:
        """The rows of a partition that somebody has and will settle."""
        held = [lease.rows.rows[lease.open] for lease in self._leasing.book.of_partition(partition.name)]
        for _, assignment in self._drawing.assignments.of_partition(partition.name):
            ranks = assignment.done.union(assignment.leased) if assignment.missing else ()
            held += [self._rows.table.alive(assignment.slice_of(rank)) for rank in ranks]
        return np.concatenate(held) if held else np.empty(0, np.int64)
