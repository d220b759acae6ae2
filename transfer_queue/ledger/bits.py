"""A set of positions in order, made for "give me the first n"."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Int64s: TypeAlias = NDArray[np.int64]

CHUNK = 1024


class OrderedBits:
    """A bitmap that counts its members per chunk of 1024 positions.

    Adding and removing k positions costs O(k + length / 1024), and so do the first k members.
    """

    def __init__(self) -> None:
        self._bits = np.zeros(CHUNK, dtype=np.bool_)
        self._counts = np.zeros(1, dtype=np.int64)
        self.total = 0

    def __len__(self) -> int:
        return self.total

    def contains(self, positions: Int64s) -> NDArray[np.bool_]:
        inside: NDArray[np.bool_] = (positions >= 0) & (positions < len(self._bits))
        return inside & self._bits.take(positions, mode="clip")

    def add(self, positions: Int64s) -> Int64s:
        """Add distinct positions; return those that were not members."""
        if len(positions) == 0:
            return positions
        self._grow(int(positions.max()) + 1)
        return self._flip(positions[~self._bits[positions]], True)

    def discard(self, positions: Int64s) -> Int64s:
        """Remove distinct positions; return those that were members."""
        return self._flip(positions[self.contains(positions)], False)

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
        inside = self._bits.reshape(-1, CHUNK)[chunks].ravel()
        found = inside.nonzero()[0][:count]
        return chunks[found // CHUNK] * CHUNK + found % CHUNK

    def _flip(self, changed: Int64s, value: bool) -> Int64s:
        if len(changed) == 0:
            return changed
        self._bits[changed] = value
        step = 1 if value else -1
        self._counts += step * np.bincount(changed // CHUNK, minlength=len(self._counts))
        self.total += step * len(changed)
        return changed

    def _grow(self, length: int) -> None:
        if length <= len(self._bits):
            return
        size = max(2 * len(self._bits), -(-length // CHUNK) * CHUNK)
        bits = np.zeros(size, dtype=np.bool_)
        bits[: len(self._bits)] = self._bits
        counts = np.zeros(size // CHUNK, dtype=np.int64)
        counts[: len(self._counts)] = self._counts
        self._bits, self._counts = bits, counts
