"""What lies in a span: the blocks its holder carved, and which of their bytes are still wanted.

A unit is not told when a block is carved. It finds the blocks of a span by walking their headers, which holders
write in order, each before the next. A block id is never reused, so bytes that an earlier owner left are not
mistaken for a header. What is found is noted among the facts of the unit before it is used.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator

import numpy as np

from transfer_queue.messages import Int64s, ProcessId
from transfer_queue.storage.arena import Arena
from transfer_queue.storage.block import ALIGNMENT, Block, Directories, read_head
from transfer_queue.storage.facts import Asked, Fact, Kind
from transfer_queue.storage.reuse import Mask, cleared_values_bytes, returnable

BLOCKS_PER_SPAN = 1 << 16


class StoredBlock:
    """A block as its unit keeps it. Offsets are those of the arena.

    A block ends `freed` (nobody points to it) or lives on with some slots cleared; its bytes go back to the arena
    when no pin holds them: all of them, or the cleared runs that are long enough.
    """

    __slots__ = (
        "arena",
        "block_id",
        "cleared",
        "cleared_bytes",
        "freed",
        "partial",
        "pins",
        "returned",
        "size_bytes",
        "start",
    )

    def __init__(self, arena: Arena, block_id: int, start: int, size_bytes: int) -> None:
        self.arena = arena
        self.block_id = block_id
        self.start = start
        self.size_bytes = size_bytes
        self.pins = 0
        self.freed = False
        self.partial = False  # some of its bytes were given back, ever
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
            self.cleared_bytes = 0
        slots = np.unique(slots[(slots >= 0) & (slots < block.head.rows)])
        slots = slots[~self.cleared[slots]]
        self.cleared[slots] = True
        for column in block.columns.values():
            self.cleared_bytes += cleared_values_bytes(block, column, self.cleared, slots)
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
        for column in block.columns.values():
            begins, ends = returnable(block, column, self.cleared, slots)
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                self.partial = True
                self._give_back(begin, end)

    def _give_back(self, begin: int, end: int) -> None:
        for start, stop in self.returned.add(begin, end):
            self.arena.extents.free(start, stop - start)


class Span:
    """A run of bytes lent to `holder`, who carves blocks from it until it is returned."""

    __slots__ = (
        "arena",
        "asked",
        "blocks",
        "end",
        "facts",
        "first_block",
        "holder",
        "number",
        "open",
        "settling",
        "size_bytes",
        "start",
    )

    def __init__(
        self,
        number: int,
        first_block: int,
        arena: Arena,
        start: int,
        size_bytes: int,
        holder: ProcessId | None,
        asked: Asked,
        facts: list[Fact],
    ) -> None:
        self.facts = facts
        self.asked = asked
        self.number = number
        self.first_block = first_block
        self.arena = arena
        self.start = start
        self.size_bytes = size_bytes
        self.holder = holder  # None: dead, and its blocks are settled
        self.open = True
        self.settling = False
        self.blocks: dict[int, StoredBlock] = {}  # by position in the span; without those that are gone
        self.end = (0, start)  # how many blocks were found, and where they end

    def __repr__(self) -> str:
        return f"<Span {self.number}: {self.size_bytes} bytes, {len(self.blocks)} blocks, open: {self.open}>"

    @property
    def unused_bytes(self) -> int:
        """Bytes of an open span behind its last block."""
        return self.start + self.size_bytes - self.end[1] if self.open else 0

    def fact(self) -> Fact:
        """Return the fact that this span was lent."""
        who = self.holder
        holder = (None, 0, 0.0) if who is None else (who.host, who.pid, who.start_time)
        place = (self.number, self.first_block, self.arena.name, self.start, self.size_bytes)
        return (Kind.SPAN, *place, *holder, *self.asked)

    def all_facts(self) -> list[Fact]:
        """Return facts that say all there is to know of this span and its blocks."""
        facts = [self.fact()]
        for block in self.blocks.values():
            facts.append((Kind.BLOCK, block.block_id, block.start, block.size_bytes))
            if block.partial:
                facts.append((Kind.PARTIAL, block.block_id))
            if block.freed:
                facts.append((Kind.FREED, block.block_id))
        facts.append((Kind.WALKED, self.number, *self.end) if self.open else (Kind.FINISHED, self.number))
        return facts

    def walk(self) -> None:
        """Find the blocks carved since the last walk."""
        position, at = self.end
        while self.open and position < BLOCKS_PER_SPAN and at < self.start + self.size_bytes:
            head = read_head(self.arena.memory, at)
            if head is None or head.block_id != self.first_block + position or head.size_bytes % ALIGNMENT:
                break
            if at + head.size_bytes > self.start + self.size_bytes:
                break
            self.blocks[position] = StoredBlock(self.arena, head.block_id, at, head.size_bytes)
            self.facts.append((Kind.BLOCK, head.block_id, at, head.size_bytes))
            position, at = position + 1, at + head.size_bytes
        self.end = (position, at)

    def find(self, block_id: int) -> StoredBlock | None:
        position = block_id - self.first_block
        if position >= self.end[0]:
            self.walk()
        return self.blocks.get(position)

    def finish(self) -> None:
        """No more blocks come: give back what lies behind the last one."""
        if not self.open:
            return
        self.walk()
        unused = self.unused_bytes
        self.open = False
        self.facts.append((Kind.FINISHED, self.number))
        if unused:
            self.arena.extents.free(self.end[1], unused)


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
        gaps = list(_gaps(zip(self._begins[low:high], self._ends[low:high], strict=True), begin, end))
        self._begins[low:high] = [min([begin, *self._begins[low:high]])]
        self._ends[low:high] = [max([end, *self._ends[low:high]])]
        self.total += sum(stop - start for start, stop in gaps)
        return gaps

    def gaps(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the parts of [begin, end) that are not in the set, in order."""
        low = bisect.bisect_left(self._ends, begin)
        high = bisect.bisect_right(self._begins, end)
        return list(_gaps(zip(self._begins[low:high], self._ends[low:high], strict=True), begin, end))

    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self._begins, self._ends, strict=True))


def _gaps(known: Iterable[tuple[int, int]], begin: int, end: int) -> Iterator[tuple[int, int]]:
    at = begin
    for known_begin, known_end in known:
        if known_begin > at:
            yield at, known_begin
        at = max(at, known_end)
    if at < end:
        yield at, end
