"""Which storage blocks are in use, and what units are told to reuse."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger.refused import Refused
from transfer_queue.messages import UNIT_SHIFT, FreeBlocks

Int64s: TypeAlias = NDArray[np.int64]

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass
class Freed:
    """What one unit may reuse: whole blocks, and single slots of blocks that are still in use."""

    blocks: list[int] = field(default_factory=list)
    partial_blocks: list[Int64s] = field(default_factory=list)
    partial_slots: list[Int64s] = field(default_factory=list)

    def order(self, sequence: int) -> FreeBlocks:
        return FreeBlocks(
            sequence=sequence,
            blocks=np.array(self.blocks, dtype=np.int64),
            partial_blocks=np.concatenate([_NOTHING, *self.partial_blocks]),
            partial_slots=np.concatenate([_NOTHING, *self.partial_slots]),
        )


@dataclass
class Orders:
    """What one unit was told to reuse and has not confirmed yet."""

    sequence: int = 0
    unconfirmed: deque[FreeBlocks] = field(default_factory=deque)


class BlockBook:
    """Counts the cells (row × field) that point into each block; a block is free when none does.

    What became free since the last `close_orders` makes one order for each unit, which is sent until it is confirmed.
    """

    def __init__(self) -> None:
        self.cells: dict[int, int] = {}
        self.put: dict[int, tuple[int, int]] = {}  # (rows, cells) of a block when it was put
        self.refused = Refused()
        self._freed: dict[int, Freed] = {}
        self.orders: dict[int, Orders] = {}
        self._unsent: list[tuple[int, FreeBlocks]] = []
        self.copied = False  # somebody copies the blocks of a cut: nothing may be reused meanwhile

    def __len__(self) -> int:
        return len(self.cells)

    def commit(self, block: int, rows: int, columns: int) -> None:
        cells = rows * columns
        if cells:
            self.cells[block] = cells
            self.put[block] = (rows, cells)
        else:
            self._freed_at(block).blocks.append(block)

    def check_new(self, block: int) -> None:
        """Raise for a block that was put before (`InvalidArgument`), or that is refused (`BlockLost`)."""
        if block in self.cells:
            raise InvalidArgument(f"block {block} holds the data of an earlier put; every put needs a block of its own")
        self.refused.check(block)

    def settle(self, blocks: Int64s) -> Int64s:
        """Which of these blocks are in use (1)? The others are refused from now on (0)."""
        committed = self.holds(blocks)
        self.refused.lose(blocks[committed == 0].tolist())
        return committed

    def holds(self, blocks: Int64s) -> Int64s:
        """[n] 0/1: which of these blocks are in use."""
        return np.array([block in self.cells for block in blocks.tolist()], dtype=np.int64)

    def held(self, blocks: Int64s) -> Int64s:
        """[n] which of these blocks are in use (1), are not (0), and never will be (-1)."""
        found = (1 if block in self.cells else -self.refused.has(block) for block in blocks.tolist())
        return np.fromiter(found, np.int64)

    def of_unit(self, unit: int) -> Int64s:
        """The blocks in use that lie at a unit."""
        return np.array([block for block in self.cells if block >> UNIT_SHIFT == unit], dtype=np.int64)

    def partly_used(self, blocks: Int64s) -> dict[int, int]:
        """Blocks to which fewer cells point than were put, with the number of rows they were put with."""
        found = {block: self.put[block] for block in blocks.tolist() if block in self.cells}
        return {block: rows for block, (rows, cells) in found.items() if self.cells[block] < cells}

    def free(self, blocks: Int64s) -> None:
        """Nothing points to these blocks any more, and their cells are counted nowhere."""
        for block in blocks.tolist():
            self._freed_at(block).blocks.append(block)
        self.close_orders()

    def lose(self, blocks: Int64s) -> None:
        """The bytes of these blocks are gone; there is nothing to free, and nobody can put them again."""
        for block in blocks.tolist():
            del self.cells[block], self.put[block]
        self.refused.lose(blocks.tolist())

    def given_up(self, unit: int) -> bool:
        """Whether all that a unit stores counts as lost."""
        return unit in self.refused.units

    def lose_unit(self, unit: int, *, for_good: bool) -> None:
        """Nothing of a unit is in use any more, and nothing that was written to it so far ever will be."""
        self.refused.lose_unit(unit, for_good=for_good)
        if for_good:
            self.orders.pop(unit, None)

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

    def close_orders(self) -> None:
        """One change is complete: what it freed becomes an order."""
        if not self._freed:
            return
        freed, self._freed = self._freed, {}
        for unit, what in freed.items():
            orders = self.orders.setdefault(unit, Orders())
            orders.sequence += 1
            order = what.order(orders.sequence)
            orders.unconfirmed.append(order)
            self._unsent.append((unit, order))

    def take_orders(self) -> list[tuple[int, FreeBlocks]]:
        """(unit number, order) of the orders made since the last call; none while somebody copies blocks."""
        if self.copied:
            return []
        unsent, self._unsent = self._unsent, []
        return unsent

    def unconfirmed(self, unit: int) -> list[FreeBlocks]:
        """Orders that a unit may have missed."""
        orders = self.orders.get(unit)
        return [] if orders is None or self.copied else list(orders.unconfirmed)

    def confirm(self, unit: int, sequence: int) -> None:
        """The unit did everything up to `sequence`."""
        orders = self.orders.get(unit)
        while orders is not None and orders.unconfirmed and orders.unconfirmed[0].sequence <= sequence:
            orders.unconfirmed.popleft()

    def confirmed(self, unit: int, sequence: int) -> bool:
        """Whether the unit did what this order says."""
        orders = self.orders.get(unit)
        return orders is None or not orders.unconfirmed or orders.unconfirmed[0].sequence > sequence

    def _subtract(self, blocks: Int64s) -> Int64s:
        """Return the touched blocks that are still in use."""
        touched, counts = _counted(blocks)
        left = []
        for block, count in zip(touched.tolist(), counts.tolist(), strict=True):
            cells = self.cells[block] - count
            if cells:
                self.cells[block] = cells
                left.append(block)
            else:
                del self.cells[block], self.put[block]
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
