"""The calls to the file system that can fail, behind one small object, so that tests can make each of them fail."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from transfer_queue.errors import CapacityExceeded, JournalUnavailable, TransferQueueError

_OPEN = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
_FILL_BYTES = 16 << 20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM)


class Files:
    """The real ones. Every method raises `OSError`; files are the owner's alone."""

    def create(self, path: Path) -> int:
        """Create an empty file and return its descriptor."""
        return os.open(path, _OPEN, 0o600)

    def allocate(self, descriptor: int, size_bytes: int) -> None:
        """Fill an empty file with zeros, space first: then no later write to it can meet a full disk.

        The zeros are written and not left to the file system, so that an append does not pay for its first touch of a
        page, nor a sync for turning reserved space into used space (PostgreSQL does the same: `wal_init_zero`).
        """
        os.posix_fallocate(descriptor, 0, size_bytes)
        zeros = memoryview(bytes(min(size_bytes, _FILL_BYTES)))
        at = 0
        while at < size_bytes:
            at += os.pwrite(descriptor, zeros[: size_bytes - at], at)

    def write(self, descriptor: int, data: bytes | memoryview) -> int:
        """Write at the file's position; may write less than all."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Wait until a file, pages written through a mapping included, is on the disk."""
        os.fsync(descriptor)

    def fsync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def unlink(self, path: Path) -> None:
        os.unlink(path)


REAL_FILES = Files()


def write_all(files: Files, descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data`, in as many pieces as it takes."""
    left = memoryview(data).cast("B")
    while left:
        left = left[files.write(descriptor, left) :]


def failure(error: OSError, folder: Path, what: str, needed_bytes: int) -> TransferQueueError:
    """Return our error for one of the file system: no space, or a disk that does not work."""
    if error.errno not in _NO_SPACE:
        return JournalUnavailable(f"{what} failed in {folder}: {error}; see to its disk", folder=str(folder))
    free_bytes = _free_bytes(folder)
    return CapacityExceeded(
        f"no capacity for {what}: it needs {needed_bytes} bytes and {free_bytes} are free in {folder}; "
        "clear samples, free space there, or put the journal into a larger folder",
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
        folder=str(folder),
    )


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize
