"""One process at a time: an advisory lock on a file or folder, which ends with its holder."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

_LOOK_AGAIN_S = 0.02


@contextlib.contextmanager
def locked(path: Path, timeout_s: float, *, create: bool = False) -> Iterator[bool]:
    """Hold the lock of `path` within the block; False: it was not to be had in time, or the path is gone.

    `create` makes a file that only this user can read where there is nothing yet.
    """
    deadline = time.monotonic() + timeout_s
    while (descriptor := _opened(path, create)) is not None:
        try:
            if not _lock(descriptor, deadline):
                break
            if _names(path, descriptor):
                yield True
                return
        finally:
            os.close(descriptor)
    yield False


def _opened(path: Path, create: bool) -> int | None:
    if create:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None


def _lock(descriptor: int, deadline: float) -> bool:
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOOK_AGAIN_S)
        else:
            return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path still means what was opened: its last holder may have removed it."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
