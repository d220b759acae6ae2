"""Who holds which bytes of a unit: spans, blocks and pins over its arenas.

Decides, and does what is decided at once; never waits, sends or looks at a clock. What has to outlive the process it
leaves in `facts`, for its caller to write down before anybody is answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from transfer_queue.errors import DecodeError, InvalidArgument, StaleSampleError
from transfer_queue.messages import SPAN_SHIFT, UNIT_SHIFT, FreeBlocks, Int64s, Pinned, ProcessId, Reserved
from transfer_queue.storage.arena import Arenas
from transfer_queue.storage.block import ALIGNMENT, Block, Directories, aligned
from transfer_queue.storage.facts import NOBODY, SPAN_MASK, Asked, Kind, pin_fact
from transfer_queue.storage.ranges import Bytes
from transfer_queue.storage.spans import Span, StoredBlock

_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Hold:
    """A pin."""

    holder: ProcessId
    blocks: tuple[StoredBlock, ...]
    asked: Asked


class UnitSpace:
    """Not thread-safe. `number` is the unit's own, known once it announced itself.

    facts        what happened since they were last taken away; the arenas add theirs
    unconfirmed  blocks some of whose bytes were given back, and nobody knows yet which: not to be read
    next_span    the number of the first span to be lent; a unit that forgot its spans starts where it never was
    """

    def __init__(self, arenas: Arenas, *, next_span: int = 1, next_pin: int = 1) -> None:
        self.arenas = arenas
        self.facts = arenas.facts
        self.number = 0
        self.spans: dict[int, Span] = {}
        self.pins: dict[int, Hold] = {}
        self.unconfirmed: set[int] = set()
        self.directories = Directories()
        self.next_span = next_span
        self.next_pin = next_pin

    # ------------------------------------------------------------ writers

    def reserve(self, size_bytes: int, holder: ProcessId, asked: Asked = NOBODY) -> Reserved | None:
        """Lend a span, or None if no arena has so much in one piece."""
        size = aligned(size_bytes)
        place = self.arenas.allocate(size, ALIGNMENT)
        if place is None:
            return None
        arena, offset = place
        number = self.next_span
        self.next_span = number % SPAN_MASK + 1
        first = self.number << UNIT_SHIFT | number << SPAN_SHIFT
        self.spans[number] = Span(number, first, arena, offset, size, holder, asked, self.facts)
        self.facts.append(self.spans[number].fact())
        return Reserved(span=number, first_block=first, arena=arena.path, offset=offset, size_bytes=size)

    def write(self, number: int, offset: int, frames: Iterable[Bytes]) -> int:
        """Copy frames into an open span; return the bytes written."""
        span = self.spans.get(number)
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
        span = self.spans.get(number)
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
            if block.pins:
                self.facts.append((Kind.FREED, block_id))
            else:
                self._drop(span, block)

    def free_slots(self, message: FreeBlocks) -> None:
        """Nobody points to these rows any more; unknown ones are ignored.

        Rows of a damaged block cannot be found: they stay with the block. `DecodeError` says so, after all the others.
        """
        damage: DecodeError | None = None
        if len(message.partial_blocks) != len(message.partial_slots):
            raise InvalidArgument(
                f"{len(message.partial_blocks)} blocks and {len(message.partial_slots)} slots are no pairs"
            )
        order = np.argsort(message.partial_blocks, kind="stable")
        blocks, first = np.unique(message.partial_blocks[order], return_index=True)
        for block_id, slots in zip(blocks.tolist(), np.split(message.partial_slots[order], first[1:]), strict=False):
            found = self._find(block_id)
            if found is not None and not found[1].freed:
                block, whole = found[1], not found[1].partial
                try:
                    block.clear(self.directories, slots)
                except DecodeError as error:
                    damage = error
                self._note_partial(block, whole)
        if damage is not None:
            raise damage

    # ------------------------------------------------------------ readers

    def open_blocks(self, blocks: Sequence[int]) -> list[tuple[Block, Int64s]]:
        """Return readable blocks, each with its cleared slots; valid until something is freed. Raises as `pin`."""
        opened = []
        for block in self._live(blocks):
            readable = self.directories.open_block(block.arena.memory, block.start, block.block_id)
            opened.append((readable, block.cleared_slots()))
        return opened

    def pin(self, blocks: Int64s, holder: ProcessId, asked: Asked = NOBODY) -> Pinned:
        """Keep the bytes of these blocks. Raises `StaleSampleError` with the ids of those that are gone."""
        held = self._live(blocks.tolist())
        for block in held:
            block.pins += 1
        number = self.next_pin
        self.next_pin += 1
        self.pins[number] = Hold(holder, tuple(held), asked)
        self.facts.append(pin_fact(number, holder, asked, blocks))
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
        hold = self.pins.pop(number, None)
        if hold is None:
            return
        self.facts.append((Kind.UNPIN, number))
        for block in hold.blocks:
            block.pins -= 1
            if block.pins:
                continue
            if not block.freed:
                whole = not block.partial
                block.give_back_cleared(self.directories)
                self._note_partial(block, whole)
            elif (found := self._find(block.block_id)) is not None:
                self._drop(*found)

    # ------------------------------------------------------------ the dead

    def holders(self) -> set[ProcessId]:
        """Every process that holds a pin or wrote a block whose fate is open."""
        writers = (span.holder for span in self.spans.values() if span.holder is not None and not span.settling)
        by_name = {(who.host, who.pid, who.start_time): who for who in (*writers, *self._pinners())}
        return set(by_name.values())

    def release(self, dead: ProcessId) -> list[Span]:
        """Release all that a dead process held, but its sealed blocks; return the spans where those lie."""
        for number in [number for number, hold in self.pins.items() if _same(hold.holder, dead)]:
            self.unpin(number)
        open_fate = []
        for span in [span for span in self.spans.values() if _same(span.holder, dead) and not span.settling]:
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

    # ------------------------------------------------------------ all of it

    def blocks(self) -> Iterator[StoredBlock]:
        """Every block there is by now, also those that are freed and pinned."""
        for span in self.spans.values():
            span.walk()
            yield from span.blocks.values()

    # ------------------------------------------------------------ inside

    def _pinners(self) -> Iterator[ProcessId]:
        return (hold.holder for hold in self.pins.values())

    def _find(self, block_id: int) -> tuple[Span, StoredBlock] | None:
        span = self.spans.get(block_id >> SPAN_SHIFT & SPAN_MASK)
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
        self.facts.append((Kind.DROPPED, block.block_id))
        self.unconfirmed.discard(block.block_id)
        del span.blocks[block.block_id - span.first_block]
        self._forget_empty(span)

    def _note_partial(self, block: StoredBlock, whole: bool) -> None:
        """`whole`: until now, no byte of it had been given back."""
        if whole and block.partial:
            self.facts.append((Kind.PARTIAL, block.block_id))

    def _forget_empty(self, span: Span) -> None:
        if not span.open and not span.blocks:
            self.spans.pop(span.number, None)


def _same(one: ProcessId | None, other: ProcessId) -> bool:
    return one is not None and (one.host, one.pid, one.start_time) == (other.host, other.pid, other.start_time)
