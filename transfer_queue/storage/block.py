"""The bytes of a block: what one put wrote at one unit.

    header      64 bytes, see `_HEADER`: identity, sizes, state
    directory   MessagePack: per column its `ColumnSpec` and where its pieces lie
    checksums   only of a block that is `checked`, by its magic: from the next multiple of 8 bytes on, one for each
                chunk of each piece, in the order of the directory (see `digests`)
    pieces      per column its values, offsets, shapes and references, each on a multiple of 64 bytes

A column has one value per row, in order; or, where rows share values, fewer values and a reference per row, which says
which value is the row's.

The header is written first, with the length of the whole block, so that the blocks of a span can be walked while
they are being filled; its state becomes `SEALED` last. Everything behind the header is trusted only within the
bounds that `open_block` checked. The checksum in the header of a checked block covers everything before the pieces,
itself and the state taken as zeros; with those of the chunks, only the gaps between pieces are not covered.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgpack
import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import DecodeError
from transfer_queue.messages import ColumnSpec
from transfer_queue.storage.digests import DIGEST_BYTES, Digests, chunk_count, chunks, digest, digest_pieces
from transfer_queue.storage.shares import Copy, run_all

Bytes: TypeAlias = NDArray[np.uint8]  # [size], contiguous
Int64s: TypeAlias = NDArray[np.int64]

ALIGNMENT = 64
HEADER_BYTES = 64
WRITING, SEALED = 1, 2
TENSOR_LAYOUTS = ("dense", "ragged", "shaped")
ENCODED_LAYOUTS = ("text", "bytes", "object")
NUMBER_BYTES = {"int": 8, "float": 8, "bool": 1}

_MAGIC, _MAGIC_CHECKED = b"TQBLOCK1", b"TQBLOCKC"  # one flipped bit does not make one the other
_STATE_AT = 8
_HEADER = struct.Struct("<8sB3xIQQQ")  # magic, state, directory bytes, block id, block bytes, rows
_CHECKSUM_AT, _CHECKSUM = _HEADER.size, struct.Struct("<Q")
_MAX_RANK = 64


@dataclass(frozen=True, slots=True)
class EncodedColumn:
    """A column ready to be written: m values as flat buffers, the caller's own memory where possible."""

    spec: ColumnSpec
    values: Sequence[Bytes]  # one behind the other
    offsets: Int64s | None = None  # [m + 1]
    shapes: Int64s | None = None  # [m, rank]
    references: Int64s | None = None  # [rows], covers 0 … m - 1; None: value i is that of row i

    @property
    def size_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.values)


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """A block before it has a place: `directory` and the pieces with their offsets in the block."""

    rows: int
    size_bytes: int  # a multiple of 64
    directory: bytes
    pieces: tuple[tuple[int, Bytes], ...]
    chunks: tuple[tuple[int, int], ...] | None = None  # what has a checksum each; None: the block is not checked

    def header(self, block_id: int, state: int) -> bytes:
        """Return the 64 bytes that start the block, without a checksum."""
        magic = _MAGIC if self.chunks is None else _MAGIC_CHECKED
        fields = (magic, state, len(self.directory), block_id, self.size_bytes, self.rows)
        return _HEADER.pack(*fields).ljust(HEADER_BYTES, b"\0")

    def head(self, block_id: int, digests: Digests | None = None) -> bytes:
        """Return all that comes before the pieces, sealed; `digests` of the chunks of a checked block."""
        if digests is None:
            return self.header(block_id, SEALED) + self.directory
        head = bytearray(self.header(block_id, 0) + self.directory)
        head += bytes(-len(head) % DIGEST_BYTES) + digests.tobytes()
        _CHECKSUM.pack_into(head, _CHECKSUM_AT, digest(head))
        head[_STATE_AT] = SEALED
        return bytes(head)


@dataclass(frozen=True, slots=True)
class BlockHead:
    """What the header of a block says."""

    block_id: int
    sealed: bool
    size_bytes: int
    rows: int
    directory_bytes: int
    checked: bool  # it has checksums

    @property
    def digests_at(self) -> int:
        """Where the checksums of a checked block begin."""
        return -(-(HEADER_BYTES + self.directory_bytes) // DIGEST_BYTES) * DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class StoredColumn:
    """Where a column lies in its block: offsets from the start of the block, sizes in bytes."""

    spec: ColumnSpec
    values_at: int
    values_bytes: int
    offsets_at: int
    shapes_at: int
    rank: int  # of a "shaped" row; else 0
    shared: int | None  # how many values the rows share; None: each has its own
    references_at: int
    pieces: tuple[tuple[int, int], ...]  # all of it: (offset, bytes) of the values and of what says where they are
    first_digest: int  # number of the checksum of its first chunk, if the block is checked

    def values_of(self, rows: int) -> int:
        """How many values there are for so many rows."""
        return rows if self.shared is None else self.shared

    @property
    def row_bytes(self) -> int:
        """Bytes of a row where all rows have the same, else of one step of `offsets`."""
        if self.spec.layout in NUMBER_BYTES:
            return NUMBER_BYTES[self.spec.layout]
        if self.spec.dtype is None:
            return 1
        return item_bytes(self.spec.dtype) * math.prod(self.spec.shape or ())


@dataclass(frozen=True, slots=True)
class Block:
    """A readable block: `start` in `memory`, which may hold many."""

    memory: Bytes
    start: int
    head: BlockHead
    columns: dict[str, StoredColumn]


# ---------------------------------------------------------------- writing


def plan_block(columns: Iterable[EncodedColumn], rows: int, *, checked: bool = False) -> BlockPlan:
    """Lay out columns of `rows` rows each; `checked`: with checksums."""
    entries: list[Any] = []
    buffers: list[tuple[int, Bytes]] = []
    ranges: list[tuple[int, int]] = []
    at = 0
    for column in columns:
        places = []
        for piece in (column.values, *((array.view(np.uint8).reshape(-1),) for array in _indexes(column))):
            places.append((at, sum(buffer.nbytes for buffer in piece)))
            for buffer in piece:
                if buffer.nbytes:
                    buffers.append((at, buffer))
                    at += buffer.nbytes
            at = aligned(at)
        ranges += places
        spec = column.spec
        rank = column.shapes.shape[1] if column.shapes is not None else 0
        shared = None if column.references is None else int(column.references.max()) + 1
        entries.append((spec.name, spec.layout, spec.dtype, spec.shape, rank, shared, places))
    directory = msgpack.packb(entries)
    base = _pieces_at(len(directory), [size for _, size in ranges] if checked else None)
    pieces = tuple((base + offset, buffer) for offset, buffer in buffers)
    cut = tuple(chunks((base + start, size) for start, size in ranges)) if checked else None
    return BlockPlan(rows=rows, size_bytes=base + at, directory=directory, pieces=pieces, chunks=cut)


def stored_plan(image: Bytes) -> BlockPlan:
    """Return the plan to store a block again, under another id, that was read as it lies in memory.

    It has checksums if it had. Raises `DecodeError` if it is not a whole block.
    """
    block = Directories().open_block(image)
    head, columns = block.head, block.columns.values()
    sizes = [size for column in columns for _, size in column.pieces]
    base = _pieces_at(head.directory_bytes, sizes if head.checked else None)
    directory = image[HEADER_BYTES : HEADER_BYTES + head.directory_bytes].tobytes()
    pieces = ((base, image[base : head.size_bytes]),) if head.size_bytes > base else ()
    cut = tuple(chunks(piece for column in columns for piece in column.pieces)) if head.checked else None
    return BlockPlan(rows=head.rows, size_bytes=head.size_bytes, directory=directory, pieces=pieces, chunks=cut)


def carve(plan: BlockPlan, memory: Bytes, block_id: int) -> None:
    """Claim the place of a block: write its header, not yet sealed."""
    memory[:HEADER_BYTES] = np.frombuffer(plan.header(block_id, WRITING), np.uint8)


def fill_block(plan: BlockPlan, memory: Bytes) -> None:
    """Copy directory and pieces behind the header, and seal the block."""
    if plan.chunks is None:
        memory[HEADER_BYTES : HEADER_BYTES + len(plan.directory)] = np.frombuffer(plan.directory, np.uint8)
        run_all([Copy(memory[offset : offset + buffer.nbytes], buffer) for offset, buffer in plan.pieces])
    else:
        *_, block_id, _, _ = _HEADER.unpack(memory[: _HEADER.size].tobytes())
        head = np.frombuffer(plan.head(block_id, digest_pieces(plan.pieces, plan.chunks, memory)), np.uint8)
        memory[_CHECKSUM_AT : len(head)] = head[_CHECKSUM_AT:]
    memory[_STATE_AT] = SEALED


def image_parts(plan: BlockPlan, block_id: int) -> list[Bytes]:
    """Return the whole block as buffers that follow each other, gaps included, without copying the pieces.

    The first begins with the header.
    """
    head = plan.head(block_id, None if plan.chunks is None else digest_pieces(plan.pieces, plan.chunks))
    parts, at = [np.frombuffer(head, np.uint8)], len(head)
    for offset, buffer in plan.pieces:
        if offset > at:
            parts.append(np.zeros(offset - at, np.uint8))
        parts.append(buffer)
        at = offset + buffer.nbytes
    if plan.size_bytes > at:
        parts.append(np.zeros(plan.size_bytes - at, np.uint8))
    return parts


def unsealed(head: Bytes) -> Bytes:
    """Return a copy of bytes that begin with a header, which says that the block is not complete."""
    copy = head.copy()
    copy[_STATE_AT] = WRITING
    return copy


def _pieces_at(directory_bytes: int, sizes: Iterable[int] | None) -> int:
    """Return where the pieces of a block begin; their sizes count if it is checked."""
    end = HEADER_BYTES + directory_bytes
    if sizes is not None:
        end += -end % DIGEST_BYTES + DIGEST_BYTES * sum(map(chunk_count, sizes))
    return aligned(end)


# ---------------------------------------------------------------- reading


def read_head(memory: Bytes, start: int = 0) -> BlockHead | None:
    """Return what the header at `start` says, or None if there is none; the directory is not looked at."""
    if start + HEADER_BYTES > memory.nbytes:
        return None
    magic, state, directory_bytes, block_id, size_bytes, rows = _HEADER.unpack(
        memory[start : start + _HEADER.size].tobytes()
    )
    if (
        magic not in (_MAGIC, _MAGIC_CHECKED)
        or size_bytes < HEADER_BYTES + directory_bytes
        or start + size_bytes > memory.nbytes
    ):
        return None
    return BlockHead(block_id, state == SEALED, size_bytes, rows, directory_bytes, magic == _MAGIC_CHECKED)


def head_digests(raw: Bytes, count: int, head: BlockHead) -> tuple[Digests, bool]:
    """Return the checksums of the chunks of a checked block, and whether its own checksum is right.

    raw     the block, at least up to its pieces · count: how many chunks it has
    """
    end = head.digests_at + DIGEST_BYTES * count
    covered = bytearray(raw[:end].tobytes())
    [checksum] = _CHECKSUM.unpack_from(covered, _CHECKSUM_AT)
    covered[_STATE_AT] = 0
    _CHECKSUM.pack_into(covered, _CHECKSUM_AT, 0)
    return np.frombuffer(covered, np.uint64, count, head.digests_at), digest(covered) == checksum


class Directories:
    """Reads directories, each distinct one once: blocks of like puts share theirs."""

    __slots__ = ("_known",)

    _MAX_KNOWN = 4096

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, int, int, bool], dict[str, StoredColumn]] = {}

    def open_block(self, memory: Bytes, start: int = 0, block_id: int | None = None) -> Block:
        """Return the sealed block at `start`; `DecodeError` unless it is one, is `block_id`, and is sound."""
        head = read_head(memory, start)
        if head is None or not head.sealed or (block_id is not None and head.block_id != block_id):
            found = "nothing readable" if head is None else f"block {head.block_id}, sealed: {head.sealed}"
            wanted = "a sealed block" if block_id is None else f"sealed block {block_id}"
            raise DecodeError(f"expected {wanted} at byte {start}, found {found}")
        directory_at = start + HEADER_BYTES
        raw = memory[directory_at : directory_at + head.directory_bytes].tobytes()
        key = (raw, head.rows, head.size_bytes, head.checked)
        columns = self._known.get(key)
        if columns is None:
            columns = _read_directory(raw, head)
            if len(self._known) >= self._MAX_KNOWN:
                self._known.clear()
            self._known[key] = columns
        return Block(memory, start, head, columns)


def _read_directory(raw: bytes, head: BlockHead) -> dict[str, StoredColumn]:
    try:
        entries = msgpack.unpackb(raw)
        sizes = [size for *_, places in entries for _, size in places]
        base = _pieces_at(len(raw), sizes if head.checked else None)
        columns: list[StoredColumn] = []
        for entry in entries:
            digests = sum(chunk_count(size) for column in columns for _, size in column.pieces)
            columns.append(_read_entry(entry, base, digests))
    except (ValueError, TypeError, LookupError, OverflowError, msgpack.UnpackException) as error:
        raise DecodeError(f"the directory of block {head.block_id} is damaged: {error}") from error
    for column in columns:
        _check_bounds(column, head)
    return {column.spec.name: column for column in columns}


def _read_entry(entry: Any, base: int, first_digest: int) -> StoredColumn:
    name, layout, dtype, shape, rank, shared, places = entry
    if type(name) is not str or type(rank) is not int or not 0 <= rank <= _MAX_RANK:
        raise ValueError("a column has no name or no rank")
    if layout in TENSOR_LAYOUTS:
        item_bytes(dtype)
    elif layout not in ENCODED_LAYOUTS and layout not in NUMBER_BYTES:
        raise ValueError(f"unknown layout {layout!r}")
    if shape is not None and not all(type(dim) is int and dim >= 0 for dim in shape):
        raise ValueError(f"no column has the shape {shape}")
    if shared is not None and (type(shared) is not int or shared < 1):
        raise ValueError(f"rows cannot share {shared!r} values")
    spec = ColumnSpec(name=name, layout=layout, dtype=dtype, shape=None if shape is None else tuple(shape))
    pieces = tuple((base + start, size) for start, size in places)
    values_at, values_bytes = pieces[0]
    at = [start for start, _ in pieces[1:]]
    references_at = 0 if shared is None else at.pop()
    at += [0, 0]
    return StoredColumn(spec, values_at, values_bytes, at[0], at[1], rank, shared, references_at, pieces, first_digest)


def _check_bounds(column: StoredColumn, head: BlockHead) -> None:
    """Every byte that the layout of a column implies must lie inside its block."""
    values = column.values_of(head.rows)
    pieces = list(column.pieces)
    if has_offsets(column.spec.layout):
        pieces.append((column.offsets_at, 8 * (values + 1)))
    elif column.values_bytes != column.row_bytes * values:
        raise DecodeError(
            f"column {column.spec.name!r} of block {head.block_id} has {column.values_bytes} bytes "
            f"for {values} values of {column.row_bytes}"
        )
    if column.spec.layout == "shaped":
        pieces.append((column.shapes_at, 8 * values * column.rank))
    if column.shared is not None:
        pieces.append((column.references_at, 8 * head.rows))
    for at, size in pieces:
        if type(at) is not int or type(size) is not int or at < HEADER_BYTES or size < 0 or at + size > head.size_bytes:
            raise DecodeError(f"column {column.spec.name!r} reaches beyond its block {head.block_id}")


# ---------------------------------------------------------------- layouts


def has_offsets(layout: str) -> bool:
    return layout in ("ragged", "shaped") or layout in ENCODED_LAYOUTS


def item_bytes(dtype: str | None) -> int:
    """Bytes of one element of a torch type, by name; ValueError for an unknown one."""
    size = _ITEM_BYTES.get(dtype or "")
    if size is None:
        raise ValueError(f"unknown element type {dtype!r}")
    return size


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _indexes(column: EncodedColumn) -> Iterable[Int64s]:
    arrays = (column.offsets, column.shapes, column.references)
    return (np.ascontiguousarray(array) for array in arrays if array is not None)


_ITEM_BYTES = {
    **dict.fromkeys(("bool", "uint8", "int8"), 1),
    **dict.fromkeys(("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    "float4_e2m1fn_x2": 1,
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
