"""A storage unit that has a folder on disk for what finds no memory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, Unit, free, ids, rows
from tests.unit.returning_unit import ReturningUnit
from tests.unit.serving import eventually
from transfer_queue.errors import CapacityExceeded
from transfer_queue.messages import Pin, Reserve
from transfer_queue.storage import arena as arenas_module
from transfer_queue.wire.holders import process_id

Opened = Callable[..., Unit]
ROW = MIB - 8192  # fills an arena


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def unit(folder: Path, disk: Path) -> Iterator[Unit]:
    made = Unit(folder, capacity_bytes=2 * MIB, arena_bytes=MIB, spill_folder=disk, spill_bytes=6 * MIB)
    with made.service:
        yield made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_finds_no_memory_goes_to_disk(unit: Unit, folder: Path, disk: Path) -> None:
    """Memory is full first; what is on disk is read as the rest, and both go with the unit."""
    stored = {unit.put(rows(1, ROW, first=number)): number for number in range(5)}
    stats = unit.stats()
    assert stats["bytes_arenas"] - stats["bytes_on_disk"] == stats["bytes_capacity"] == 2 * MIB
    assert stats["bytes_on_disk"] == 3 * MIB and len(names(disk)) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in disk.iterdir()} == {0o600}
    for block, number in stored.items():
        np.testing.assert_array_equal(unit.read(block, [0]), rows(1, ROW, first=number))
    pinned = unit.ask(Pin(blocks=ids(*stored), holder=process_id()))
    assert [Path(path).parent for path in pinned.arenas] == [folder] * 2 + [disk] * 3
    unit.service.close()
    assert names(disk) == set() and not list(folder.glob("arena-*"))


def test_memory_is_taken_before_space_on_disk_is_used_again(unit: Unit, disk: Path) -> None:
    blocks = [unit.put(rows(1, ROW)) for _ in range(4)]
    unit.tell(free(blocks[0], blocks[3]))
    before = names(disk)
    paths = [unit.reserve(ROW).arena for _ in range(2)]
    assert Path(paths[0]).parent != disk and Path(paths[1]).parent == disk
    assert names(disk) == before


def test_empty_files_go_when_a_larger_one_is_needed(unit: Unit, disk: Path) -> None:
    """A block may be larger than all memory of the unit; memory is not taken from for it."""
    unit.tell(free(*[unit.put(rows(1, ROW)) for _ in range(4)]))
    small = names(disk)
    large = unit.put(rows(1, 5 * MIB, first=7))
    np.testing.assert_array_equal(unit.read(large, [0]), rows(1, 5 * MIB, first=7))
    assert len(names(disk)) == 1 and names(disk).isdisjoint(small)
    assert unit.stats()["bytes_arenas"] - unit.stats()["bytes_on_disk"] == 2 * MIB


def test_there_is_a_limit_on_disk_too(unit: Unit) -> None:
    """What finds no space there either waits; what is larger than each of the two is refused at once."""
    blocks = [unit.put(rows(1, ROW)) for _ in range(8)]
    waiting = unit.begin(Reserve(size_bytes=ROW, holder=process_id(), timeout_s=5.0))
    impossible = unit.begin(Reserve(size_bytes=7 * MIB, holder=process_id(), timeout_s=5.0))
    with pytest.raises(CapacityExceeded, match="exceeds the capacity of the storage unit, 8388608 bytes"):
        impossible.result()
    assert waiting.replies == []
    unit.tell(free(blocks[-1]))
    waiting.result()


def free_in(memory_bytes: int, disk_bytes: int, disk: Path) -> Callable[[Path], int]:
    return lambda folder: disk_bytes if folder == disk else memory_bytes


def test_memory_that_others_need_is_left_to_them(unit: Unit, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/shm may be smaller than `capacity_bytes`, or used by others: an arena's worth of it stays free."""
    monkeypatch.setattr(arenas_module, "free_bytes", free_in(MIB + MIB // 2, 1 << 30, disk))
    unit.put(rows(1, ROW))  # the first arena was there already
    for number in range(2):
        block = unit.put(rows(1, ROW, first=number))
        np.testing.assert_array_equal(unit.read(block, [0]), rows(1, ROW, first=number))
    assert unit.stats()["bytes_on_disk"] == 2 * MIB


def test_memory_that_is_free_again_is_used(unit: Unit, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although files on disk have space."""
    with monkeypatch.context() as patch:
        patch.setattr(arenas_module, "free_bytes", free_in(0, 1 << 30, disk))
        blocks = [unit.put(rows(1, ROW)) for _ in range(3)]
    unit.tell(free(*blocks[1:]))
    unit.reserve(MIB // 2)  # notices that memory runs low
    eventually(lambda: unit.stats()["bytes_arenas"] - unit.stats()["bytes_on_disk"] == 2 * MIB)
    assert Path(unit.reserve(ROW).arena).parent != disk


def test_what_is_too_large_for_the_disk_does_not_stand_in_the_way(
    unit: Unit, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of others the disk has little left: a small put gets that, also behind a large one that waits; none fills it."""
    for _ in range(2):
        unit.put(rows(1, ROW))
    monkeypatch.setattr(arenas_module, "free_bytes", free_in(0, MIB // 2, disk))
    large = unit.begin(Reserve(size_bytes=4 * MIB, holder=process_id(), timeout_s=5.0))
    small = unit.begin(Reserve(size_bytes=MIB // 4, holder=process_id(), timeout_s=5.0))
    assert Path(small.result().arena).parent == disk and unit.stats()["bytes_on_disk"] == MIB // 2
    unit.turn(6.0)
    with pytest.raises(CapacityExceeded, match=f"files in {disk}, where {MIB // 2} bytes of disk are left"):
        large.result()


def test_a_full_disk_is_told(unit: Unit, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the folder and what is free in it; nothing of the file is left, and space that is freed serves again."""
    blocks = [unit.put(rows(1, ROW)) for _ in range(2)]
    reserve = os.posix_fallocate

    taken: list[int] = []

    def refuse(descriptor: int, offset: int, size: int) -> None:
        """Takes a part before it fails, as some file systems do."""
        if not os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(disk)):
            return reserve(descriptor, offset, size)
        reserve(descriptor, offset, size // 2)
        taken.append(os.dup(descriptor))
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    waiting = unit.begin(Reserve(size_bytes=ROW, holder=process_id(), timeout_s=5.0))
    eventually(lambda: unit.service._growth.full is not None)  # the attempt is over
    unit.turn(6.0)
    with pytest.raises(CapacityExceeded, match=f"on disk: [0-9]+ bytes are free in {disk}.*ssd_offload.path"):
        waiting.result()
    assert names(disk) == set() and unit.stats()["bytes_on_disk"] == 0
    for descriptor in taken:
        assert os.fstat(descriptor).st_blocks == 0
        os.close(descriptor)
    unit.tell(free(blocks[0]))
    unit.put(rows(1, ROW))


def returning(folder: Path, disk: Path | None) -> ReturningUnit:
    return ReturningUnit(folder, capacity_bytes=MIB, arena_bytes=MIB, spill_folder=disk)


def test_rows_on_disk_are_there_again_after_a_kill(folder: Path, disk: Path) -> None:
    """And files that nobody knows are removed."""
    unit = returning(folder, disk)
    try:
        stored = {unit.commit(rows(1, ROW, first=number)): number for number in range(3)}
        left = disk / "spilled-begun"
        left.write_bytes(bytes(8192))
        unit.come_back()
        assert unit.service.lost_blocks == {} and not left.exists()
        for block, number in stored.items():
            np.testing.assert_array_equal(unit.read(block, [0]), rows(1, ROW, first=number))
        unit.tell(free(*stored))
        assert unit.all_free() and unit.stats()["bytes_on_disk"] == 2 * MIB
    finally:
        unit.close()


@pytest.mark.parametrize("case", ["removed", "not configured"])
def test_rows_whose_file_is_not_there_are_lost_and_named(folder: Path, disk: Path, case: str) -> None:
    unit = returning(folder, disk)
    try:
        kept, lost = unit.commit(rows(1, ROW, first=1)), unit.commit(rows(1, ROW, first=2))
        unit.die()
        if case == "removed":
            [path] = disk.iterdir()
            path.unlink()
        else:
            unit._options["spill_folder"] = None
        unit.start()
        unit.service.return_to(3, unit.controller.reconcile)
        [(block, reason)] = unit.service.lost_blocks.items()
        assert block == lost and "spilled-" in reason
        np.testing.assert_array_equal(unit.read(kept, [0]), rows(1, ROW, first=1))
    finally:
        unit.close()


def test_without_a_folder_what_is_larger_than_the_capacity_is_refused_at_once(folder: Path) -> None:
    made: Any = Unit(folder, capacity_bytes=2 * MIB, arena_bytes=MIB)
    with made.service, pytest.raises(CapacityExceeded, match="exceeds the capacity"):
        made.reserve(5 * MIB)
