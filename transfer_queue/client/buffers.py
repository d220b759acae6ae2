"""Memory for large results, reused when the tensors made from it are gone.

First touch of fresh memory is many times slower than the copy into it. A buffer is given out as NumPy arrays that are
its parts; when neither these nor any view, tensor or storage made from them is left, the buffer is idle and warm for
the next one.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence

import numpy as np

from transfer_queue.storage.mapping import HUGE_BYTES, Bytes

POOLED_BYTES = 1 << 20
DEFAULT_IDLE_BYTES = 1 << 30

_CLASSES_PER_POWER = 8


class BufferPool:
    """Usable from any thread, and after a fork. At most `max_idle_bytes` are kept for reuse.

    Buffers come back from garbage collection, which may strike anywhere, so no lock is taken: lists are only appended
    to and popped from, which the interpreter does as one step.
    """

    def __init__(self, max_idle_bytes: int = DEFAULT_IDLE_BYTES) -> None:
        self._max_idle_bytes = max_idle_bytes
        self._idle: dict[int, list[mmap.mmap]] = {}  # by size

    def __repr__(self) -> str:
        return f"<BufferPool: {self.idle_bytes} of {self._max_idle_bytes} bytes idle>"

    @property
    def idle_bytes(self) -> int:
        return sum(size * len(buffers) for size, buffers in list(self._idle.items()))

    def take(self, size_bytes: int, cuts: Sequence[tuple[int, int]]) -> tuple[Bytes, list[Bytes]]:
        """Return an array of `size_bytes`, contents arbitrary, and parts of it: `cuts` are (start, size) of each.

        The memory returns when the last view of the last part is gone: give up the whole before. Until then the system
        may take the pages of parts that are gone, if memory runs short.
        """
        if size_bytes < POOLED_BYTES:
            small = np.empty(size_bytes, np.uint8)
            return small, [small[start : start + size] for start, size in cuts]
        size = _class_size(size_bytes)
        idle = self._idle.setdefault(size, [])
        try:
            buffer = idle.pop()
        except IndexError:
            buffer = _fresh(size)
        living = list(range(len(cuts)))
        parts = []
        for start, length in cuts:
            part = np.frombuffer(buffer, np.uint8, length, start)
            # Views of it, and torch storages made from them, keep the part itself alive: NumPy hands on the base.
            weakref.finalize(part, self._end_part, buffer, living, start, length).atexit = False
            parts.append(part)
        return np.frombuffer(buffer, np.uint8, size_bytes), parts

    def clear(self) -> None:
        """Give idle memory back to the operating system."""
        for buffers in list(self._idle.values()):
            buffers.clear()

    def _end_part(self, buffer: mmap.mmap, living: list[int], start: int, size_bytes: int) -> None:
        """Note that a part is gone; the last one takes the buffer back."""
        if len(living) > 1:
            _release(buffer, start, start + size_bytes)
        if living.pop() == 0 and self.idle_bytes + len(buffer) <= self._max_idle_bytes:
            self._idle[len(buffer)].append(buffer)


def _release(buffer: mmap.mmap, start: int, end: int) -> None:
    """Tell the system that it may take the huge pages of this range; writing to them makes them ours again."""
    first, last = -(-start // HUGE_BYTES) * HUGE_BYTES, end // HUGE_BYTES * HUGE_BYTES
    if last > first and hasattr(mmap, "MADV_FREE"):
        buffer.madvise(mmap.MADV_FREE, first, last - first)


def _fresh(size: int) -> mmap.mmap:
    buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # private: a forked child has its own
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        except OSError:  # the kernel was built without huge pages
            return buffer
    return buffer


def _class_size(size: int) -> int:
    """Round up to an eighth of a power of two, so that buffers of about one size replace each other."""
    step = 1 << max(size.bit_length() - 1, 0)
    step = max(step // _CLASSES_PER_POWER, 1)
    return -(-size // step) * step
