"""Shared-memory files, and the free space in them.

A file is reserved when it is created, so that full memory is an error there and never a fault at a write, and its
pages are filled in before it is offered, because first touch of a page is many times slower than the copy into it;
they are huge pages where the kernel has some.
It never changes its size. Space is reused warm; a file goes away only when it is empty and a larger one needs room.

Where a folder on disk is given, files there take what shared memory has no room for. They are mapped like the others,
so that nobody who reads or writes them knows the difference; what is kept in memory of them is the kernel's choice.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transfer_queue.errors import CapacityExceeded
from transfer_queue.extents import Extents
from transfer_queue.storage.facts import Fact, Kind
from transfer_queue.storage.mapping import make_huge, map_file

PAGE_BYTES = 4096
DEFAULT_ARENA_BYTES = 64 << 20

_FILL_BYTES = 1 << 20
_PREFIX = "arena-"
_DISK_PREFIX = "spilled-"


class Arena:
    """One file, mapped. `memory` is all of it; views of it outlive `close`."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Create the file; raises `CapacityExceeded` if there is no space for it."""
        assert size_bytes > 0 and size_bytes % PAGE_BYTES == 0, size_bytes
        self._describe(path, size_bytes)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, size_bytes)
            self.memory = map_file(descriptor, size_bytes)
            if not self.on_disk and size_bytes <= free_bytes(path.parent):
                self._huge_bytes = make_huge(descriptor, self.memory)
            os.posix_fallocate(descriptor, 0, size_bytes)
        except OSError as error:
            os.ftruncate(descriptor, 0)  # what was reserved is free at once, whoever keeps the error and so the mapping
            path.unlink()
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG, errno.EDQUOT):
                raise
            raise _no_space(path.parent, size_bytes, on_disk=self.on_disk) from error
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
        self.on_disk = is_on_disk(path.name)
        self.size_bytes = size_bytes
        self.extents = Extents(size_bytes)
        self._huge_bytes = 0  # from the start: huge pages, filled already

    def __repr__(self) -> str:
        return f"<Arena {self.path}: {self.extents.free_total} of {self.size_bytes} bytes free>"

    @property
    def is_empty(self) -> bool:
        return self.extents.free_total == self.size_bytes

    def fill(self) -> None:
        """Touch every page of memory. Overwrites: only before the arena is used. Runs without the interpreter lock."""
        if self.on_disk:
            return
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


@dataclass(frozen=True, slots=True)
class Spill:
    """Where arenas on disk go, and how much they take in all."""

    folder: Path
    capacity_bytes: int

    @classmethod
    def of(cls, folder: Path, capacity_bytes: int | None, known: Mapping[str, int]) -> Spill:
        return cls(folder, capacity_bytes or usual_capacity(folder, known, on_disk=True))

    @property
    def free_bytes(self) -> int:
        """How much the disk has left."""
        return free_bytes(self.folder)


@dataclass(frozen=True, slots=True)
class Planned:
    """An arena to be made."""

    size_bytes: int
    on_disk: bool


class Arenas:
    """The arenas of a unit: at most `capacity_bytes` in memory, then on disk. Not thread-safe, except `create`.

    Each life of a unit gives its files names of its own: who mapped a file knows it by its name.
    """

    def __init__(
        self,
        folder: Path,
        capacity_bytes: int,
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        spill: Spill | None = None,
    ) -> None:
        self.capacity_bytes = capacity_bytes // PAGE_BYTES * PAGE_BYTES
        self.arena_bytes = min(round_to_pages(arena_bytes), self.capacity_bytes)
        self.members: list[Arena] = []  # those in memory first
        self.facts: list[Fact] = []  # which members came and went, for who keeps account of them
        self.spill = spill
        self._folder = folder
        self._growing = {False: 0, True: 0}  # by `on_disk`: sizes that `plan_growth` gave out, not arenas yet
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

    @property
    def bytes_on_disk(self) -> int:
        return sum(arena.size_bytes for arena in self.members if arena.on_disk)

    @property
    def growing_bytes(self) -> int:
        return sum(self._growing.values())

    @property
    def low(self) -> bool:
        """Whether the arenas in memory are nearly full, and there may be another one."""
        free = sum(arena.extents.free_total for arena in self.members if not arena.on_disk)
        return bool(self.members) and free < self.arena_bytes // 4 and self._room(False) >= self.arena_bytes

    def check_first(self) -> None:
        """Raise `CapacityExceeded` if there is no space for the first arena."""
        if self.spill is None and self.arena_bytes > free_bytes(self._folder):
            raise _no_space(self._folder, self.arena_bytes, on_disk=False)

    def could_hold(self, size_bytes: int) -> bool:
        """Whether one arena could have so much in one piece, if it were empty."""
        return size_bytes <= max(self.capacity_bytes, 0 if self.spill is None else self.spill.capacity_bytes)

    def allocate(self, size_bytes: int, alignment: int) -> tuple[Arena, int] | None:
        """Return an arena and an offset in it, or None if no arena has so much in one piece."""
        for arena in self.members:
            offset = arena.extents.allocate(size_bytes, alignment)
            if offset is not None:
                return arena, offset
        return None

    def plan_growth(self, size_bytes: int) -> Planned | None:
        """Return a new arena that `size_bytes` fit in, now counted as growing; None if there is no room.

        Empty arenas make room for it, if that helps.
        """
        needed = round_to_pages(size_bytes)
        for on_disk in (False, True):
            room = self._room(on_disk)
            empty = [arena for arena in self.members if arena.is_empty and arena.on_disk == on_disk]
            if needed <= room + sum(arena.size_bytes for arena in empty):
                break
        else:
            return None
        while needed > room:
            arena = empty.pop()
            self.members.remove(arena)
            self.facts.append((Kind.ARENA_GONE, arena.name))
            arena.close()
            room += arena.size_bytes
        planned = Planned(min(max(needed, self.arena_bytes), room), on_disk)
        self._growing[on_disk] += planned.size_bytes
        return planned

    def create(self, planned: Planned) -> Arena:
        """Make the file for a planned arena; from any thread, one at a time. Raises as `Arena`."""
        self._created += 1
        prefix = _DISK_PREFIX if planned.on_disk else _PREFIX
        return Arena(self._path_of(f"{prefix}{self._life}-{self._created}"), planned.size_bytes)

    def add(self, arena: Arena) -> None:
        """Offer an arena that was planned, created and filled."""
        self.give_up(Planned(arena.size_bytes, arena.on_disk))
        self.members.append(arena)
        self.members.sort(key=lambda member: member.on_disk)
        self.facts.append((Kind.ARENA, arena.name, arena.size_bytes))

    def reopen(self, known: Mapping[str, int]) -> dict[str, str]:
        """Take over the files that an earlier life knew, by name and size; all their bytes count as taken.

        Other files, which were being made when it ended, are removed. Return why the missing ones could not be had.
        """
        missing = {}
        for name, size_bytes in known.items():
            try:
                self.members.append(Arena.reopen(self._path_of(name), size_bytes))
            except OSError as error:
                missing[name] = str(error)
        self.members.sort(key=lambda member: member.on_disk)
        kept = {arena.path for arena in self.members}
        left = list(self._folder.glob(f"{_PREFIX}*"))
        if self.spill is not None:
            left += self.spill.folder.glob(f"{_DISK_PREFIX}*")
        for path in left:
            if str(path) not in kept:
                path.unlink()
        return missing

    def give_up(self, planned: Planned) -> None:
        """A planned arena will not come."""
        self._growing[planned.on_disk] -= planned.size_bytes

    def close(self) -> None:
        """Remove the files. May be called twice."""
        while self.members:
            self.members.pop().close()

    def _room(self, on_disk: bool) -> int:
        """How much more arenas may take there.

        Where rows can go to disk, memory is left for others, the journals among them: nobody has to wait for it.
        """
        taken = sum(arena.size_bytes for arena in self.members if arena.on_disk == on_disk) + self._growing[on_disk]
        if self.spill is None:
            return 0 if on_disk else self.capacity_bytes - taken
        if on_disk:
            return min(self.spill.capacity_bytes - taken, self.spill.free_bytes)
        return min(self.capacity_bytes - taken, free_bytes(self._folder) - self.arena_bytes)

    def _path_of(self, name: str) -> Path:
        """Raises `FileNotFoundError` for a name on disk if there is no folder for it any more."""
        if not is_on_disk(name):
            return self._folder / name
        if self.spill is None:
            raise FileNotFoundError(f"it is on disk, and the unit was started without a folder there: {name}")
        return self.spill.folder / name


def is_on_disk(name: str) -> bool:
    """Whether the arena of this name is a file on disk."""
    return name.startswith(_DISK_PREFIX)


def usual_capacity(folder: Path, known: Mapping[str, int], *, on_disk: bool) -> int:
    """Return half of what is free in `folder`, with what the arenas take that are known already, by name and size."""
    taken = sum(size for name, size in known.items() if is_on_disk(name) == on_disk)
    return max((free_bytes(folder) + taken) // 2, PAGE_BYTES)


def free_bytes(folder: Path) -> int:
    """Return how many bytes the file system of `folder` can still take."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _no_space(folder: Path, size_bytes: int, *, on_disk: bool) -> CapacityExceeded:
    """Return the error that the file system of `folder` cannot take so much."""
    free = free_bytes(folder)
    kind, advice = "of shared memory", "lower capacity_bytes, or give the container a larger /dev/shm"
    if on_disk:
        kind, advice = "on disk", "or have backend.SimpleStorage.ssd_offload.path on a larger disk"
    return CapacityExceeded(
        f"no capacity for {size_bytes} more bytes {kind}: {free} bytes are free in {folder}; clear samples, {advice}",
        needed_bytes=size_bytes,
        free_bytes=free,
    )


def round_to_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
