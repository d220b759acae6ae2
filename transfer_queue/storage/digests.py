"""Checksums of long runs of bytes: xxh3, 64 bits, one for each chunk of 512 KiB, so that threads can share the work.

A chunk is small enough to be still in the cache of the core that has just copied it. (xxh3 is by Yann Collet; the
package `xxhash` releases the interpreter lock for chunks of more than 100 KB.)
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from transfer_queue.storage.shares import run_all

Bytes: TypeAlias = NDArray[np.uint8]
Digests: TypeAlias = NDArray[np.uint64]

CHUNK_BYTES = 1 << 19
DIGEST_BYTES = 8


def digest(data: memoryview | bytes | bytearray) -> int:
    found: int = xxhash.xxh3_64_intdigest(data)
    return found


def digest_all(parts: Sequence[Bytes]) -> int:
    """Return the checksum of bytes that lie in several places."""
    if len(parts) == 1:
        return digest(parts[0].data)
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part.data)
    found: int = state.intdigest()
    return found


def chunk_count(size_bytes: int) -> int:
    return -(-size_bytes // CHUNK_BYTES)


def chunks(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cut each range (start, bytes) into chunks; return where these begin and end, in order."""
    return [
        (at, min(at + CHUNK_BYTES, start + size))
        for start, size in ranges
        for at in range(start, start + size, CHUNK_BYTES)
    ]


def digest_pieces(
    pieces: Sequence[tuple[int, Bytes]], chunks: Sequence[tuple[int, int]], memory: Bytes | None = None
) -> Digests:
    """Return the checksums of chunks of a block to be; copy it to `memory` on the way, if there is one.

    pieces  the bytes, and where they belong, in order; together they are what the chunks are cut from
    """
    work = _Digesting(pieces, chunks, memory)
    run_all([work])
    return work.digests


class _Digesting:
    """The chunks of a block, which are its parts: each is copied, if at all, and then read again from the cache."""

    def __init__(
        self, pieces: Sequence[tuple[int, Bytes]], chunks: Sequence[tuple[int, int]], memory: Bytes | None
    ) -> None:
        self.size_bytes = sum(buffer.nbytes for _, buffer in pieces)
        self.parts = len(chunks)
        self.digests = np.zeros(self.parts, np.uint64)
        self._chunks = chunks
        self._pieces = pieces
        self._offsets = [offset for offset, _ in pieces]
        self._memory = memory

    def run(self, begin: int, end: int) -> None:
        memory, digests, pieces = self._memory, self.digests, self._pieces
        for number in range(begin, end):
            start, stop = self._chunks[number]
            piece = bisect.bisect_right(self._offsets, start) - 1
            offset, buffer = pieces[piece]
            part = buffer[start - offset : stop - offset]
            if memory is None:
                digests[number] = digest_all(self._parts(piece, start, stop))
                continue
            target = memory[start:stop]
            if part.nbytes == stop - start:
                target[:] = part
            else:
                np.concatenate(self._parts(piece, start, stop), out=target)
            digests[number] = digest(target.data)

    def _parts(self, piece: int, start: int, stop: int) -> list[Bytes]:
        """Return the bytes [start, stop), which begin in the given piece."""
        parts = []
        for offset, buffer in itertools.islice(self._pieces, piece, None):
            if offset >= stop:
                break
            parts.append(buffer[max(start - offset, 0) : stop - offset])
        return parts
