"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.journal.faulty import FaultyFiles
from transfer_queue.journal.aside import partial_path, remove_partial, sync_tree, write_aside


def write_file(path: Path, data: bytes, files: FaultyFiles, *, sync: bool = True) -> None:
    with write_aside(path, files=files, sync=sync) as descriptor:
        os.write(descriptor, data)


def test_a_file_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    """Synced before it has its name; then the name is. Nobody else may read it."""
    files, path = FaultyFiles(), tmp_path / "file"
    write_file(path, b"old", files)
    files.calls.clear()
    write_file(path, b"new", files)
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert files.calls == [
        "create .file.partial",
        "fsync .file.partial",
        "rename file",
        f"fsync_folder {tmp_path.name}",
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_tree_is_synced_from_the_inside_out(tmp_path: Path) -> None:
    """Each file and each folder in it, then the folder itself."""
    files, path = FaultyFiles(), tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_bytes(b"data")
    (path / "other").write_bytes(b"data")
    sync_tree(path, files)
    assert files.calls == ["fsync file", "fsync_folder inner", "fsync other", "fsync_folder folder"]


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, call: str) -> None:
    """Nothing half written is left either."""
    files, path = FaultyFiles(), tmp_path / "name"
    files.failing = {call}
    with pytest.raises(OSError, match=f"{call} failed"):
        write_file(path, b"new", files)
    assert list(tmp_path.iterdir()) == []
    files.failing = set()
    write_file(path, b"new", files)
    assert list(tmp_path.iterdir()) == [path]


def test_without_sync_nothing_is_synced(tmp_path: Path) -> None:
    """As for a folder in shared memory."""
    files = FaultyFiles()
    write_file(tmp_path / "file", b"x", files, sync=False)
    assert files.count("fsync") == files.count("fsync_folder") == 0


def test_what_a_dead_writer_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """A partial file is removed, by the next writer or when asked."""
    path = tmp_path / "file"
    partial_path(path).write_bytes(b"left")
    write_file(path, b"new", FaultyFiles())
    assert path.read_bytes() == b"new"
    partial_path(path).write_bytes(b"left")
    assert remove_partial(path)
    assert not remove_partial(path)
    assert list(tmp_path.iterdir()) == [path]
