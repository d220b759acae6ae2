"""What is appended is there for the next process, in order and once."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.journal.faulty import SMALL, content, copied, recovered, segments
from transfer_queue.errors import InvalidArgument, JournalUnavailable
from transfer_queue.journal import Journal


def test_a_new_folder_has_nothing(tmp_path: Path) -> None:
    """The folder is made, readable by its owner alone."""
    folder = tmp_path / "a" / "b"
    journal, found = Journal.open(folder, **SMALL)
    with journal:
        assert (found.snapshot, list(found.records), found.sequence, found.notes) == (None, [], 0, [])
        assert journal.sequence == 0
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_records_come_back_in_order_over_several_lives(tmp_path: Path) -> None:
    """Numbers go on where the process before ended, and each life begins a segment."""
    told, appended = [], []
    for life in range(4):
        journal, found = Journal.open(tmp_path, **SMALL)
        with journal:
            assert list(found.records) == appended
            assert found.sequence == len(appended)
            for number in range(5):
                told.append(journal.append(b"life %d " % life, memoryview(b"record %d" % number)))
                appended.append(b"life %d record %d" % (life, number))
            assert journal.sequence == told[-1]
    assert told == list(range(1, 21))
    assert [segment.header.number for segment in segments(tmp_path)] == [1, 2, 3, 4]


def test_records_of_any_size_are_kept(tmp_path: Path) -> None:
    """Empty ones, ones that end with zeros, ones that fill a segment exactly, and ones larger than a segment."""
    records = [b"", b"\0" * 50, b"x" * (4096 - 64 - 24), b"y" * 4096, b"z" * 100_000, b"", b"\0", b"end"] * 3
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        for record in records:
            journal.append(record)
    assert recovered(tmp_path) == records


def test_a_dead_writer_leaves_every_record(tmp_path: Path) -> None:
    """Nothing needs to be closed: what a copy of the files shows at any time is all that was appended."""
    with Journal.open(tmp_path / "live", **SMALL)[0] as journal:
        for number in range(200):
            journal.append(b"%d" % number * 20)
            if number % 40 == 7:
                copy = copied(tmp_path / "live", tmp_path / "copy")
                assert recovered(copy) == [b"%d" % number * 20 for number in range(number + 1)]


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    """Neither this process nor another opens a journal that is open; afterwards both can."""
    program = (
        f"from pathlib import Path; from transfer_queue.journal import Journal; Journal.open(Path({str(tmp_path)!r}))"
    )
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        journal.append(b"first")
        with pytest.raises(JournalUnavailable, match=f"in use by process {os.getpid()}"):
            Journal.open(tmp_path, **SMALL)
        with pytest.raises(JournalUnavailable, match="in use"):
            Journal.salvage(tmp_path)
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert "JournalUnavailable" in other.stderr
        journal.append(b"second")
    assert recovered(tmp_path) == [b"first", b"second"]


def test_closing_twice_is_fine_and_ends_everything(tmp_path: Path) -> None:
    """A closed journal says so, and its files are not touched."""
    journal, _ = Journal.open(tmp_path, **SMALL)
    journal.append(b"x")
    snapshot = journal.begin_snapshot()
    journal.close()
    before = content(tmp_path)
    journal.close()
    for call in (lambda: journal.append(b"y"), lambda: journal.check_room(1), lambda: snapshot.write([b"z"])):
        with pytest.raises(JournalUnavailable, match="is closed"):
            call()
    assert content(tmp_path) == before
    assert "closed" in repr(journal)


def test_a_forked_child_neither_writes_nor_keeps_the_lock(tmp_path: Path) -> None:
    """A worker that outlives the server does not stand in the way of the next one."""
    journal, _ = Journal.open(tmp_path, **SMALL)
    reader, writer = os.pipe()
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)  # it ends with the parent's end of the pipe, whatever happens there
        try:
            journal.append(b"from the child")
        except JournalUnavailable:
            journal.close()
            os.write(tell, b"x")
            os.read(reader, 1)  # lives on until the next journal was opened
            os._exit(0)
        os._exit(1)
    try:
        os.read(told, 1)
        journal.append(b"x")
        journal.close()
        assert recovered(tmp_path) == [b"x"]
    finally:
        os.write(writer, b"x")
        status = os.waitpid(child, 0)[1]
        for end in (reader, writer, told, tell):
            os.close(end)
    assert os.waitstatus_to_exitcode(status) == 0


def test_a_reserve_larger_than_a_segment_is_refused(tmp_path: Path) -> None:
    """It could never be kept."""
    with pytest.raises(InvalidArgument, match="reserve_bytes"):
        Journal.open(tmp_path, segment_bytes=4096, reserve_bytes=4096)


def test_the_state_is_told(tmp_path: Path) -> None:
    """The text of a journal names folder, last record and space."""
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        journal.append(b"x")
        assert f"<Journal {tmp_path}: record 1, " in repr(journal)
        assert repr(journal.begin_snapshot()) == "<SnapshotWriter up to record 1>"


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    """The error is ours and names the place."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(JournalUnavailable, match=f"opening the journal failed in {tmp_path}/file/journal"):
        Journal.open(tmp_path / "file" / "journal")
