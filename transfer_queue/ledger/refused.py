"""Blocks that no put may name any more, because their storage unit does not have them, or will not keep them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import BlockLost
from transfer_queue.messages import SPAN_SHIFT, UNIT_SHIFT

Int64s: TypeAlias = NDArray[np.int64]

MOST = 1 << 16
"""How many blocks and spans are known one by one, of all units."""


@dataclass
class Refused:
    """Single blocks, all blocks of a span (by its block ids' upper bits), and all blocks of a unit (by its number).

    A unit that comes back says which blocks and spans of its earlier life are gone; one that comes back without its
    index gets a new number, and the old one is refused as a whole. So whatever a put names was either written since, or
    was there when the unit came back.

    Units number what they give out upwards. If there are too many, all blocks of a unit up to the middle one of those
    that are refused count as refused, but for those in use. So none of them is ever taken for good, and a writer that
    lives, with a block as old as that, has to put again.
    """

    blocks: set[int] = field(default_factory=set)
    spans: set[int] = field(default_factory=set)
    units: set[int] = field(default_factory=set)
    up_to: dict[int, int] = field(default_factory=dict)  # by unit: the last of its blocks that are refused as a whole

    def check(self, block: int) -> None:
        """Raise `BlockLost` for a block that is refused."""
        if block in self.blocks:
            reason = "was given up: its unit lost it, or its writer was taken for dead"
        elif block >> SPAN_SHIFT in self.spans:
            reason = "was given up: its unit lost the memory that it lies in"
        elif self._too_old(block):
            reason = "is one of the oldest of its unit, of which those that were given up are not told apart any more"
        elif block >> UNIT_SHIFT in self.units:
            reason = "was given up together with its storage unit, which stayed away for too long or lost all it stored"
        else:
            return
        raise BlockLost(f"block {block} {reason}; put again", block=block)

    def has(self, block: int) -> bool:
        """Whether the block itself, or its span, is refused."""
        return block in self.blocks or block >> SPAN_SHIFT in self.spans or self._too_old(block)

    def lose(self, blocks: Iterable[int], first_blocks: Iterable[int] = ()) -> None:
        """Refuse blocks, and all blocks of the spans that begin with these."""
        self.blocks.update(blocks)
        self.spans.update(block >> SPAN_SHIFT for block in first_blocks)
        while len(self.blocks) + len(self.spans) > MOST:
            self._merge()

    def lose_unit(self, unit: int, *, for_good: bool) -> None:
        """Refuse all blocks of a unit; `for_good`: it never comes back, so nothing else has to be known of it."""
        self.units.add(unit)
        if for_good:
            self.blocks = {block for block in self.blocks if block >> UNIT_SHIFT != unit}
            self.spans = {span for span in self.spans if span >> UNIT_SHIFT - SPAN_SHIFT != unit}
            self.up_to.pop(unit, None)

    def _too_old(self, block: int) -> bool:
        return block <= self.up_to.get(block >> UNIT_SHIFT, -1)

    def _merge(self) -> None:
        """The older half of the unit that has most."""
        known = np.fromiter(itertools.chain(self.blocks, (_last_of(span) for span in self.spans)), np.int64)
        units, counts = np.unique(known >> UNIT_SHIFT, return_counts=True)
        unit = int(units[counts.argmax()])
        own = np.sort(known[known >> UNIT_SHIFT == unit])
        self.up_to[unit] = int(own[len(own) // 2])
        self.blocks = {block for block in self.blocks if not self._too_old(block)}
        self.spans = {span for span in self.spans if not self._too_old(_last_of(span))}

    def dump(self) -> list[Int64s]:
        """Plain values, for `load`."""
        known = (self.blocks, self.spans, self.units, self.up_to.values())
        return [np.array(sorted(each), np.int64) for each in known]

    def load(self, state: list[Int64s]) -> None:
        self.blocks, self.spans, self.units, last = (set(each.tolist()) for each in state)
        self.up_to = {block >> UNIT_SHIFT: block for block in last}


def _last_of(span: int) -> int:
    """The highest block id that a span can have."""
    return (span + 1 << SPAN_SHIFT) - 1
