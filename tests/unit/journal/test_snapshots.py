"""A snapshot takes the place of the records up to it; dying at any step leaves the old or the new state, whole."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.journal.faulty import SMALL, FaultyFiles, content, copied, written
from transfer_queue.errors import CapacityExceeded, InvalidArgument, JournalUnavailable
from transfer_queue.journal import Journal


def state_of(folder: Path) -> list[bytes]:
    """Return all records, those that a snapshot stands for included: here it holds them, one per line."""
    journal, found = Journal.open(folder, **SMALL)
    journal.close()
    return [*(found.snapshot or b"").splitlines(), *found.records]


def lines(records: list[bytes]) -> list[bytes]:
    return [record + b"\n" for record in records]


@pytest.mark.parametrize("sync", [False, True])
def test_dying_at_any_step_leaves_a_whole_state(tmp_path: Path, sync: bool) -> None:
    """Before each call to the file system the folder is looked at as the next process would find it."""
    appended: list[bytes] = []
    steps: set[str] = set()
    live, busy = tmp_path / "live", threading.RLock()

    def look(step: str) -> None:
        if not busy.acquire(blocking=False):
            return  # the journal's own thread, while a record is being appended: a copy takes more than an instant
        copy = copied(live, tmp_path / "copy")
        found = state_of(copy)
        assert found in (appended, appended[:-1]), step
        assert state_of(copy) == found, step
        steps.add(step.split(maxsplit=1)[0])
        busy.release()

    files = FaultyFiles(look)
    journal, _ = Journal.open(live, **SMALL, sync=sync, files=files)
    with journal:
        for turn in range(3):
            for number in range(40):
                with busy:
                    appended.append(b"%d " % turn + b"%d" % number * 30)
                    journal.append(appended[-1])
            journal.flush()
            files.write_bytes = 700
            with busy:
                journal.begin_snapshot().write(lines(appended))
            files.write_bytes = None
    assert state_of(live) == appended
    assert steps >= {"create", "allocate", "write", "rename", "unlink"}
    assert ("fsync" in steps) == sync


def test_records_appended_while_a_snapshot_is_written_follow_it(tmp_path: Path) -> None:
    """The cut is where it was begun, whatever comes before it is written; older files are gone afterwards."""
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        for number in range(100):
            journal.append(b"old %d" % number * 10)
        snapshot = journal.begin_snapshot()

        def parts() -> Iterator[bytes]:
            for number in range(100):
                journal.append(b"new %d" % number * 10)
                yield b"%d," % number

        assert snapshot.sequence == 100
        snapshot.write(parts())
        assert journal.sequence == 200
    names = set(content(tmp_path))
    assert "snapshot-100" in names
    assert "journal-1" not in names
    journal, found = Journal.open(tmp_path, **SMALL)
    journal.close()
    assert found.snapshot == b"".join(b"%d," % number for number in range(100))
    assert list(found.records) == [b"new %d" % number * 10 for number in range(100)]
    assert found.sequence == 200


def test_a_snapshot_of_nothing_and_an_empty_one(tmp_path: Path) -> None:
    """No record and no content are a state as well."""
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        journal.begin_snapshot().write([])
        journal.begin_snapshot().write([b"", b"state"])
        journal.append(b"x")
    journal, found = Journal.open(tmp_path, **SMALL)
    with journal:
        assert (found.snapshot, list(found.records), found.sequence) == (b"state", [b"x"], 1)
        journal.begin_snapshot().write([])
    journal, found = Journal.open(tmp_path, **SMALL)
    journal.close()
    assert (found.snapshot, list(found.records), found.sequence) == (b"", [], 1)


def without_spares(folder: Path) -> set[str]:
    """Names of files; the journal's thread may remove a segment in reserve at any moment."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("spare")}


@pytest.mark.parametrize("space_bytes", [0, 10, 40, 5000])
def test_no_space_for_a_snapshot_loses_nothing(tmp_path: Path, space_bytes: int) -> None:
    """Whatever part of it fits: the old one and the records stay, and a later one succeeds."""
    files = FaultyFiles()
    written(tmp_path, *[b"record"] * 300)
    with Journal.open(tmp_path, **SMALL, snapshot_bytes=1000, files=files)[0] as journal:
        journal.append(b"last")
        journal.check_room(100)
        assert journal.wants_snapshot
        before = without_spares(tmp_path)
        files.space_bytes = space_bytes
        with pytest.raises(CapacityExceeded, match="capacity for a snapshot of the journal"):
            journal.begin_snapshot().write([b"x" * 1000] * 10)
        assert without_spares(tmp_path) == before
        assert state_of(copied(tmp_path, tmp_path.parent / "copy")) == [b"record"] * 300 + [b"last"]
        files.space_bytes = None
        journal.append(b"more")
        journal.begin_snapshot().write([b"all"])
        assert not journal.wants_snapshot
    assert state_of(tmp_path) == [b"all"]


@pytest.mark.parametrize("call", ["create", "write", "rename", "fsync", "fsync_folder"])
def test_a_failing_step_of_a_snapshot_loses_nothing(tmp_path: Path, call: str) -> None:
    """The journal goes on, and so does the next process."""
    files = FaultyFiles()
    with Journal.open(tmp_path, **SMALL, sync=True, files=files)[0] as journal:
        journal.append(b"record")
        journal.flush()
        files.failing = {call}
        with pytest.raises(JournalUnavailable, match=f"{call} failed"):
            journal.begin_snapshot().write([b"record"])
        assert not list(tmp_path.glob(".*"))
        files.failing = set()
        journal.append(b"more")
        assert state_of(copied(tmp_path, tmp_path.parent / "copy")) == [b"record", b"more"]
        journal.begin_snapshot().write([b"record\nmore"])
    assert state_of(tmp_path) == [b"record", b"more"]


def test_what_cannot_be_removed_is_removed_later(tmp_path: Path) -> None:
    """The new snapshot counts, whatever lies beside it."""
    files = FaultyFiles()
    with Journal.open(tmp_path, **SMALL, files=files)[0] as journal:
        for number in range(100):
            journal.append(b"%d" % number * 40)
        files.failing = {"unlink"}
        journal.begin_snapshot().write([b"all"])
        files.failing = set()
        assert "journal-1" in content(tmp_path)
        assert state_of(copied(tmp_path, tmp_path.parent / "copy")) == [b"all"]
        assert "journal-1" not in content(tmp_path.parent / "copy")
        journal.begin_snapshot().write([b"all"])
        assert "journal-1" not in content(tmp_path)


def test_a_state_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    """An error of the caller's own comes back as it is."""

    def parts() -> Iterator[bytes]:
        yield b"half"
        raise ZeroDivisionError

    with Journal.open(tmp_path, **SMALL)[0] as journal:
        journal.append(b"record")
        snapshot = journal.begin_snapshot()
        with pytest.raises(ZeroDivisionError):
            snapshot.write(parts())
        with pytest.raises(InvalidArgument, match="written once"):
            snapshot.write([])
        assert not list(tmp_path.glob(".*"))
    assert state_of(tmp_path) == [b"record"]


def test_the_later_of_two_snapshots_counts(tmp_path: Path) -> None:
    """One that was begun earlier and is written later changes nothing."""
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        journal.append(b"one")
        early = journal.begin_snapshot()
        journal.append(b"two")
        journal.begin_snapshot().write([b"one\ntwo"])
        early.write([b"one"])
        assert "snapshot-1" not in content(tmp_path)
        journal.append(b"three")
    assert state_of(tmp_path) == [b"one", b"two", b"three"]


def test_a_snapshot_is_wanted_when_much_was_appended_since(tmp_path: Path) -> None:
    """More than the configured size, and more than twice the last snapshot; restarts count the segments they leave."""
    options = {**SMALL, "snapshot_bytes": 10_000}
    journal, _ = Journal.open(tmp_path, **options)
    with journal:
        assert not journal.wants_snapshot
        for _ in range(75):
            assert not journal.wants_snapshot
            journal.append(b"x" * 100)
        journal.append(b"x" * 2000)
        assert journal.wants_snapshot
        journal.begin_snapshot().write([b"s" * 30_000])
        for _ in range(400):
            assert not journal.wants_snapshot
            journal.append(b"x" * 100)
        journal.append(b"x" * 20_000)
        assert journal.wants_snapshot
        journal.begin_snapshot().write([b"s"])
        assert not journal.wants_snapshot
    for _ in range(4):
        journal, _ = Journal.open(tmp_path, **options)
        journal.close()
    assert journal.wants_snapshot
