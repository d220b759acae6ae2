"""Rows of stored blocks as new, smaller blocks for a reader that cannot map the arenas."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.messages import BlockBytes, Fetch, Fetched, Int64s, ReadBlock
from transfer_queue.storage.block import Block, EncodedColumn, plan_block
from transfer_queue.storage.checksums import Suspect, verify
from transfer_queue.storage.digests import digest
from transfer_queue.storage.gather import Pick, RowSet, distinct, pick, row_bytes
from transfer_queue.storage.ranges import Bytes
from transfer_queue.storage.space import UnitSpace

MAX_FRAME_BYTES = 8 << 20

_MAX_BLOCKS = 1024  # in one reply: a server is not to be kept busy for long
_MAX_IMAGES = 64


def pack(space: UnitSpace, request: Fetch) -> Fetched:
    """Copy the leading rows that fit in `max_bytes`, at least one. Raises `StaleSampleError` for rows that are gone.

    All of them go into one image, if their columns can be shared; else each block has its own. A value that several
    rows share is sent once per image.
    With `verify`, the rows are checked first, which raises `DecodeError`, and the images have checksums.
    """
    if len(request.blocks) != len(request.slots) or not len(request.blocks):
        raise InvalidArgument(f"{len(request.blocks)} blocks and {len(request.slots)} slots do not name rows")
    ids, which = in_order_of_appearance(request.blocks)
    opened = space.open_blocks(ids[:_MAX_BLOCKS].tolist())
    blocks = [block for block, _ in opened]
    rows = _leading(which, _MAX_BLOCKS)
    wanted = RowSet(blocks, which[:rows], request.slots[:rows])
    _refuse_cleared(wanted, [cleared for _, cleared in opened])
    if request.verify:
        _verify(wanted, [cleared for _, cleared in opened], request.fields)
    found = [pick(field, wanted) for field in request.fields]
    sizes = np.zeros(rows, np.int64)
    for field, parts in zip(request.fields, found, strict=True):
        sizes += _sizes(field, parts, wanted)
    total = np.cumsum(sizes)
    rows = int(np.searchsorted(total, max(request.max_bytes, total[0]), side="right"))
    alike = all(len(parts) == 1 for parts in found)
    if not alike:
        rows = min(rows, _leading(which, _MAX_IMAGES))
    images = _images(blocks, request, which[:rows], request.slots[:rows], alike)
    return Fetched(
        rows=rows,
        frames_of=np.array([len(image) for image in images], np.int64),
        frames=tuple(frame for image in images for frame in image),
    )


def piece(space: UnitSpace, request: ReadBlock) -> BlockBytes:
    """A piece of a block as it lies in memory, copied. Raises `StaleSampleError` if the block is gone."""
    if request.offset < 0 or request.max_bytes < 1:
        raise InvalidArgument(f"{request.max_bytes} bytes from {request.offset} on are no piece of a block")
    [(block, _)] = space.open_blocks([request.block])
    size = block.head.size_bytes
    end = min(request.offset + min(request.max_bytes, MAX_FRAME_BYTES), size)
    data = block.memory[block.start + request.offset : block.start + end].tobytes()
    return BlockBytes(size_bytes=size, frames=(data,))


def _sizes(field: str, parts: Sequence[Pick], rows: RowSet) -> Int64s:
    """Return how many bytes each row adds to an image: those of a shared value count where it first appears."""
    sizes = row_bytes(parts, len(rows.slots))
    found = distinct(field, rows)
    if found is None:
        return sizes
    added = np.zeros_like(sizes)
    added[found[0]] = sizes[found[0]]
    return added


def _leading(which: Int64s, most: int) -> int:
    """Return how many leading rows lie in the first `most` blocks."""
    return int(np.argmax(np.append(which >= most, True)))


def _images(
    blocks: Sequence[Block], request: Fetch, which: Int64s, slots: Int64s, alike: bool
) -> list[list[memoryview]]:
    if alike:
        return [_image(request, RowSet(blocks, which, slots))]
    numbers = range(int(which.max()) + 1)
    return [_image(request, RowSet([blocks[n]], which[which == n] * 0, slots[which == n])) for n in numbers]


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


def _refuse_cleared(rows: RowSet, cleared: Sequence[Int64s]) -> None:
    for number, gone in enumerate(cleared):
        if len(gone) and (hit := np.intersect1d(rows.slots[rows.which == number], gone)).size:
            block = rows.blocks[number].head.block_id
            raise StaleSampleError(
                f"{hit.size} rows of block {block} are not stored any more: their samples were cleared", blocks=[block]
            )


def _verify(rows: RowSet, cleared: Sequence[Int64s], fields: Sequence[str]) -> None:
    verify(
        Suspect(block, fields, rows.slots[rows.which == number], cleared[number])
        for number, block in enumerate(rows.blocks)
    )


def _image(request: Fetch, rows: RowSet) -> list[memoryview]:
    """Pack rows into a block image with the id of the first one's block; return it in frames."""
    columns, sources = [], {}
    for field in request.fields:
        firsts, references = distinct(field, rows) or (slice(None), None)
        [source] = pick(field, RowSet(rows.blocks, rows.which[firsts], rows.slots[firsts]))
        values = np.broadcast_to(np.uint8(0), source.size_bytes)  # takes no memory: only its size is looked at
        sources[id(values)] = source
        columns.append(EncodedColumn(source.spec, [values], source.offsets, source.shapes, references))
    plan = plan_block(columns, len(rows.slots), checked=request.verify)
    image = np.zeros(plan.size_bytes, np.uint8)
    for offset, buffer in plan.pieces:
        _place(image[offset : offset + buffer.nbytes], buffer, sources.get(id(buffer)))
    chunks = plan.chunks
    digests = None if chunks is None else np.array([digest(image[a:b].data) for a, b in chunks], np.uint64)
    head = plan.head(rows.blocks[int(rows.which[0])].head.block_id, digests)
    image[: len(head)] = np.frombuffer(head, np.uint8)
    return [image[at : at + MAX_FRAME_BYTES].data for at in range(0, image.nbytes, MAX_FRAME_BYTES)]


def _place(target: Bytes, buffer: Bytes, source: Pick | None) -> None:
    if source is None:
        target[:] = buffer
    else:
        source.copy_into(target)
