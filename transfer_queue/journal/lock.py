"""One writer at a time: a lock on a file in the folder, which the kernel gives up when the process dies."""

from __future__ import annotations

import fcntl
import functools
import os
import weakref
from pathlib import Path

from transfer_queue.errors import JournalUnavailable
from transfer_queue.journal.names import LOCK


class FolderLock:
    """Held from construction to `close`. A forked child lets go of it, or it would outlive its owner there."""

    def __init__(self, folder: Path) -> None:
        """Raises `JournalUnavailable` if somebody has it."""
        self._descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii", "replace").strip()
            self.close()
            raise JournalUnavailable(
                f"the journal in {folder} is in use by process {holder or 'unknown'}: one at a time may open it",
                folder=str(folder),
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        os.register_at_fork(after_in_child=functools.partial(_close, weakref.ref(self)))

    def close(self) -> None:
        """May be called twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _close(reference: weakref.ref[FolderLock]) -> None:
    lock = reference()
    if lock is not None:
        lock.close()
