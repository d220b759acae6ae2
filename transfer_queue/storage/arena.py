"""Shared-memory files, and the free space in them.

A file is reserved when it is created, so that full memory is an error there and never a fault at a write, and its
pages are filled in before it is offered, because first touch of a page is many times slower than the copy into it;
they are huge pages where the kernel has some.
It never changes its size. Space is reused warm; a file goes away only when it is empty and a larger one needs room.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from transfer_queue.errors import CapacityExceeded
from transfer_queue.extents import Extents
from transfer_queue.storage.facts import Fact, Kind
from transfer_queue.storage.mapping import make_huge, map_file

PAGE_BYTES = 4096
DEFAULT_ARENA_BYTES = 64 << 20

_FILL_BYTES = 1 << 20
_PREFIX = "arena-"


class Arena:
    """One file, mapped. `memory` is all of it; views of it outlive `close`."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Create the file; raises `CapacityExceeded` if there is no memory for it."""
        assert size_bytes > 0 and size_bytes % PAGE_BYTES == 0, size_bytes
        self._describe(path, size_bytes)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            self.memory = map_file(descriptor, size_bytes)
            if size_bytes <= free_bytes(path.parent):
                self._huge_bytes = make_huge(descriptor, self.memory)
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            path.unlink()
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
                raise
            raise no_memory(path.parent, size_bytes) from error
        finally:
            os.close(descriptor)

    @classmethod
    def reopen(cls, path: Path, size_bytes: int) -> Arena:
        """Map a file that an earlier process filled, all of it taken; raises `OSError` if it is not there as it was."""
        arena = cls.__new__(cls)
        arena._describe(path, size_bytes)
        arena.extents.claim(0, size_bytes)
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor).st_size
            if found != size_bytes:
                raise OSError(f"it has {found} bytes instead of {size_bytes}")
            os.posix_fallocate(descriptor, 0, size_bytes)  # changes nothing, unless somebody punched a hole
            arena.memory = map_file(descriptor, size_bytes)
        finally:
            os.close(descriptor)
        return arena

    def _describe(self, path: Path, size_bytes: int) -> None:
        self.path = str(path)
        self.name = path.name
        self.size_bytes = size_bytes
        self.extents = Extents(size_bytes)
        self._huge_bytes = 0  # from the start: huge pages, filled already

    def __repr__(self) -> str:
        return f"<Arena {self.path}: {self.extents.free_total} of {self.size_bytes} bytes free>"

    def fill(self) -> None:
        """Touch every page. Overwrites: only before the arena is used. Runs without the interpreter lock."""
        zeros = bytes(_FILL_BYTES)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            for start in range(self._huge_bytes, self.size_bytes, _FILL_BYTES):
                os.pwrite(descriptor, zeros[: self.size_bytes - start], start)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Remove the file. May be called twice."""
        Path(self.path).unlink(missing_ok=True)


class Arenas:
    """The arenas of a unit: at most `capacity_bytes` in all. Not thread-safe, except `create`.

    Each life of a unit gives its files names of its own: who mapped a file knows it by its name.
    """

    def __init__(self, folder: Path, capacity_bytes: int, arena_bytes: int = DEFAULT_ARENA_BYTES) -> None:
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self.arena_bytes = min(round_to_pages(arena_bytes), self.capacity_bytes)
        self.members: list[Arena] = []
        self.growing_bytes = 0  # sizes given out by `plan_growth` that did not become arenas yet
        self.facts: list[Fact] = []  # which members came and went, for who keeps account of them
        self._folder = folder
        self._life = secrets.token_hex(4)
        self._created = 0

    def __repr__(self) -> str:
        return f"<Arenas: {len(self.members)} of {self.total_bytes} bytes, {self.free_bytes} free>"

    @property
    def total_bytes(self) -> int:
        return sum(arena.size_bytes for arena in self.members)

    @property
    def free_bytes(self) -> int:
        return sum(arena.extents.free_total for arena in self.members)

    def allocate(self, size_bytes: int, alignment: int) -> tuple[Arena, int] | None:
        """Return an arena and an offset in it, or None if no arena has so much in one piece."""
        for arena in self.members:
            offset = arena.extents.allocate(size_bytes, alignment)
            if offset is not None:
                return arena, offset
        return None

    def plan_growth(self, size_bytes: int) -> int | None:
        """Return the size for a new arena that `size_bytes` fit in, now counted as growing; None if there is no room.

        Empty arenas make room for it, if that helps.
        """
        needed = round_to_pages(size_bytes)
        room = self.capacity_bytes - self.total_bytes - self.growing_bytes
        empty = [arena for arena in self.members if arena.extents.free_total == arena.size_bytes]
        if needed > room + sum(arena.size_bytes for arena in empty):
            return None
        while needed > room:
            arena = empty.pop()
            self.members.remove(arena)
            self.facts.append((Kind.ARENA_GONE, arena.name))
            arena.close()
            room += arena.size_bytes
        planned = min(max(needed, self.arena_bytes), room)
        self.growing_bytes += planned
        return planned

    def create(self, size_bytes: int) -> Arena:
        """Make the file for a planned arena; from any thread, one at a time. Raises as `Arena`."""
        self._created += 1
        return Arena(self._folder / f"{_PREFIX}{self._life}-{self._created}", size_bytes)

    def add(self, arena: Arena) -> None:
        """Offer an arena that was planned, created and filled."""
        self.growing_bytes -= arena.size_bytes
        self.members.append(arena)
        self.facts.append((Kind.ARENA, arena.name, arena.size_bytes))

    def reopen(self, known: Mapping[str, int]) -> dict[str, str]:
        """Take over the files that an earlier life knew, by name and size; all their bytes count as taken.

        Other files, which were being made when it ended, are removed. Return why the missing ones could not be had.
        """
        missing = {}
        for name, size_bytes in known.items():
            try:
                self.members.append(Arena.reopen(self._folder / name, size_bytes))
            except OSError as error:
                missing[name] = str(error)
        kept = {arena.name for arena in self.members}
        for path in self._folder.glob(f"{_PREFIX}*"):
            if path.name not in kept:
                path.unlink()
        return missing

    def give_up(self, size_bytes: int) -> None:
        """A planned arena will not come."""
        self.growing_bytes -= size_bytes

    def close(self) -> None:
        """Remove the files. May be called twice."""
        while self.members:
            self.members.pop().close()


def free_bytes(folder: Path) -> int:
    """Return how many bytes the file system of `folder` can still take."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def no_memory(folder: Path, size_bytes: int) -> CapacityExceeded:
    """Return the error that the file system of `folder` cannot take so much."""
    free = free_bytes(folder)
    return CapacityExceeded(
        f"no capacity for {size_bytes} more bytes of shared memory: {free} bytes are free in {folder}; "
        "clear samples, lower capacity_bytes, or give the container a larger /dev/shm",
        needed_bytes=size_bytes,
        free_bytes=free,
    )


def round_to_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
