"""Files mapped for huge pages: placed so that they fit, and the same bytes with or without them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from transfer_queue.storage import mapping
from transfer_queue.storage.arena import Arena
from transfer_queue.storage.mapping import HUGE_BYTES, make_huge, map_file, map_privately

SIZE = 3 * HUGE_BYTES + 4096


class Witness:
    """Something whose end can be seen."""

    def __init__(self, ends: list[str]) -> None:
        self.ends = ends

    def __del__(self) -> None:
        self.ends.append("gone")


@pytest.fixture
def descriptor() -> Iterator[int]:
    opened = os.memfd_create("test")
    os.ftruncate(opened, SIZE)
    yield opened
    os.close(opened)


def test_a_file_is_mapped_shared_and_whole(descriptor: int) -> None:
    """What one mapping writes the other reads; both lie where huge pages fit, and end with their last view."""
    one, other = map_file(descriptor, SIZE), map_file(descriptor, SIZE)
    one[:] = np.arange(SIZE) % 251
    np.testing.assert_array_equal(other, one)
    assert one.nbytes == SIZE and one.ctypes.data % HUGE_BYTES == other.ctypes.data % HUGE_BYTES == 0
    address = f"{one.ctypes.data:x}-"
    part = one[5:7]
    del one
    assert address in Path("/proc/self/maps").read_text() and part.tolist() == [5, 6]
    del part
    assert address not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize(("start", "size"), [(0, SIZE), (HUGE_BYTES - 3, 10), (HUGE_BYTES + 64, 4096), (SIZE - 7, 7)])
def test_a_private_mapping_keeps_what_is_written_to_it(descriptor: int, start: int, size: int) -> None:
    """It shows the file, congruent to it modulo 2 MiB; writes stay in it; what it holds ends with its last view."""
    shared = map_file(descriptor, SIZE)
    shared[:] = np.arange(SIZE) % 251
    before = shared.copy()
    ends: list[str] = []
    private = map_privately(descriptor, start, size, Witness(ends))
    np.testing.assert_array_equal(private, before[start : start + size])
    assert private.ctypes.data % HUGE_BYTES == start % HUGE_BYTES
    private[:] = 255
    np.testing.assert_array_equal(shared, before)
    last = private[-1:]
    del private
    gc.collect()
    assert ends == [] and last[0] == 255
    del last
    assert ends == ["gone"]


def test_a_file_that_cannot_be_mapped_is_an_error() -> None:
    """The error says why, and nothing stays mapped."""
    read, write = os.pipe()
    with pytest.raises(OSError, match="cannot map 4096 bytes"):
        map_file(read, 4096)
    os.close(read)
    os.close(write)


def test_huge_pages_are_zero_and_reserved(descriptor: int) -> None:
    """Where the kernel has them, all whole ones are filled; elsewhere nothing happens."""
    memory = map_file(descriptor, SIZE)
    made = make_huge(descriptor, memory)
    assert made in (0, SIZE // HUGE_BYTES * HUGE_BYTES) or made % HUGE_BYTES == 0
    assert os.fstat(descriptor).st_blocks * 512 >= made
    assert not memory.any()


def test_an_arena_without_huge_pages_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older kernel does not know the request: the file is reserved and filled with small pages."""
    monkeypatch.setattr(mapping, "_MADV_COLLAPSE", -1)
    arena = Arena(tmp_path / "arena-1", SIZE)
    assert os.stat(arena.path).st_blocks * 512 >= SIZE
    arena.fill()
    arena.memory[-1] = 3
    assert Path(arena.path).read_bytes() == bytes(SIZE - 1) + b"\x03"
    arena.close()
