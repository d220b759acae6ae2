"""Who holds which bytes of a unit: spans, blocks and pins over its arenas.

Decides, and does what is decided at once; never waits, sends or looks at a clock.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.messages import SPAN_SHIFT, UNIT_SHIFT, FreeBlocks, Int64s, Pinned, ProcessId, Reserved
from transfer_queue.storage.arena import Arenas
from transfer_queue.storage.block import ALIGNMENT, Block, Directories, aligned
from transfer_queue.storage.ranges import Bytes
from transfer_queue.storage.spans import Span, StoredBlock

_SPAN_MASK = (1 << (UNIT_SHIFT - SPAN_SHIFT)) - 1
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class _Hold:
    holder: ProcessId
    blocks: tuple[StoredBlock, ...]


class UnitSpace:
    """Not thread-safe. `number` is the unit's own, known once it announced itself."""

    def __init__(self, arenas: Arenas) -> None:
        self.arenas = arenas
        self.number = 0
        self._spans: dict[int, Span] = {}
        self._pins: dict[int, _Hold] = {}
        self._next_span = itertools.count(1)
        self._next_pin = itertools.count(1)
        self._directories = Directories()

    # ------------------------------------------------------------ writers

    def reserve(self, size_bytes: int, holder: ProcessId) -> Reserved | None:
        """Lend a span, or None if no arena has so much in one piece."""
        size = aligned(size_bytes)
        place = self.arenas.allocate(size, ALIGNMENT)
        if place is None:
            return None
        arena, offset = place
        number = next(self._next_span)
        first = self.number << UNIT_SHIFT | number << SPAN_SHIFT
        self._spans[number] = Span(number, first, arena, offset, size, holder)
        return Reserved(span=number, first_block=first, arena=arena.path, offset=offset, size_bytes=size)

    def write(self, number: int, offset: int, frames: Iterable[Bytes]) -> int:
        """Copy frames into an open span; return the bytes written."""
        span = self._spans.get(number)
        if span is None or not span.open:
            raise InvalidArgument(f"span {number} is not lent any more; reserve another one and write the block again")
        parts = list(frames)
        size = sum(part.nbytes for part in parts)
        if offset < 0 or offset + size > span.size_bytes:
            raise InvalidArgument(f"{size} bytes at {offset} do not fit into span {number} of {span.size_bytes} bytes")
        at = span.start + offset
        for part in parts:
            span.arena.memory[at : at + part.nbytes] = part
            at += part.nbytes
        return size

    def return_span(self, number: int) -> None:
        """The holder carves no more; unknown spans are ignored."""
        span = self._spans.get(number)
        if span is not None:
            span.finish()
            self._forget_empty(span)

    def free(self, blocks: Int64s) -> None:
        """Nobody points to these blocks any more; unknown ones are ignored."""
        for block_id in blocks.tolist():
            found = self._find(block_id)
            if found is None or found[1].freed:
                continue
            span, block = found
            block.freed = True
            if not block.pins:
                self._drop(span, block)

    def free_slots(self, message: FreeBlocks) -> None:
        """Nobody points to these rows any more; unknown ones are ignored."""
        order = np.argsort(message.partial_blocks, kind="stable")
        blocks, first = np.unique(message.partial_blocks[order], return_index=True)
        for block_id, slots in zip(blocks.tolist(), np.split(message.partial_slots[order], first[1:]), strict=False):
            found = self._find(block_id)
            if found is not None and not found[1].freed:
                found[1].clear(self._directories, slots)

    # ------------------------------------------------------------ readers

    def open_blocks(self, blocks: Sequence[int]) -> list[tuple[Block, Int64s]]:
        """Return readable blocks, each with its cleared slots; valid until something is freed. Raises as `pin`."""
        opened = []
        for block in self._live(blocks):
            readable = self._directories.open_block(block.arena.memory, block.start, block.block_id)
            opened.append((readable, block.cleared_slots()))
        return opened

    def pin(self, blocks: Int64s, holder: ProcessId) -> Pinned:
        """Keep the bytes of these blocks. Raises `StaleSampleError` with the ids of those that are gone."""
        held = self._live(blocks.tolist())
        for block in held:
            block.pins += 1
        number = next(self._next_pin)
        self._pins[number] = _Hold(holder, tuple(held))
        arenas = {block.arena.path: None for block in held}
        number_of = {path: position for position, path in enumerate(arenas)}
        cleared = {block.block_id: block.cleared_slots() for block in held if block.cleared is not None}
        return Pinned(
            pin=number,
            arenas=tuple(arenas),
            arena_of=np.array([number_of[block.arena.path] for block in held], np.int64),
            offsets=np.array([block.start for block in held], np.int64),
            sizes=np.array([block.size_bytes for block in held], np.int64),
            freed_blocks=np.repeat(
                np.array(list(cleared), np.int64), np.array([len(slots) for slots in cleared.values()], np.int64)
            ),
            freed_slots=np.concatenate([np.empty(0, np.int64), *cleared.values()]),
        )

    def unpin(self, number: int) -> None:
        """The end of a pin; unknown ones are ignored."""
        hold = self._pins.pop(number, None)
        for block in () if hold is None else hold.blocks:
            block.pins -= 1
            if block.pins:
                continue
            if not block.freed:
                block.give_back_cleared(self._directories)
            elif (found := self._find(block.block_id)) is not None:
                self._drop(*found)

    # ------------------------------------------------------------ the dead

    def holders(self) -> set[ProcessId]:
        """Every process that holds a pin or wrote a block whose fate is open."""
        writers = (span.holder for span in self._spans.values() if span.holder is not None and not span.settling)
        by_name = {(who.host, who.pid, who.start_time): who for who in (*writers, *self._pinners())}
        return set(by_name.values())

    def release(self, dead: ProcessId) -> list[Span]:
        """Release all that a dead process held, but its sealed blocks; return the spans where those lie."""
        for number in [number for number, hold in self._pins.items() if _same(hold.holder, dead)]:
            self.unpin(number)
        open_fate = []
        for span in [span for span in self._spans.values() if _same(span.holder, dead) and not span.settling]:
            span.finish()
            self.free(np.array([block.block_id for block in span.blocks.values() if not block.sealed], np.int64))
            if span.blocks:
                span.settling = True
                open_fate.append(span)
            self._forget_empty(span)
        return open_fate

    def settle(self, spans: Iterable[Span], lost: Int64s | None) -> None:
        """Free the blocks of these spans that were never committed; None: it could not be learnt, ask again."""
        for span in spans:
            span.settling = False
            if lost is not None:
                span.holder = None
        if lost is not None:
            self.free(lost)

    def stats(self) -> dict[str, int]:
        """Bytes by what holds them; live + pinned + reserved + overhead + free are all bytes of the arenas.

        pinned: cleared, but some reader still looks at it · overhead: rows cleared in runs too short to reuse ·
        reserved: lent to writers and not carved yet.
        """
        live = pinned = overhead = 0
        for block in self._blocks():
            kept = block.size_bytes - block.returned.total
            cleared = kept if block.freed else block.cleared_bytes - block.returned.total
            live += kept - cleared
            if block.pins:
                pinned += cleared
            else:
                overhead += cleared
        return {
            "bytes_live": live,
            "bytes_pinned": pinned,
            "bytes_reserved": sum(span.unused_bytes for span in self._spans.values()),
            "bytes_overhead": overhead,
            "bytes_free": self.arenas.free_bytes,
            "bytes_arenas": self.arenas.total_bytes,
            "bytes_capacity": self.arenas.capacity_bytes,
            "arenas": len(self.arenas.members),
            "blocks": sum(len(span.blocks) for span in self._spans.values()),
            "spans": sum(span.open for span in self._spans.values()),
            "pins": len(self._pins),
        }

    # ------------------------------------------------------------ inside

    def _blocks(self) -> Iterator[StoredBlock]:
        for span in self._spans.values():
            span.walk()
            yield from span.blocks.values()

    def _pinners(self) -> Iterator[ProcessId]:
        return (hold.holder for hold in self._pins.values())

    def _find(self, block_id: int) -> tuple[Span, StoredBlock] | None:
        span = self._spans.get(block_id >> SPAN_SHIFT & _SPAN_MASK)
        block = None if span is None else span.find(block_id)
        return None if span is None or block is None else (span, block)

    def _live(self, blocks: Sequence[int]) -> list[StoredBlock]:
        found = {block_id: self._find(block_id) for block_id in blocks}
        gone = [block_id for block_id, place in found.items() if place is None or place[1].freed]
        if gone:
            shown = ", ".join(map(str, gone[:_SHOWN])) + (", …" if len(gone) > _SHOWN else "")
            raise StaleSampleError(
                f"{len(gone)} of {len(found)} blocks are not stored any more (their samples were cleared): {shown}",
                blocks=gone,
            )
        places = [found[block_id] for block_id in blocks]
        return [place[1] for place in places if place is not None]

    def _drop(self, span: Span, block: StoredBlock) -> None:
        block.give_back_all()
        del span.blocks[block.block_id - span.first_block]
        self._forget_empty(span)

    def _forget_empty(self, span: Span) -> None:
        if not span.open and not span.blocks:
            self._spans.pop(span.number, None)


def _same(one: ProcessId | None, other: ProcessId) -> bool:
    return one is not None and (one.host, one.pid, one.start_time) == (other.host, other.pid, other.start_time)
