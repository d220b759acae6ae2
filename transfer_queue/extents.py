"""Free ranges of a line of numbers: bytes of an arena, or slots of a table.

Free ranges are kept in size classes, sixteen to each power of two, with one bit per class that has any, so that a
request looks at one range, however many there are. Neighbouring free ranges are one range at all times.
(The layout of classes is that of "TLSF: a New Dynamic Memory Allocator for Real-Time Systems", Masmano et al., 2004.)
"""

from __future__ import annotations

_STEP_BITS = 4
_STEPS = 1 << _STEP_BITS


class Extents:
    """Allocates runs of [0, size). Not thread-safe."""

    __slots__ = ("_by_end", "_by_start", "_classes", "_filled", "free_total", "size")

    def __init__(self, size: int = 0) -> None:
        self.size = 0
        self.free_total = 0
        self._by_start: dict[int, int] = {}  # start -> length of each free range
        self._by_end: dict[int, int] = {}  # end -> start
        self._classes: dict[int, dict[int, None]] = {}  # class -> starts, the most recently freed last
        self._filled = 0  # bit c: class c has ranges
        self.extend(size)

    def __repr__(self) -> str:
        return f"<Extents: {self.free_total} of {self.size} free in {len(self._by_start)} ranges>"

    @property
    def largest(self) -> int:
        """Length of the longest free range."""
        if not self._filled:
            return 0
        return max(self._by_start[start] for start in self._classes[self._filled.bit_length() - 1])

    def ranges(self) -> list[tuple[int, int]]:
        """Return (start, length) of the free ranges, in order."""
        return sorted(self._by_start.items())

    def load(self, size: int, free: list[tuple[int, int]]) -> None:
        """Become [0, size) with exactly these (start, length) free."""
        assert self.size == 0, "only what is empty can be loaded"
        self.size = size
        for start, length in free:
            self.free(start, length)

    def extend(self, new_size: int) -> None:
        """Add [size, new_size) to what is free."""
        assert new_size >= self.size, f"cannot shrink {self.size} to {new_size}"
        start, self.size = self.size, new_size
        if new_size > start:
            self.free(start, new_size - start)

    def allocate(self, length: int, alignment: int = 1) -> int | None:
        """Take a run and return its start, a multiple of `alignment`; None if no free range is long enough.

        A range of a larger class is taken whatever its place; only when there is none are the ranges of the class of
        `length` itself looked through, so that a run that fits exactly is found.
        """
        assert length > 0 and alignment > 0, (length, alignment)
        needed = length + alignment - 1
        larger = self._filled >> (first := _class_above(needed))
        if larger:
            fitting = first + (larger & -larger).bit_length() - 1
            return self._cut(next(reversed(self._classes[fitting])), length, alignment)
        for candidate in range(_class_of(length), first):
            for start in self._classes.get(candidate, ()):
                if -start % alignment + length <= self._by_start[start]:
                    return self._cut(start, length, alignment)
        return None

    def claim(self, start: int, length: int) -> None:
        """Take this very run, all of which is free."""
        begin = max((known for known in self._by_start if known <= start), default=None)
        assert begin is not None and start + length <= begin + self._by_start[begin], f"[{start}, +{length}) is taken"
        whole = self._by_start[begin]
        self._remove(begin)
        if start > begin:
            self._insert(begin, start - begin)
        if start + length < begin + whole:
            self._insert(start + length, begin + whole - start - length)
        self.free_total -= length

    def free(self, start: int, length: int) -> None:
        """Give back a run, or any part of one; parts may come back in any order."""
        assert length > 0 and start >= 0 and start + length <= self.size, f"[{start}, +{length}) is not in {self!r}"
        assert start not in self._by_start and start + length not in self._by_end, (
            f"[{start}, +{length}) is free already"
        )
        self.free_total += length
        end = start + length
        before = self._by_end.get(start)
        if before is not None:
            self._remove(before)
            start = before
        after = self._by_start.get(end)
        if after is not None:
            self._remove(end)
            end += after
        self._insert(start, end - start)

    def _cut(self, start: int, length: int, alignment: int) -> int:
        whole = self._by_start[start]
        self._remove(start)
        padding = -start % alignment
        if padding:
            self._insert(start, padding)
        if whole > padding + length:
            self._insert(start + padding + length, whole - padding - length)
        self.free_total -= length
        return start + padding

    def _insert(self, start: int, length: int) -> None:
        self._by_start[start] = length
        self._by_end[start + length] = start
        size_class = _class_of(length)
        self._classes.setdefault(size_class, {})[start] = None
        self._filled |= 1 << size_class

    def _remove(self, start: int) -> None:
        length = self._by_start.pop(start)
        del self._by_end[start + length]
        size_class = _class_of(length)
        members = self._classes[size_class]
        del members[start]
        if not members:
            del self._classes[size_class]
            self._filled &= ~(1 << size_class)


def _class_of(length: int) -> int:
    """Class of a range of this length: its power of two, and the four bits behind the first one."""
    shift = max(length.bit_length() - 1 - _STEP_BITS, 0)
    return shift * _STEPS + (length >> shift)


def _class_above(length: int) -> int:
    """Smallest class of which every range is at least this long."""
    shift = max(length.bit_length() - 1 - _STEP_BITS, 0)
    return _class_of(length + (1 << shift) - 1)
