"""A storage unit came back: what it still has, what it may reuse, and which rows lost their data with it."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.table import Column
from transfer_queue.messages import Reconciled

Int64s: TypeAlias = NDArray[np.int64]


def reconcile(rows: Rows, unit: int, held: Int64s) -> tuple[Reconciled, list[str]]:
    """Compare the blocks of a unit with those it holds; return the answer, and the partitions that lost data.

    Cells of blocks that the unit does not hold are not ready any more; `Partition.lost` names their rows.
    """
    missing = np.setdiff1d(rows.blocks.of_unit(unit), held)
    hurt = _lose(rows, missing) if len(missing) else []
    partial = rows.blocks.partly_used(held)
    blocks, slots = _unused_slots(rows, partial)
    return Reconciled(committed=rows.blocks.holds(held), cleared_blocks=blocks, cleared_slots=slots), hurt


def _lose(rows: Rows, blocks: Int64s) -> list[str]:
    hurt = set()
    for name, column in rows.table.columns.items():
        lost = np.flatnonzero((column.ready == 1) & np.isin(column.block, blocks))
        for partition, positions in rows.owners(lost) if len(lost) else ():
            partition.lose_field(name, lost[positions])
            rows.uncount(partition, column.block[lost[positions]])
            hurt.add(partition.name)
        column.ready[lost] = column.block[lost] = column.slot[lost] = 0
    rows.blocks.lose(blocks)
    return sorted(hurt)


def _unused_slots(rows: Rows, partial: dict[int, int]) -> tuple[Int64s, Int64s]:
    """(block, slot) of the slots of these blocks, put with so many rows, that no cell points to."""
    if not partial:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    ids = np.array(sorted(partial), np.int64)
    counts = np.array([partial[block] for block in ids.tolist()], np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    used = np.zeros(starts[-1], np.bool_)
    for column in rows.table.columns.values():
        _mark(used, column, ids, starts)
    unused = np.flatnonzero(~used)
    which = np.searchsorted(starts, unused, side="right") - 1
    return ids[which], unused - starts[which]


def _mark(used: NDArray[np.bool_], column: Column, ids: Int64s, starts: Int64s) -> None:
    cells = np.flatnonzero((column.ready == 1) & np.isin(column.block, ids))
    at = np.searchsorted(ids, column.block[cells])
    used[starts[at] + column.slot[cells]] = True
