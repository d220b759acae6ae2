"""What changed, told so that the same changes can be made again.

A record names the request, when and for whom it was carried out, and whatever was not decided by the state alone: which
slots a put got, which rows a sampler chose.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.selection import Split

Int64s: TypeAlias = NDArray[np.int64]


class Record(NamedTuple):
    """One change. `request` is what was asked for, or one of the types in `messages.journal`."""

    request: Any
    now: float
    ticket: Hashable | None = None
    client: str = ""
    partition: str = ""
    rows: Int64s | None = None  # put: its rows; draw: what was handed out
    consumed: Int64s | None = None  # draw: what the sampler marks consumed; None: the same rows
    check: int = 0  # sum of the generations of `rows`
    split: Split | None = None  # draw of a data-parallel rank
    bounds: list[int] | None = None  # of the slices, where the draw fixed them
    sampler_state: dict[str, Any] | None = None


class Records:
    """Records not yet taken, in order. Nothing is kept unless `keep` is set: a ledger without a journal needs none."""

    def __init__(self) -> None:
        self.keep = False
        self._taken: list[Record] = []

    def add(self, record: Record) -> None:
        if self.keep:
            self._taken.append(record)

    def take(self) -> list[Record]:
        taken, self._taken = self._taken, []
        return taken
