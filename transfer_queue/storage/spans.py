"""What lies in a span: the blocks its holder carved, and which of their bytes are still wanted.

A unit is not told when a block is carved. It finds the blocks of a span by walking their headers, which holders
write in order, each before the next. A block id is never reused, so bytes that an earlier owner left are not
mistaken for a header.
"""

from __future__ import annotations

import bisect
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.messages import Int64s, ProcessId
from transfer_queue.storage.arena import PAGE_BYTES, Arena
from transfer_queue.storage.block import ALIGNMENT, Block, Directories, StoredColumn, has_offsets, read_head

Mask: TypeAlias = NDArray[np.bool_]

MIN_RETURNED_BYTES = PAGE_BYTES  # shorter runs of cleared rows wait for their block
BLOCKS_PER_SPAN = 1 << 16


class StoredBlock:
    """A block as its unit keeps it. Offsets are those of the arena.

    A block ends `freed` (nobody points to it) or lives on with some slots cleared; its bytes go back to the arena
    when no pin holds them: all of them, or the cleared runs that are long enough.
    """

    __slots__ = ("arena", "block_id", "cleared", "cleared_bytes", "freed", "pins", "returned", "size_bytes", "start")

    def __init__(self, arena: Arena, block_id: int, start: int, size_bytes: int) -> None:
        self.arena = arena
        self.block_id = block_id
        self.start = start
        self.size_bytes = size_bytes
        self.pins = 0
        self.freed = False
        self.cleared: Mask | None = None  # [rows]
        self.cleared_bytes = 0  # of rows that are cleared, given back or not
        self.returned = RangeSet()

    def __repr__(self) -> str:
        state = "freed" if self.freed else "live"
        return f"<StoredBlock {self.block_id}: {self.size_bytes} bytes, {state}, {self.pins} pins>"

    @property
    def sealed(self) -> bool:
        head = read_head(self.arena.memory, self.start)
        return head is not None and head.block_id == self.block_id and head.sealed

    def cleared_slots(self) -> Int64s:
        """Return the slots whose rows are gone, in order: their bytes may be anything by now."""
        return np.empty(0, np.int64) if self.cleared is None else np.flatnonzero(self.cleared)

    def give_back_all(self) -> None:
        """Return every byte that is not returned yet."""
        assert self.freed and not self.pins
        self._give_back(self.start, self.start + self.size_bytes)

    def clear(self, directories: Directories, slots: Int64s) -> None:
        """Note that these rows are gone, and return what that makes reusable; unknown or repeated slots are ignored."""
        block = directories.open_block(self.arena.memory, self.start, self.block_id)
        if self.cleared is None:
            self.cleared = np.zeros(block.head.rows, np.bool_)
        slots = np.unique(slots[(slots >= 0) & (slots < block.head.rows)])
        slots = slots[~self.cleared[slots]]
        self.cleared[slots] = True
        for column in block.columns.values():
            _, values = _unwanted(block, column, self.cleared, slots)
            begins, ends = _value_ranges(block, column, values, values + 1)
            self.cleared_bytes += int((ends - begins).sum())
        if not self.pins:
            self._give_back_runs(block, slots)

    def give_back_cleared(self, directories: Directories) -> None:
        """Return what pins held back."""
        if self.cleared is not None:
            block = directories.open_block(self.arena.memory, self.start, self.block_id)
            self._give_back_runs(block, np.flatnonzero(self.cleared))

    def _give_back_runs(self, block: Block, slots: Int64s) -> None:
        """Return what runs of cleared rows that hold any of `slots` left unwanted, per column, if it is long enough."""
        assert self.cleared is not None
        runs = _runs(self.cleared, slots)
        for column in block.columns.values():
            firsts, lasts = runs if column.shared is None else _runs(*_unwanted(block, column, self.cleared, slots))
            begins, ends = _value_ranges(block, column, firsts, lasts)
            begins = -(-begins // ALIGNMENT) * ALIGNMENT
            ends = ends // ALIGNMENT * ALIGNMENT
            long = ends - begins >= MIN_RETURNED_BYTES
            for begin, end in zip(begins[long].tolist(), ends[long].tolist(), strict=True):
                self._give_back(begin, end)

    def _give_back(self, begin: int, end: int) -> None:
        for start, stop in self.returned.add(begin, end):
            self.arena.extents.free(start, stop - start)


class Span:
    """A run of bytes lent to `holder`, who carves blocks from it until it is returned."""

    __slots__ = (
        "_end",
        "arena",
        "blocks",
        "first_block",
        "holder",
        "number",
        "open",
        "settling",
        "size_bytes",
        "start",
    )

    def __init__(
        self, number: int, first_block: int, arena: Arena, start: int, size_bytes: int, holder: ProcessId
    ) -> None:
        self.number = number
        self.first_block = first_block
        self.arena = arena
        self.start = start
        self.size_bytes = size_bytes
        self.holder: ProcessId | None = holder  # None: dead, and its blocks are settled
        self.open = True
        self.settling = False
        self.blocks: dict[int, StoredBlock] = {}  # by position in the span; without those that are gone
        self._end = (0, start)  # how many blocks were found, and where they end

    def __repr__(self) -> str:
        return f"<Span {self.number}: {self.size_bytes} bytes, {len(self.blocks)} blocks, open: {self.open}>"

    @property
    def unused_bytes(self) -> int:
        """Bytes of an open span behind its last block."""
        return self.start + self.size_bytes - self._end[1] if self.open else 0

    def walk(self) -> None:
        """Find the blocks carved since the last walk."""
        position, at = self._end
        while self.open and position < BLOCKS_PER_SPAN and at < self.start + self.size_bytes:
            head = read_head(self.arena.memory, at)
            if head is None or head.block_id != self.first_block + position or head.size_bytes % ALIGNMENT:
                break
            if at + head.size_bytes > self.start + self.size_bytes:
                break
            self.blocks[position] = StoredBlock(self.arena, head.block_id, at, head.size_bytes)
            position, at = position + 1, at + head.size_bytes
        self._end = (position, at)

    def find(self, block_id: int) -> StoredBlock | None:
        position = block_id - self.first_block
        if position >= self._end[0]:
            self.walk()
        return self.blocks.get(position)

    def finish(self) -> None:
        """No more blocks come: give back what lies behind the last one."""
        if not self.open:
            return
        self.walk()
        unused = self.unused_bytes
        self.open = False
        if unused:
            self.arena.extents.free(self._end[1], unused)


class RangeSet:
    """Disjoint ranges of numbers, growing."""

    __slots__ = ("_begins", "_ends", "total")

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._ends: list[int] = []
        self.total = 0

    def add(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Add [begin, end); return the parts of it that were not in the set."""
        low = bisect.bisect_left(self._ends, begin)
        high = bisect.bisect_right(self._begins, end)
        gaps, at = [], begin
        for known_begin, known_end in zip(self._begins[low:high], self._ends[low:high], strict=True):
            if known_begin > at:
                gaps.append((at, known_begin))
            at = max(at, known_end)
        if at < end:
            gaps.append((at, end))
        self._begins[low:high] = [min([begin, *self._begins[low:high]])]
        self._ends[low:high] = [max([end, *self._ends[low:high]])]
        self.total += sum(stop - start for start, stop in gaps)
        return gaps


def _runs(mask: Mask, members: Int64s) -> tuple[Int64s, Int64s]:
    """Return where the runs of a mask that have any of these members begin and end."""
    edges = np.flatnonzero(np.diff(mask.view(np.int8), prepend=0, append=0))
    chosen = np.unique(np.searchsorted(edges, members, side="right") // 2)
    return edges[0::2][chosen], edges[1::2][chosen]


def _unwanted(block: Block, column: StoredColumn, cleared: Mask, slots: Int64s) -> tuple[Mask, Int64s]:
    """Return which values of a column no row refers to any more, and of these the ones that rows of `slots` had.

    cleared   [rows], says of each row whether it is gone; `slots` are some of these
    """
    if column.shared is None:
        return cleared, slots
    at = block.start + column.references_at
    references = np.clip(block.memory[at : at + 8 * block.head.rows].view(np.int64), 0, column.shared - 1)
    unwanted = np.ones(column.shared, np.bool_)
    unwanted[references[~cleared]] = False
    values = np.unique(references[slots])
    return unwanted, values[unwanted[values]]


def _value_ranges(block: Block, column: StoredColumn, firsts: Int64s, lasts: Int64s) -> tuple[Int64s, Int64s]:
    """Return where the values [firsts[i], lasts[i]) of a column begin and end in the memory of the block."""
    base, step = block.start + column.values_at, column.row_bytes
    if not has_offsets(column.spec.layout):
        return base + firsts * step, base + lasts * step
    at = block.start + column.offsets_at
    raw = block.memory[at : at + 8 * (column.values_of(block.head.rows) + 1)]
    offsets = np.clip(raw.view(np.int64), 0, column.values_bytes // step if step else 0)
    begins, ends = offsets[firsts], offsets[lasts]
    return base + begins * step, base + np.maximum(begins, ends) * step
