"""A storage unit came back, or will not: what it still has, what it may reuse, and which rows lost their data with it.

What of its earlier life exists is decided here, once for all: the blocks that the unit names, and what writers that
live carve from the spans that it did not name as lost. Blocks in use that it does not name are lost; those, and what it
names as lost, no put may name any more.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.stirring import Stirred
from transfer_queue.ledger.table import Column
from transfer_queue.messages import SPAN_SHIFT, Reconcile, Reconciled

Int64s: TypeAlias = NDArray[np.int64]


def reconcile(rows: Rows, request: Reconcile, stirred: Stirred) -> Reconciled:
    """Compare the blocks of a unit with those it holds.

    Cells of blocks that the unit does not hold are not ready any more; `Partition.lost` names their rows.
    """
    held, refused = request.blocks, rows.blocks.refused
    others = np.setdiff1d(rows.blocks.of_unit(request.unit), held)
    carved = _among(others, request.carvable)
    _lose(rows, others[~carved], stirred)
    refused.lose(_ids(request.lost), _ids(request.lost_spans))
    refused.units.discard(request.unit)
    stirred.window_freed = True  # who waits with a block that is lost hears it now
    partial = rows.blocks.partly_used(np.concatenate([held, others[carved]]))
    blocks, slots = _unused_slots(rows, partial)
    return Reconciled(
        committed=rows.blocks.held(held), carved=others[carved], cleared_blocks=blocks, cleared_slots=slots
    )


def lose_unit(rows: Rows, unit: int, stirred: Stirred, *, for_good: bool) -> None:
    """All that a unit stores is lost.

    for_good   it came back as another one; else it may come back with what it had, and say what that is
    """
    _lose(rows, rows.blocks.of_unit(unit), stirred)
    rows.blocks.lose_unit(unit, for_good=for_good)
    stirred.window_freed = True


def _lose(rows: Rows, blocks: Int64s, stirred: Stirred) -> None:
    if len(blocks) == 0:
        return
    touched = [np.empty(0, np.int64)]
    for name, column in rows.table.columns.items():
        lost = np.flatnonzero((column.ready == 1) & np.isin(column.block, blocks))
        touched.append(lost)
        for partition, positions in rows.owners(lost) if len(lost) else ():
            partition.lose_field(name, lost[positions])
            rows.uncount(partition, column.block[lost[positions]])
            stirred.stir(partition.name)
        column.ready[lost] = column.block[lost] = column.slot[lost] = 0
    rows.blocks.lose(blocks)
    changed = np.unique(np.concatenate(touched))
    for partition, positions in rows.owners(changed):
        if partition.keys:
            rows.feed.touch(partition, changed[positions])


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


def _among(blocks: Int64s, carvable: Int64s | None) -> NDArray[np.bool_]:
    """[n] whether each block is one of those that may be carved, or lies behind it in the same span."""
    if carvable is None or len(carvable) == 0:
        return np.zeros(len(blocks), np.bool_)
    ordered = np.sort(carvable)
    at = np.searchsorted(ordered, blocks, side="right") - 1
    found: NDArray[np.bool_] = (at >= 0) & (ordered[at] >> SPAN_SHIFT == blocks >> SPAN_SHIFT)
    return found


def _ids(blocks: Int64s | None) -> list[int]:
    return [] if blocks is None else blocks.tolist()


def _mark(used: NDArray[np.bool_], column: Column, ids: Int64s, starts: Int64s) -> None:
    cells = np.flatnonzero((column.ready == 1) & np.isin(column.block, ids))
    at = np.searchsorted(ids, column.block[cells])
    used[starts[at] + column.slot[cells]] = True
