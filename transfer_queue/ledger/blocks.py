"""Which storage blocks are in use, and which became free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, LeaseExpired
from transfer_queue.messages import UNIT_SHIFT

Int64s: TypeAlias = NDArray[np.int64]


@dataclass
class Freed:
    """What one unit may reuse: whole blocks, and single slots of blocks that are still in use."""

    blocks: list[int] = field(default_factory=list)
    partial_blocks: list[Int64s] = field(default_factory=list)
    partial_slots: list[Int64s] = field(default_factory=list)


class BlockBook:
    """Counts the cells (row × field) that point into each block; a block is free when none does."""

    def __init__(self) -> None:
        self._cells: dict[int, int] = {}
        self._aborted: set[int] = set()
        self._freed: dict[int, Freed] = {}

    def __len__(self) -> int:
        return len(self._cells)

    def commit(self, block: int, cells: int) -> None:
        if cells:
            self._cells[block] = cells
        else:
            self._freed_at(block).blocks.append(block)

    def check_new(self, block: int) -> None:
        """Raise for a block that was put before, or given up because its writer was gone."""
        if block in self._cells:
            raise InvalidArgument(f"block {block} holds the data of an earlier put; every put needs a block of its own")
        if block in self._aborted:
            raise LeaseExpired(f"block {block} was given up: its writer was taken for dead; put again")

    def settle(self, blocks: Int64s) -> Int64s:
        """Which of these blocks are in use (1)? The others are refused from now on (0)."""
        committed = np.array([block in self._cells for block in blocks.tolist()], dtype=np.int64)
        self._aborted.update(blocks[committed == 0].tolist())
        return committed

    def overwrite(self, blocks: Int64s) -> None:
        """One cell of each entry was written anew elsewhere."""
        self._subtract(blocks)

    def clear(self, blocks: Int64s, slots: Int64s) -> None:
        """The rows behind these cells are gone, one entry per cell."""
        if len(blocks) == 0:
            return
        left = self._subtract(blocks)
        if len(left) == 0:
            return
        partial = np.isin(blocks, left)
        pairs = np.unique(np.stack([blocks[partial], slots[partial]], axis=1), axis=0)
        units = pairs[:, 0] >> UNIT_SHIFT
        for unit in np.unique(units).tolist():
            freed = self._freed_at(unit << UNIT_SHIFT)
            freed.partial_blocks.append(pairs[units == unit, 0])
            freed.partial_slots.append(pairs[units == unit, 1])

    def take_freed(self) -> dict[int, Freed]:
        """What became free since the last call, by unit number."""
        freed, self._freed = self._freed, {}
        return freed

    def _subtract(self, blocks: Int64s) -> Int64s:
        """Return the touched blocks that are still in use."""
        touched, counts = _counted(blocks)
        left = []
        for block, count in zip(touched.tolist(), counts.tolist(), strict=True):
            cells = self._cells[block] - count
            if cells:
                self._cells[block] = cells
                left.append(block)
            else:
                del self._cells[block]
                self._freed_at(block).blocks.append(block)
        return np.array(left, dtype=np.int64)

    def _freed_at(self, block: int) -> Freed:
        return self._freed.setdefault(block >> UNIT_SHIFT, Freed())


def _counted(blocks: Int64s) -> tuple[Int64s, Int64s]:
    """Return the distinct blocks, and how often each appears. Fast where cells of one block lie together."""
    starts = np.flatnonzero(np.diff(blocks, prepend=blocks[:1] - 1))
    lengths = np.diff(starts, append=len(blocks))
    distinct, which = np.unique(blocks[starts], return_inverse=True)
    counts = np.zeros(len(distinct), np.int64)
    np.add.at(counts, which, lengths)
    return distinct, counts
