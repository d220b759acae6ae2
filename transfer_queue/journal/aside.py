"""Files that appear whole or not at all: written beside their place, then renamed.

The order is that of every safe replacement: the content is written and synced, then the name is changed, then the
folder that holds the name is synced. A process that dies on the way leaves a `.NAME.partial`, which `remove_partial`
takes away, and what had the name before stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transfer_queue.journal.files import REAL_FILES, Files


def partial_path(path: Path) -> Path:
    """Return where the content for `path` is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def write_aside(path: Path, *, sync: bool = True, files: Files = REAL_FILES) -> Iterator[int]:
    """Yield the descriptor of an empty file that becomes `path`, in place of what is there, when the block ends well.

    If the block or a step after it raises, nothing has changed. `sync=False` leaves out the syncs: the file then
    survives the process, but maybe not the machine.
    """
    partial = partial_path(path)
    remove_partial(path)
    descriptor = files.create(partial)
    try:
        try:
            yield descriptor
            if sync:
                files.fsync(descriptor)
        finally:
            os.close(descriptor)
        files.rename(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(partial)
        raise
    if sync:
        files.fsync_folder(path.parent)


def remove_partial(path: Path) -> bool:
    """Remove what a writer of `path` that died has left; return whether there was something."""
    partial = partial_path(path)
    try:
        partial.unlink()
    except FileNotFoundError:
        return False
    return True


def sync_tree(folder: Path, files: Files = REAL_FILES) -> None:
    """Sync all files below a folder, and the folders, from the inside out."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            descriptor = os.open(Path(parent) / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                files.fsync(descriptor)
            finally:
                os.close(descriptor)
        files.fsync_folder(Path(parent))
