"""Memory for large results, reused when the tensors made from it are gone.

First touch of fresh memory is many times slower than the copy into it. A buffer is given out as a NumPy array; when
neither that array nor any view, tensor or storage made from it is left, the buffer is idle and warm for the next one.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
from numpy.typing import NDArray

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

    def take(self, size_bytes: int) -> NDArray[np.uint8]:
        """Return an array of `size_bytes`, contents arbitrary; memory returns when its last view is gone."""
        if size_bytes < POOLED_BYTES:
            return np.empty(size_bytes, np.uint8)
        size = _class_size(size_bytes)
        idle = self._idle.setdefault(size, [])
        try:
            buffer = idle.pop()
        except IndexError:
            buffer = _fresh(size)
        whole = np.frombuffer(buffer, np.uint8)
        # Views of `whole`, and torch storages made from them, keep `whole` itself alive: NumPy hands on the base.
        weakref.finalize(whole, self._give_back, buffer).atexit = False
        return whole[:size_bytes]

    def clear(self) -> None:
        """Give idle memory back to the operating system."""
        for buffers in list(self._idle.values()):
            buffers.clear()

    def _give_back(self, buffer: mmap.mmap) -> None:
        if self.idle_bytes + len(buffer) <= self._max_idle_bytes:
            self._idle[len(buffer)].append(buffer)


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
