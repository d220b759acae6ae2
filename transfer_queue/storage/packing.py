"""Rows of stored blocks as new, smaller blocks for a reader that cannot map the arenas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.messages import Fetch, Fetched, Int64s
from transfer_queue.storage.block import HEADER_BYTES, SEALED, Block, EncodedColumn, plan_block
from transfer_queue.storage.gather import Pick, RowSet, pick, row_bytes
from transfer_queue.storage.ranges import Bytes
from transfer_queue.storage.space import UnitSpace

MAX_FRAME_BYTES = 8 << 20

_MAX_BLOCKS = 256  # in one reply: a server is not to be kept busy for long


def pack(space: UnitSpace, request: Fetch) -> Fetched:
    """Copy the leading rows that fit in `max_bytes`, at least one. Raises `StaleSampleError` for rows that are gone."""
    if len(request.blocks) != len(request.slots) or not len(request.blocks):
        raise InvalidArgument(f"{len(request.blocks)} blocks and {len(request.slots)} slots do not name rows")
    ids, which = in_order_of_appearance(request.blocks)
    most = int(np.searchsorted(np.maximum.accumulate(which), min(_MAX_BLOCKS, len(ids))))
    ids, which, slots = ids[:_MAX_BLOCKS], which[:most], request.slots[:most]
    opened = space.open_blocks(ids.tolist())
    blocks = [block for block, _ in opened]
    _refuse_cleared(ids, which, slots, [cleared for _, cleared in opened])
    sizes = row_bytes([part for field in request.fields for part in pick(field, RowSet(blocks, which, slots))], most)
    rows = max(1, int(np.searchsorted(np.cumsum(sizes), request.max_bytes, side="right")))
    frames_of: list[int] = []
    frames: list[memoryview] = []
    for number in range(int(which[:rows].max()) + 1):
        images = _image(blocks[number], request.fields, slots[:rows][which[:rows] == number])
        frames_of.append(len(images))
        frames += images
    return Fetched(rows=rows, frames_of=np.array(frames_of, np.int64), frames=tuple(frames))


def in_order_of_appearance(blocks: Int64s) -> tuple[Int64s, Int64s]:
    """Return the distinct ids, first seen first, and for each row the number of its own."""
    ids, first, inverse = np.unique(blocks, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return ids[order], rank[inverse]


def slots_in_images(which: Int64s) -> Int64s:
    """Return for each row its slot in the packed image of its block."""
    order = np.argsort(which, kind="stable")
    counts = np.bincount(which)
    slots = np.empty_like(which)
    slots[order] = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    return slots


def _refuse_cleared(ids: Int64s, which: Int64s, slots: Int64s, cleared: Sequence[Int64s]) -> None:
    for number, gone in enumerate(cleared):
        if len(gone) and (hit := np.intersect1d(slots[which == number], gone)).size:
            raise StaleSampleError(
                f"{hit.size} rows of block {ids[number]} are not stored any more: their samples were cleared",
                blocks=[int(ids[number])],
            )


def _image(block: Block, fields: Sequence[str], slots: Int64s) -> list[memoryview]:
    """Pack rows of one block into a block image of the same id; return it in frames."""
    rows = RowSet([block], np.zeros(len(slots), np.int64), slots)
    columns, sources = [], {}
    for field in fields:
        [source] = pick(field, rows)
        values = np.broadcast_to(np.uint8(0), source.size_bytes)  # takes no memory: only its size is looked at
        sources[id(values)] = source
        columns.append(EncodedColumn(source.spec, [values], source.offsets, source.shapes))
    plan = plan_block(columns, len(slots))
    image = np.zeros(plan.size_bytes, np.uint8)
    head = plan.header(block.head.block_id, SEALED) + plan.directory
    image[: len(head)] = np.frombuffer(head, np.uint8)
    assert len(head) >= HEADER_BYTES
    for offset, buffer in plan.pieces:
        _place(image[offset : offset + buffer.nbytes], buffer, sources.get(id(buffer)))
    return [image[at : at + MAX_FRAME_BYTES].data for at in range(0, image.nbytes, MAX_FRAME_BYTES)]


def _place(target: Bytes, buffer: Bytes, source: Pick | None) -> None:
    if source is None:
        target[:] = buffer
    else:
        source.copy_into(target)
