"""What samplers return, checked: distinct rows that they were given, or the batch that they gave a rank before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import SamplerError
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.ready import RowsView
from transfer_queue.ledger.table import RowTable
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.dialect import returns_pairs

Int64s: TypeAlias = NDArray[np.int64]


def pair_of(sampler: BaseSampler, chosen: Any) -> tuple[Any, Any]:
    """(handed out, marked consumed): what a sampler returned, or the same rows twice. Raises for nothing at all."""
    if chosen is None:
        raise _not_indices(sampler, chosen)
    if isinstance(chosen, tuple) and len(chosen) == 2 and not isinstance(chosen[0], int | np.integer):
        return chosen
    return chosen, chosen


def as_rows(sampler: BaseSampler, chosen: Any) -> Int64s:
    try:
        rows = np.asarray(chosen)
    except (TypeError, ValueError):
        rows = np.empty((0, 0))
    mixed = rows is not chosen and isinstance(chosen, list | tuple) and any(type(each) is bool for each in chosen)
    if rows.ndim != 1 or mixed or (rows.size and rows.dtype.kind not in "iu"):
        raise _not_indices(sampler, chosen)
    return rows.astype(np.int64, copy=False)


def _not_indices(sampler: BaseSampler, chosen: Any) -> SamplerError:
    expected = "(sampled, consumed), two of them" if returns_pairs(sampler) else "a pair of them"
    return SamplerError(
        f"sampler {sampler!r} of class {type(sampler).__name__} returned {chosen!r:.200}, not a flat sequence of "
        f"indices or {expected}; one without any says that there is not enough yet"
    )


def checked(sampler: BaseSampler, rows: Int64s, candidates: Sequence[int] | None, view: RowsView) -> Int64s:
    """A row may be handed out once per draw, if it is one of those that the sampler was given.

    `candidates`: what it was given, where that was not all of `view`.
    """
    if rows is view.given:
        return rows
    fits = view.holds(rows)
    if candidates is not None:
        fits &= np.isin(rows, np.asarray(candidates, dtype=np.int64))
    if not fits.all():
        raise SamplerError(
            f"sampler {sampler!r} returned rows that are not ready for this draw in partition "
            f"{view.partition.name!r}: {rows[~fits][:10].tolist()}"
        )
    if len(set(rows.tolist())) < len(rows):
        found, counts = np.unique(rows, return_counts=True)
        raise SamplerError(f"sampler {sampler!r} returned rows more than once: {found[counts > 1][:10].tolist()}")
    return rows


def checked_again(sampler: BaseSampler, marked: Any, batch: Int64s, consumed: Int64s) -> None:
    """Of a batch that is handed out again, no other rows can be marked consumed than its own."""
    rows = as_rows(sampler, marked)
    foreign = rows[~np.isin(rows, batch) & ~np.isin(rows, consumed)]
    if len(foreign):
        raise SamplerError(
            f"sampler {sampler!r} marks rows consumed that are not in the batch it returned: {foreign[:10].tolist()}"
        )


def expanded(heads: Int64s, size: int, partition: Partition, table: RowTable) -> Int64s:
    """Replace the first row of each group by the whole group."""
    rows = []
    for row in heads.tolist():
        number = int(table.group[row])
        ordinal = int(table.ordinal[row])
        first = ordinal - ordinal % size
        ordinals = partition.groups[number].ordinals if number >= 0 else partition.groups.by_position(first, size)
        rows.append(partition.rows_at(ordinals))
    return np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
