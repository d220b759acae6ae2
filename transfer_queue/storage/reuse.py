"""Which bytes of a block may be used again when rows of it are gone.

Decided from the block and its cleared slots alone, so that a unit that came back finds the same ranges as before.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.messages import Int64s
from transfer_queue.storage.block import ALIGNMENT, Block, StoredColumn, has_offsets

Mask: TypeAlias = NDArray[np.bool_]

MIN_RETURNED_BYTES = 4096  # shorter runs of cleared rows wait for their block


def cleared_values_bytes(block: Block, column: StoredColumn, cleared: Mask, slots: Int64s) -> int:
    """Return the bytes of the values that nobody wants any more since the rows of `slots` are gone.

    cleared   [rows], says of each row whether it is gone; `slots` are some of these
    """
    _, values = _unwanted(block, column, cleared, slots)
    begins, ends = value_ranges(block, column, values, values + 1)
    return int((ends - begins).sum())


def returnable(block: Block, column: StoredColumn, cleared: Mask, slots: Int64s) -> tuple[Int64s, Int64s]:
    """Return where, in the memory of the block, the runs of cleared rows begin and end that are long enough.

    Only the runs that hold any of `slots`; in whole multiples of 64 bytes.
    """
    firsts, lasts = _runs(*_unwanted(block, column, cleared, slots))
    begins, ends = value_ranges(block, column, firsts, lasts)
    begins = -(-begins // ALIGNMENT) * ALIGNMENT
    ends = ends // ALIGNMENT * ALIGNMENT
    long = ends - begins >= MIN_RETURNED_BYTES
    return begins[long], ends[long]


def referred(block: Block, column: StoredColumn, slots: Int64s) -> Int64s:
    """Return which value of the column each of these rows has; a damaged reference names any value."""
    if column.shared is None:
        return slots
    at = block.start + column.references_at
    references = block.memory[at : at + 8 * block.head.rows].view(np.int64)[slots]
    return np.clip(references, 0, column.shared - 1)


def value_ranges(block: Block, column: StoredColumn, firsts: Int64s, lasts: Int64s) -> tuple[Int64s, Int64s]:
    """Return where the values [firsts[i], lasts[i]) of a column begin and end in the memory of the block."""
    base, step = block.start + column.values_at, column.row_bytes
    if not has_offsets(column.spec.layout):
        return base + firsts * step, base + lasts * step
    at = block.start + column.offsets_at
    raw = block.memory[at : at + 8 * (column.values_of(block.head.rows) + 1)]
    offsets = np.clip(raw.view(np.int64), 0, column.values_bytes // step if step else 0)
    begins, ends = offsets[firsts], offsets[lasts]
    return base + begins * step, base + np.maximum(begins, ends) * step


def _runs(mask: Mask, members: Int64s) -> tuple[Int64s, Int64s]:
    """Return where the runs of a mask that have any of these members begin and end."""
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0))
    chosen = np.unique(np.searchsorted(edges, members, side="right") // 2)
    return edges[0::2][chosen], edges[1::2][chosen]


def _unwanted(block: Block, column: StoredColumn, cleared: Mask, slots: Int64s) -> tuple[Mask, Int64s]:
    """Return which values of a column no row refers to any more, and of these the ones that rows of `slots` had."""
    if column.shared is None:
        return cleared, slots
    unwanted = np.ones(column.shared, np.bool_)
    unwanted[referred(block, column, np.flatnonzero(~cleared))] = False
    values = np.unique(referred(block, column, slots))
    return unwanted, values[unwanted[values]]
