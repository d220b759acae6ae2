"""A set of positions in order, made for "give me the first n"."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int64s: TypeAlias = NDArray[np.int64]

_CHUNK_BITS = 10
CHUNK = 1 << _CHUNK_BITS


class OrderedBits:
    """A bitmap that counts its members per chunk of 1024 positions.

    Adding and removing k positions costs O(k + length / 1024), and so do the first k members.
    """

    def __init__(self) -> None:
        self._bits = np.zeros(CHUNK + 1, dtype=np.bool_)  # the last one never is: what lies beyond is looked up there
        self._counts = np.zeros(1, dtype=np.int64)
        self.total = 0

    def __len__(self) -> int:
        return self.total

    def contains(self, positions: Int64s) -> NDArray[np.bool_]:
        members: NDArray[np.bool_] = self._bits.take(positions, mode="clip") & (positions >= 0)
        return members

    def add(self, positions: Int64s) -> Int64s:
        """Add distinct positions; return those that were not members."""
        if len(positions) == 0:
            return positions
        self._grow(int(positions.max()) + 1)
        return self._flip(positions[~self._bits[positions]], True)

    def add_range(self, begin: int, end: int) -> None:
        """Add [begin, end), of which none is a member."""
        self._grow(end)
        self._bits[begin:end] = True
        for chunk in range(begin >> _CHUNK_BITS, ((end - 1) >> _CHUNK_BITS) + 1):
            start = chunk << _CHUNK_BITS
            self._counts[chunk] += min(end, start + CHUNK) - max(begin, start)
        self.total += end - begin

    def discard(self, positions: Int64s) -> Int64s:
        """Remove distinct positions of at least 0; return those that were members."""
        return self._flip(positions[self._bits.take(positions, mode="clip")], False)

    def first(self, count: int) -> Int64s:
        """The first `count` members in order, or all of them."""
        if count <= 0 or self.total == 0:
            return np.empty(0, dtype=np.int64)
        lead = int((self._counts > 0).argmax())
        if count <= self._counts[lead]:
            inside = self._bits[lead * CHUNK : (lead + 1) * CHUNK]
            return lead * CHUNK + inside.nonzero()[0][:count]
        chunks = self._counts.nonzero()[0]
        if count < self.total:
            enough = int(self._counts[chunks].cumsum().searchsorted(count)) + 1
            chunks = chunks[:enough]
        inside = self._bits[:-1].reshape(-1, CHUNK)[chunks].ravel()
        found = inside.nonzero()[0][:count]
        return chunks[found // CHUNK] * CHUNK + found % CHUNK

    def _flip(self, changed: Int64s, value: bool) -> Int64s:
        if len(changed) == 0:
            return changed
        self._bits[changed] = value
        counts = np.bincount(changed >> _CHUNK_BITS, minlength=len(self._counts))
        if value:
            self._counts += counts
            self.total += len(changed)
        else:
            self._counts -= counts
            self.total -= len(changed)
        return changed

    def _grow(self, length: int) -> None:
        size = len(self._bits) - 1
        if length <= size:
            return
        size = max(2 * size, -(-length // CHUNK) * CHUNK)
        bits = np.zeros(size + 1, dtype=np.bool_)
        bits[: len(self._bits)] = self._bits
        counts = np.zeros(size // CHUNK, dtype=np.int64)
        counts[: len(self._counts)] = self._counts
        self._bits, self._counts = bits, counts
