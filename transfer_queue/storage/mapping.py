"""Files in shared memory, mapped so that the kernel can use huge pages.

Through small pages, a process meets each 4 KiB of a file with a fault of its own, which costs several times as much as
the copy that it interrupts; a huge page of 2 MiB takes one. Two things are needed. The file must consist of huge pages:
`make_huge` asks for that, and Linux 6.1 or later can do it whatever the system's settings for shared memory are. And
address and offset must agree modulo 2 MiB: `map_file` sees to it. Without huge pages all works the same, slower.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.storage.shares import run_all

Bytes: TypeAlias = NDArray[np.uint8]

HUGE_BYTES = 2 << 20

_PAGES_AT_ONCE = 16
_MADV_COLLAPSE = 25  # of <linux/mman.h>, like the next two; this Python may not name them
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000


class Mapping(mmap.mmap):
    """A run of addresses that ends with its last view. It keeps `hold` alive as long as it lives itself."""

    hold: object


def map_file(descriptor: int, size_bytes: int) -> Bytes:
    """Map the start of a file shared and writable; the mapping ends with the last view of the array."""
    return _map(descriptor, 0, size_bytes, mmap.MAP_SHARED, None)


def map_privately(descriptor: int, start: int, size_bytes: int, hold: object) -> Bytes:
    """Map [start, +size_bytes) of a file copy-on-write: writable, and writes stay in the views of this array.

    `hold` lives as long as they do.
    """
    first = start // HUGE_BYTES * HUGE_BYTES
    end = min(-(-(start + size_bytes) // HUGE_BYTES) * HUGE_BYTES, os.fstat(descriptor).st_size)
    return _map(descriptor, first, end - first, mmap.MAP_PRIVATE, hold)[start - first :][:size_bytes]


def make_huge(descriptor: int, memory: Bytes) -> int:
    """Fill an empty file, mapped as `memory`, with huge pages of zeros; return how many leading bytes have them now.

    Does not raise if there is no room or if the kernel cannot do it: the rest stays as it was.
    """
    filling = _Filling(descriptor, memory)
    run_all([filling])
    return min(filling.failed_at, default=filling.size_bytes)


class _Filling:
    """Huge pages for an empty file, which are its parts."""

    def __init__(self, descriptor: int, memory: Bytes) -> None:
        self.size_bytes = memory.nbytes // HUGE_BYTES * HUGE_BYTES
        self.parts = self.size_bytes // HUGE_BYTES
        self.failed_at: list[int] = []
        self._descriptor = descriptor
        self._memory = memory

    def run(self, begin: int, end: int) -> None:
        for first in range(begin, end, _PAGES_AT_ONCE):
            last = min(first + _PAGES_AT_ONCE, end)
            if not self._fill(first * HUGE_BYTES, last * HUGE_BYTES):
                self.failed_at.append(first * HUGE_BYTES)
                return

    def _fill(self, start: int, stop: int) -> bool:
        try:
            for at in range(start, stop, HUGE_BYTES):
                os.pwrite(self._descriptor, b"\0", at)  # a page is extended to a huge one, but a hole is not
        except OSError:
            return False
        found: int = _libc().madvise(self._memory.ctypes.data + start, stop - start, _MADV_COLLAPSE)
        return found == 0


def _map(descriptor: int, offset: int, size_bytes: int, flags: int, hold: object) -> Bytes:
    """Map [offset, +size_bytes) over a part of a larger run of addresses, which owns it."""
    run = Mapping(-1, size_bytes + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    run.hold = hold
    room = np.frombuffer(run, np.uint8)
    skip = (offset - room.ctypes.data) % HUGE_BYTES
    address = room.ctypes.data + skip
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc().mmap(address, size_bytes, protection, flags | _MAP_FIXED, descriptor, offset) != address:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot map {size_bytes} bytes: {os.strerror(number)}")
    return room[skip : skip + size_bytes]


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
