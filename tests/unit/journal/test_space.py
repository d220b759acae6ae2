"""Full disks: refused before anything has changed, with a reserve for what frees space, and work goes on after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.journal.faulty import SMALL, FaultyFiles, content, copied, recovered
from transfer_queue.errors import CapacityExceeded, JournalUnavailable
from transfer_queue.journal import Journal

RECORD = b"x" * 100  # takes 128 bytes


def fill(journal: Journal, *, essential: bool = False) -> int:
    """Append until there is no space; return how many records went in."""
    count = 0
    while True:
        try:
            journal.append(RECORD, essential=essential)
        except CapacityExceeded:
            return count
        count += 1


def append_many(journal: Journal) -> None:
    for count in range(200):
        journal.append(b"%d" % count * 40)


def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path) -> None:
    """The error says how much is needed and free and where; the record is not there, what was is."""
    files = FaultyFiles()
    journal, _ = Journal.open(tmp_path, **SMALL, files=files)
    with journal:
        files.space_bytes = 4096
        appended = fill(journal)
        before = (journal.sequence, content(tmp_path))
        with pytest.raises(
            CapacityExceeded, match=f"capacity for a record of 128 bytes: .* free in {tmp_path}"
        ) as caught:
            journal.append(RECORD)
        assert caught.value.details["needed_bytes"] == 4096
        with pytest.raises(CapacityExceeded, match="clear samples"):
            journal.check_room(100)
        assert (journal.sequence, content(tmp_path)) == before
        assert recovered(copied(tmp_path, tmp_path.parent / "copy")) == [RECORD] * appended
        files.space_bytes = None
        journal.check_room(100)
        assert journal.append(RECORD) == appended + 1
    assert recovered(tmp_path) == [RECORD] * (appended + 1)


def test_a_promise_of_room_is_kept(tmp_path: Path) -> None:
    """After `check_room`, a record of that size goes in even if the disk is full by then; larger than a segment too."""
    files = FaultyFiles()
    with Journal.open(tmp_path, **SMALL, files=files)[0] as journal:
        for size in (100, 4000, 50_000) * 3:
            files.space_bytes = None
            journal.check_room(size)
            files.space_bytes = 0
            journal.append(b"x" * size)


def test_the_reserve_is_for_essential_records(tmp_path: Path) -> None:
    """When ordinary records are refused, acks and clears still go in, about as many bytes as were reserved."""
    files = FaultyFiles()
    with Journal.open(tmp_path, segment_bytes=8192, reserve_bytes=2048, files=files)[0] as journal:
        files.space_bytes = 8192
        ordinary = fill(journal)
        journal.append(RECORD, essential=True)
        with pytest.raises(CapacityExceeded):
            journal.append(b"")
        essential = 1 + fill(journal, essential=True)
        assert 2048 // 128 <= essential <= 2048 // 128 + 2
        with pytest.raises(CapacityExceeded):
            journal.append(RECORD, essential=True)
        files.space_bytes = None
        journal.append(RECORD)
    assert recovered(tmp_path) == [RECORD] * (ordinary + essential + 1)


def test_a_large_record_does_not_take_the_reserve(tmp_path: Path) -> None:
    """One that would fit into the segment that is allocated ahead only without the reserve is refused."""
    files = FaultyFiles()
    files.space_bytes = 2 * 8192
    with Journal.open(tmp_path, segment_bytes=8192, reserve_bytes=2048, files=files)[0] as journal:
        journal.append(b"x" * 7500)
        with pytest.raises(CapacityExceeded):
            journal.append(b"y" * 7500)
        for _ in range(4):
            journal.append(b"z" * 500, essential=True)
        journal.append(b"y" * 4000)


def test_a_restart_on_a_full_disk_uses_the_segment_that_was_allocated_ahead(tmp_path: Path) -> None:
    """It takes no new space, and keeps its reserve."""
    live = tmp_path / "live"
    with Journal.open(live, **SMALL)[0] as journal:
        journal.append(RECORD)
        journal.check_room(3000)
        while not any(path.name.startswith("spare-") for path in live.iterdir()):
            journal.check_room(100)
        copy = copied(live, tmp_path / "copy")
    spare = next(copy.glob("spare-*")).stat().st_ino
    files = FaultyFiles()
    files.space_bytes = 4096  # asked for, and given, the space that the file has already
    journal, found = Journal.open(copy, **SMALL, files=files)
    with journal:
        assert (list(found.records), found.notes) == ([RECORD], [])
        assert max(copy.glob("journal-*")).stat().st_ino == spare
        assert fill(journal) == (4096 - 64) // 128


def test_a_restart_without_any_space_still_recovers(tmp_path: Path) -> None:
    """Everything can be read; appends are refused until there is space."""
    with Journal.open(tmp_path, **SMALL)[0] as journal:
        journal.append(RECORD)
    for path in tmp_path.glob("spare-*"):
        path.unlink()
    files = FaultyFiles()
    files.space_bytes = 0
    journal, found = Journal.open(tmp_path, **SMALL, files=files)
    with journal:
        assert list(found.records) == [RECORD]
        assert "nothing can be appended yet: no capacity" in found.notes[0]
        with pytest.raises(CapacityExceeded):
            journal.append(RECORD)
        with pytest.raises(CapacityExceeded):
            journal.begin_snapshot().write([b"state"])
        files.space_bytes = None
        journal.begin_snapshot().write([b"state"])
        assert journal.append(b"more") == 2
    journal, found = Journal.open(tmp_path, **SMALL)
    journal.close()
    assert (found.snapshot, list(found.records)) == (b"state", [b"more"])


def test_a_new_journal_needs_space(tmp_path: Path) -> None:
    """Nothing is left of the try, so that the next one begins anew."""
    files = FaultyFiles()
    files.space_bytes = 0
    with pytest.raises(CapacityExceeded):
        Journal.open(tmp_path, **SMALL, files=files)
    assert content(tmp_path) == {}
    assert recovered(tmp_path) == []


@pytest.mark.parametrize("call", ["create", "allocate", "rename"])
def test_a_segment_that_cannot_be_begun_changes_nothing(tmp_path: Path, call: str) -> None:
    """Any other failure of the file system is said, and the record can be appended later."""
    files = FaultyFiles()
    with Journal.open(tmp_path, **SMALL, files=files)[0] as journal:
        files.failing = {call}
        with pytest.raises(JournalUnavailable, match=f"{call} failed"):
            append_many(journal)
        count = journal.sequence
        assert count > 20
        files.failing = set()
        assert journal.append(b"after") == count + 1
    assert recovered(tmp_path)[-2:] == [b"%d" % (count - 1) * 40, b"after"]
