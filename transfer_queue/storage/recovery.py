"""A unit's index, rebuilt from the facts of an earlier life over the arenas that outlived it.

What a block gave back when rows of it were cleared may hold younger spans. So ranges are claimed from the youngest
span to the oldest: each gets what no younger one has. What a block lost that way, it must have given back; a block of
which nothing was given back and that lost bytes nevertheless is damaged, and one of which something was given back is
judged when its cleared slots are known (`misplaced`). What nobody claims is free.

A block is lost if its arena is gone, if its bytes are another's, or if its header, directory or checksums do not fit.
What is lost is written down until the controller has heard of it, so that it refuses whoever would still commit it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Iterator

import numpy as np

from transfer_queue.errors import DecodeError
from transfer_queue.messages import SPAN_SHIFT, Int64s, int64s_of
from transfer_queue.storage.arena import Arena, Arenas
from transfer_queue.storage.block import Block, Directories, read_head
from transfer_queue.storage.checksums import check_head
from transfer_queue.storage.facts import SPAN_MASK, Fact, Kind, Known, KnownSpan, pin_fact
from transfer_queue.storage.reuse import returnable
from transfer_queue.storage.space import Hold, UnitSpace
from transfer_queue.storage.spans import BLOCKS_PER_SPAN, RangeSet, Span, StoredBlock

log = logging.getLogger(__name__)


def rebuild(arenas: Arenas, known: Known) -> tuple[UnitSpace, dict[int, str]]:
    """Return the space that the facts describe, and why blocks are lost, by id; those are freed already.

    Where nothing is known the space is empty and has another life.
    """
    missing = arenas.reopen(known.arenas)
    members = {arena.name: arena for arena in arenas.members}
    space = _empty(arenas, known)
    space.facts += [(Kind.ARENA_GONE, name) for name in missing]
    lost: dict[int, str] = {}
    for span in known.spans.values():
        if span.arena in members:
            space.spans[span.number] = _restored(span, members[span.arena], space)
        else:
            reason = f"its arena {span.arena} could not be opened: {missing.get(span.arena, 'nobody knows it')}"
            lost.update(dict.fromkeys(span.blocks, reason))
            space.lose_span(span.first_block)
            space.facts += _forgetting(span)
    damaged = _claim_all(space)
    for number, pin in known.pins.items():
        space.pins[number] = Hold(pin.holder, tuple(_pinned(space, pin.blocks)), pin.asked)
    for block in space.blocks():
        wrong = damaged.get(block.block_id) or unsound(block, space.directories)
        if wrong and not block.freed:
            lost[block.block_id] = wrong
    for block_id, reason in lost.items():
        log.error("block %d is lost: %s", block_id, reason)
    space.lose(int64s_of(lost))
    space.find_granted()
    return space, lost


def all_facts(space: UnitSpace) -> list[Fact]:
    """Return facts that say all there is to know now, in place of those from the first day on."""
    facts: list[Fact] = [(Kind.LIFE, space.life)]
    facts += [(Kind.ARENA, arena.name, arena.size_bytes) for arena in space.arenas.members]
    for span in space.spans.values():
        facts += span.all_facts()
    for number, hold in space.pins.items():
        facts.append(pin_fact(number, hold.holder, hold.asked, int64s_of(block.block_id for block in hold.blocks)))
    facts += [(Kind.LOST, block_id) for block_id in space.lost]
    facts += [(Kind.SPAN_LOST, first_block) for first_block in space.lost_spans]
    facts.append((Kind.NEXT, space.next_span, space.next_pin))
    return facts


def unsound(block: StoredBlock, directories: Directories) -> str | None:
    """Return what is wrong with the head of a block; None also for one that is not sealed yet."""
    head = read_head(block.arena.memory, block.start)
    if head is None or head.block_id != block.block_id or head.size_bytes != block.size_bytes:
        return "its header is damaged"
    if not head.sealed:
        return None
    try:
        check_head(directories.open_block(block.arena.memory, block.start, block.block_id))
    except DecodeError as error:
        return error.message
    return None


def stored_ids(space: UnitSpace) -> Int64s:
    """Return the ids of all blocks that are found by now."""
    return int64s_of(block.block_id for block in space.blocks() if not block.freed)


def carvable_ids(space: UnitSpace) -> Int64s:
    """Return the ids of the next blocks of living writers, one for each span that they may add to.

    A writer does not wait for the unit: between this moment and the answer of the controller, it may commit more.
    """
    held = [span for span in space.spans.values() if span.open and span.holder is not None]
    spans = [span for span in held if span.first_block not in space.lost_spans and span.end[0] < BLOCKS_PER_SPAN]
    return int64s_of(span.first_block + span.end[0] for span in spans)


def misplaced(block: StoredBlock, readable: Block) -> bool:
    """Whether bytes of a block are another's that do not belong to its cleared rows."""
    allowed = RangeSet()
    if block.cleared is not None:
        for column in readable.columns.values():
            begins, ends = returnable(readable, column, block.cleared, np.flatnonzero(block.cleared))
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                allowed.add(begin, end)
    return any(allowed.gaps(begin, end) for begin, end in block.returned.ranges())


# ---------------------------------------------------------------- inside


def _empty(arenas: Arenas, known: Known) -> UnitSpace:
    space = UnitSpace(arenas, known.life or secrets.token_hex(8), next_span=known.next_span, next_pin=known.next_pin)
    if known.life is None:
        space.facts.append((Kind.LIFE, space.life))
    space.lost, space.lost_spans = set(known.lost), set(known.lost_spans)
    return space


def _forgetting(span: KnownSpan) -> list[Fact]:
    """The facts that end a span and its blocks."""
    ending: list[Fact] = [(Kind.FINISHED, span.number)] if span.open else []
    return ending + [(Kind.DROPPED, block_id) for block_id in span.blocks]


def _restored(known: KnownSpan, arena: Arena, space: UnitSpace) -> Span:
    place = (known.number, known.first_block, arena, known.start, known.size_bytes)
    span = Span(*place, known.holder, known.asked, space.facts)
    for found in known.blocks.values():
        block = StoredBlock(arena, found.block_id, found.start, found.size_bytes)
        block.partial, block.freed = found.partial, found.freed
        span.blocks[found.block_id - known.first_block] = block
        if found.partial and not found.freed:
            space.unconfirmed.add(found.block_id)
    span.end, span.open = known.end, known.open
    span.walk()
    return span


def _claim_all(space: UnitSpace) -> dict[int, str]:
    """Give every span and block its bytes, and the arenas the rest; return the blocks that do not have theirs."""
    claimed = {arena.name: RangeSet() for arena in space.arenas.members}
    damaged = {}
    for span in reversed(space.spans.values()):
        taken = claimed[span.arena.name]
        if span.unused_bytes:
            taken.add(span.end[1], span.start + span.size_bytes)
        for block in span.blocks.values():
            _claim(block, taken)
            if block.returned.total and not block.partial:
                damaged[block.block_id] = "some of its bytes belong to another block"
    for arena in space.arenas.members:
        for begin, end in claimed[arena.name].gaps(0, arena.size_bytes):
            arena.extents.free(begin, end - begin)
    return damaged


def _claim(block: StoredBlock, taken: RangeSet) -> None:
    begin, end = block.start, block.start + block.size_bytes
    mine = RangeSet()
    for gap in taken.add(begin, end):
        mine.add(*gap)
    if mine.total < block.size_bytes:
        for other in mine.gaps(begin, end):
            block.returned.add(*other)
        block.cleared_bytes = block.returned.total


def _pinned(space: UnitSpace, ids: Iterable[int]) -> Iterator[StoredBlock]:
    for block_id in ids:
        span = space.spans.get(block_id >> SPAN_SHIFT & SPAN_MASK)
        block = None if span is None else span.blocks.get(block_id - span.first_block)
        if block is not None:
            block.pins += 1
            yield block
