"""A file layer that fails on demand, and helpers to look at and to harm the files of a journal."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from transfer_queue.journal import Journal
from transfer_queue.journal.evidence import Scanned, scan
from transfer_queue.journal.files import Files
from transfer_queue.journal.layout import read_segment_header
from transfer_queue.journal.names import list_segments

SMALL: dict[str, Any] = {"segment_bytes": 4096, "reserve_bytes": 0}


class FaultyFiles(Files):
    """Does what the real one does, as long as it may."""

    def __init__(self, at_step: Callable[[str], None] = lambda step: None) -> None:
        self.failing: set[str] = set()  # names of calls that raise EIO
        self.space_bytes: int | None = None  # what is left of the disk; None: enough
        self.write_bytes: int | None = None  # the most that one write takes
        self.calls: list[str] = []
        self._at_step = at_step

    def create(self, path: Path) -> int:
        self._step("create", path.name)
        return super().create(path)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        self._step("allocate", str(size_bytes))
        if self.space_bytes is not None:
            if size_bytes > self.space_bytes:
                raise OSError(errno.ENOSPC, "no space")
            self.space_bytes -= size_bytes
        super().allocate(descriptor, size_bytes)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        self._step("write", str(len(data)))
        takes = len(data) if self.write_bytes is None else min(self.write_bytes, len(data))
        if self.space_bytes is not None:
            takes = min(takes, self.space_bytes)
            self.space_bytes -= takes
            if not takes:
                raise OSError(errno.ENOSPC, "no space")
        return super().write(descriptor, memoryview(data)[:takes])

    def fsync(self, descriptor: int) -> None:
        self._step("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        super().fsync(descriptor)

    def fsync_folder(self, path: Path) -> None:
        self._step("fsync_folder", path.name)
        super().fsync_folder(path)

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", new.name)
        super().rename(old, new)

    def unlink(self, path: Path) -> None:
        self._step("unlink", path.name)
        super().unlink(path)

    def count(self, call: str) -> int:
        return sum(step.split()[0] == call for step in self.calls)

    def _step(self, call: str, what: str) -> None:
        self.calls.append(f"{call} {what}")
        self._at_step(f"{call} {what}")
        if call in self.failing:
            raise OSError(errno.EIO, f"{call} failed")


def copied(folder: Path, to: Path) -> Path:
    """Return a copy of a journal as a process that dies now would leave it."""
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # the journal's thread gave up a segment for which there was no space
            shutil.copy2(path, to)
    return to


def written(folder: Path, *records: bytes, **options: Any) -> Path:
    """Return the folder after a journal with these records was written into it and closed."""
    with Journal.open(folder, **{**SMALL, **options})[0] as journal:
        for record in records:
            journal.append(record)
    return folder


def recovered(folder: Path, **options: Any) -> list[bytes]:
    journal, found = Journal.open(folder, **{**SMALL, **options})
    journal.close()
    return list(found.records)


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a journal, except its lock."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "lock"}


def segments(folder: Path) -> list[Scanned]:
    """Return the segments in use, as a reader sees each of them."""
    found = []
    for path in list_segments(folder).values():
        data = path.read_bytes()
        header = read_segment_header(data)
        assert not isinstance(header, str), header
        found.append(scan(path, data, header))
    return found


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def flip(path: Path, at: int, bit: int) -> None:
    overwrite(path, at, bytes([path.read_bytes()[at] ^ 1 << bit]))
