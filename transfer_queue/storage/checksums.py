"""Whether the bytes of a block are still those that were written.

What was given back to the unit, when rows of a block were cleared, may hold anything: a chunk that has such bytes
cannot be checked any more. It is the cleared slots that tell; rows beside them in the same chunk of 512 KiB are taken
on trust.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from transfer_queue.errors import DecodeError
from transfer_queue.messages import Int64s, Location, Pinned
from transfer_queue.storage.block import Block, StoredColumn, head_digests
from transfer_queue.storage.digests import CHUNK_BYTES, Digests, chunk_count, chunks, digest
from transfer_queue.storage.reuse import Mask, referred, returnable, value_ranges
from transfer_queue.storage.shares import run_all

_NOTHING = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class Suspect:
    """Some rows of a block.

    fields   None: all
    slots    None: all
    cleared  slots whose rows are gone
    """

    block: Block
    fields: Sequence[str] | None = None
    slots: Int64s | None = None
    cleared: Int64s | None = None


def suspects_at(
    location: Location, fields: Sequence[str], blocks: Mapping[int, Block], pins: Sequence[Pinned]
) -> Iterator[Suspect]:
    """Yield the rows of a location that lie in these blocks, which are pinned."""
    names = [name for name in location.fields if name in fields]
    ids, which = np.unique(location.blocks, return_inverse=True)
    order = np.argsort(which, kind="stable")
    slots = np.split(location.slots[order], np.cumsum(np.bincount(which))[:-1])
    for block_id, wanted in zip(ids.tolist(), slots, strict=True):
        if block_id in blocks:
            cleared = [pinned.freed_slots[pinned.freed_blocks == block_id] for pinned in pins]
            yield Suspect(blocks[block_id], names, wanted, np.concatenate([_NOTHING, *cleared]))


def check_head(block: Block) -> Digests | None:
    """Return the checksums of a block's chunks, None if it is not checked; `DecodeError` if they are damaged."""
    if not block.head.checked:
        return None
    count = sum(chunk_count(size) for column in block.columns.values() for _, size in column.pieces)
    digests, sound = head_digests(block.memory[block.start :], count, block.head)
    if not sound:
        raise DecodeError(
            f"the checksum of header and directory of block {block.head.block_id} is wrong: they are damaged",
            blocks=[block.head.block_id],
        )
    return digests


def verify(suspects: Iterable[Suspect]) -> None:
    """Raise `DecodeError` with block and field unless all of these bytes are as they were written.

    A block without checksums raises as well.
    """
    works: list[_Checking] = []
    for suspect in suspects:
        if not suspect.block.head.checked:
            block_id = suspect.block.head.block_id
            raise DecodeError(
                f"block {block_id} has no checksums and cannot be verified: its writer has `checksums` off",
                blocks=[block_id],
            )
        works += _checking(suspect)
    run_all(works)
    for work in works:
        if work.wrong:
            raise work.error()


def damaged(suspects: Iterable[Suspect]) -> dict[int, str]:
    """Return what is wrong with which blocks; those without checksums are not looked at."""
    found: dict[int, str] = {}
    works: list[_Checking] = []
    for suspect in suspects:
        try:
            works += _checking(suspect)
        except DecodeError as error:
            found[suspect.block.head.block_id] = error.message
    run_all(works)
    for work in works:
        if work.wrong:
            found.setdefault(work.block.head.block_id, work.error().message)
    return found


class _Checking:
    """Some chunks of one field of a block, which are its parts."""

    def __init__(self, block: Block, field: str, ranges: list[tuple[int, int]], digests: Digests) -> None:
        self.block = block
        self.size_bytes = sum(end - begin for begin, end in ranges)
        self.parts = len(ranges)
        self.wrong: list[int] = []  # where damaged chunks begin in the block
        self._field = field
        self._ranges = ranges
        self._digests = digests.tolist()

    def run(self, begin: int, end: int) -> None:
        origin = self.block.start
        for number in range(begin, end):
            start, stop = self._ranges[number]
            if digest(self.block.memory[origin + start : origin + stop].data) != self._digests[number]:
                self.wrong.append(start)

    def error(self) -> DecodeError:
        block_id = self.block.head.block_id
        return DecodeError(
            f"field {self._field!r} of block {block_id} is damaged: {len(self.wrong)} of its checksums are wrong, "
            f"the first at byte {min(self.wrong)}",
            blocks=[block_id],
            field=self._field,
        )


def _checking(suspect: Suspect) -> list[_Checking]:
    block = suspect.block
    digests = check_head(block)
    if digests is None:
        return []
    cleared = np.zeros(block.head.rows, np.bool_)
    if suspect.cleared is not None:
        cleared[suspect.cleared] = True
    works = []
    for name in block.columns if suspect.fields is None else suspect.fields:
        column = block.columns[name]
        ranges = chunks(column.pieces)
        wanted = _wanted(block, column, suspect.slots, cleared)
        wanted = np.append(wanted, np.ones(len(ranges) - len(wanted), np.bool_))
        own = digests[column.first_digest : column.first_digest + len(ranges)]
        works.append(_Checking(block, name, [ranges[n] for n in np.flatnonzero(wanted).tolist()], own[wanted]))
    return works


def _wanted(block: Block, column: StoredColumn, slots: Int64s | None, cleared: Mask) -> Mask:
    """Return which chunks of a column's values hold any of these rows and nothing that was given back."""
    count = chunk_count(column.values_bytes)
    if slots is None:
        wanted = np.ones(count, np.bool_)
    else:
        values = referred(block, column, slots[(slots >= 0) & (slots < block.head.rows)])
        wanted = _touched(block, column, *value_ranges(block, column, values, values + 1))
    gone = np.flatnonzero(cleared)
    return wanted & ~_touched(block, column, *returnable(block, column, cleared, gone)) if len(gone) else wanted


def _touched(block: Block, column: StoredColumn, begins: Int64s, ends: Int64s) -> Mask:
    """Return which chunks of a column's values have bytes in any of these ranges of the block's memory."""
    edges = np.zeros(chunk_count(column.values_bytes) + 1, np.int64)
    base = block.start + column.values_at
    some = ends > begins
    np.add.at(edges, (begins[some] - base) // CHUNK_BYTES, 1)
    np.add.at(edges, (ends[some] - 1 - base) // CHUNK_BYTES + 1, -1)
    touched: Mask = np.cumsum(edges[:-1]) > 0
    return touched
