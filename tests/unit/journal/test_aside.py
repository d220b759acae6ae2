"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.journal.faulty import FaultyFiles
from transfer_queue.journal.aside import partial_path, remove_partial, write_aside, write_folder_aside


def write_file(path: Path, data: bytes, files: FaultyFiles, *, sync: bool = True) -> None:
    with write_aside(path, files=files, sync=sync) as descriptor:
        os.write(descriptor, data)


def write_folder(path: Path, data: bytes, files: FaultyFiles, *, sync: bool = True) -> None:
    with write_folder_aside(path, files=files, sync=sync) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_bytes(data)
        (folder / "other").write_bytes(data)


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


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    """Each file and each folder in it is synced, then the name."""
    files, path = FaultyFiles(), tmp_path / "folder"
    write_folder(path, b"data", files)
    assert (path / "inner" / "file").read_bytes() == b"data"
    assert files.calls == [
        "fsync file",
        "fsync_folder inner",
        "fsync other",
        "fsync_folder .folder.partial",
        "rename folder",
        f"fsync_folder {tmp_path.name}",
    ]


@pytest.mark.parametrize("write", [write_file, write_folder])
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failure_leaves_everything_as_it_was(tmp_path: Path, write: object, call: str) -> None:
    """Nothing half written is left either."""
    assert callable(write)
    files, path = FaultyFiles(), tmp_path / "name"
    files.failing = {call}
    with pytest.raises(OSError, match=f"{call} failed"):
        write(path, b"new", files)
    assert list(tmp_path.iterdir()) == []
    files.failing = set()
    write(path, b"new", files)
    assert list(tmp_path.iterdir()) == [path]


def test_without_sync_nothing_is_synced(tmp_path: Path) -> None:
    """As for a folder in shared memory."""
    files = FaultyFiles()
    write_file(tmp_path / "file", b"x", files, sync=False)
    write_folder(tmp_path / "folder", b"x", files, sync=False)
    assert files.count("fsync") == files.count("fsync_folder") == 0


def test_what_a_dead_writer_left_is_in_nobodys_way(tmp_path: Path) -> None:
    """A partial file or folder is removed, by the next writer or when asked."""
    for write in (write_file, write_folder):
        path = tmp_path / write.__name__
        partial_path(path).mkdir()
        (partial_path(path) / "left").write_bytes(b"x")
        write(path, b"new", FaultyFiles())
        partial_path(path).write_bytes(b"left")
        assert remove_partial(path)
        assert not remove_partial(path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    """A name stands for one content; the old one stays."""
    write_folder(tmp_path / "folder", b"old", FaultyFiles())
    with pytest.raises(OSError, match="not empty"):
        write_folder(tmp_path / "folder", b"new", FaultyFiles())
    assert (tmp_path / "folder" / "other").read_bytes() == b"old"
