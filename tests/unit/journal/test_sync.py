"""Group commit: what was called durable is on the disk, one sync serves many, and a failed one is never forgotten."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.unit.journal.faulty import SMALL, FaultyFiles, copied, flip, overwrite, recovered, segments
from transfer_queue.errors import JournalDamaged, JournalUnavailable
from transfer_queue.journal import Journal


class Gate(FaultyFiles):
    """Syncs of segments in use wait until they are let through."""

    def __init__(self) -> None:
        super().__init__()
        self.open = threading.Event()
        self.reached = threading.Event()
        self.open.set()

    def fsync(self, descriptor: int) -> None:
        if os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2].startswith("journal-"):
            self.reached.set()
            assert self.open.wait(10)
        super().fsync(descriptor)


def test_without_sync_everything_is_durable_at_once(tmp_path: Path) -> None:
    """The caller itself is called back, and nothing is synced."""
    files = FaultyFiles()
    called: list[tuple[BaseException | None, threading.Thread]] = []
    with Journal.open(tmp_path, **SMALL, files=files)[0] as journal:
        journal.append(b"x")
        journal.when_durable(lambda error: called.append((error, threading.current_thread())))
        assert called == [(None, threading.current_thread())]
        journal.flush()
        journal.begin_snapshot().write([b"x"])
    assert files.count("fsync") == files.count("fsync_folder") == 0


def test_callbacks_come_after_the_sync_and_share_it(tmp_path: Path) -> None:
    """Many appends wait while one sync runs; one further sync serves them all, in order."""
    files = Gate()
    told: list[int] = []
    with Journal.open(tmp_path, sync=True, files=files)[0] as journal:
        journal.append(b"first")
        journal.flush()
        while not list(tmp_path.glob("spare-*")):  # its own sync is out of the way
            journal.flush()
        files.open.clear()
        files.reached.clear()
        journal.append(b"second")
        journal.when_durable(lambda error: told.append(-1))
        assert files.reached.wait(10)
        before = files.count("fsync")
        for number in range(100):
            journal.append(b"%d" % number)
            journal.when_durable(lambda error, number=number: told.append(number))
        assert told == []
        files.open.set()
        journal.flush()
        assert told == [-1, *range(100)]
        assert files.count("fsync") <= before + 3  # the one that waited, the one for all, and maybe one for `flush`
        journal.when_durable(lambda error: told.append(1000))
        assert told[-1] == 1000


def test_a_failed_sync_ends_the_journal(tmp_path: Path) -> None:
    """All who wait are told, and nothing is taken any more, although a later sync would succeed."""
    files = Gate()
    told: list[BaseException | None] = []
    journal, _ = Journal.open(tmp_path, **SMALL, sync=True, files=files)
    with journal:
        journal.append(b"safe")
        journal.flush()
        files.open.clear()
        files.failing = {"fsync"}
        for _ in range(3):
            journal.append(b"lost")
            journal.when_durable(told.append)
        snapshot = journal.begin_snapshot()
        files.open.set()
        with pytest.raises(JournalUnavailable, match="takes no more records: syncing it failed .*fsync failed"):
            journal.flush()
        assert [type(error) for error in told] == [JournalUnavailable] * 3
        files.failing = set()
        for call in (lambda: journal.append(b"x"), lambda: journal.check_room(1), journal.flush):
            with pytest.raises(JournalUnavailable, match="restart this process"):
                call()
        with pytest.raises(JournalUnavailable):
            snapshot.write([b"state"])
        journal.when_durable(told.append)
        assert isinstance(told[-1], JournalUnavailable)
    assert recovered(tmp_path, sync=True)[0] == b"safe"


def test_closing_makes_durable_what_was_appended(tmp_path: Path) -> None:
    """Those who still wait are called; over several segments each file and the names are synced."""
    files = FaultyFiles()
    told: list[BaseException | None] = []
    with Journal.open(tmp_path, **SMALL, sync=True, files=files)[0] as journal:
        for number in range(200):
            journal.append(b"%d" % number * 30)
        journal.when_durable(told.append)
        journal.append(b"last")
    assert told == [None]
    assert files.count("fsync_folder") >= 2
    synced = {call.removeprefix("fsync ") for call in files.calls if call.startswith("fsync journal")}
    assert synced == {segment.path.name for segment in segments(tmp_path)}
    files.calls.clear()
    with Journal.open(tmp_path, **SMALL, sync=True, files=files)[0] as journal:
        last = f"fsync journal-{len(segments(tmp_path))}"
        assert synced < {call.removeprefix("fsync ") for call in files.calls}  # the process before may have been killed
        opened = files.calls.count(last)
        journal.append(b"nobody waits for this one")
    assert files.calls.count(last) > opened
    assert len(recovered(tmp_path, sync=True)) == 202


def test_threads_append_and_wait_together(tmp_path: Path) -> None:
    """Each number is given once, and what a thread was told to be durable is in a copy of the folder."""
    numbers: list[int] = []

    def work(name: int) -> None:
        for count in range(50):
            numbers.append(journal.append(b"%d-%d" % (name, count) * 10))
            if count % 10 == 0:
                journal.flush()

    with Journal.open(tmp_path / "live", **SMALL, sync=True)[0] as journal:
        threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(numbers) == list(range(1, 201))
        found = recovered(copied(tmp_path / "live", tmp_path / "copy"))
        assert len(found) == 200
        for name in range(4):
            assert [x for x in found if x.startswith(b"%d-" % name)] == [b"%d-%d" % (name, n) * 10 for n in range(50)]


@pytest.fixture
def half_synced(tmp_path: Path) -> Path:
    """A folder as a machine that stopped may leave it: 10 records are durable, 10 more were on their way."""
    files = Gate()
    with Journal.open(tmp_path / "live", **SMALL, sync=True, files=files)[0] as journal:
        for number in range(10):
            journal.append(b"durable %d" % number)
        journal.flush()
        files.open.clear()
        for number in range(10):
            journal.append(b"on its way %d" % number)
        copy = copied(tmp_path / "live", tmp_path / "copy")
        files.open.set()
    return copy


def test_pages_that_never_reached_the_disk_are_dropped(half_synced: Path, tmp_path: Path) -> None:
    """A hole among records that nobody was promised ends the journal there, whatever lies behind it."""
    segment = segments(half_synced)[0]
    hole = segment.data.index(b"on its way 3") - 24
    overwrite(half_synced / "journal-1", hole, bytes(30))
    kept = [*(b"durable %d" % n for n in range(10)), *(b"on its way %d" % n for n in range(3))]
    journal, found = Journal.open(half_synced, **SMALL, sync=True)
    with journal:
        assert list(found.records) == kept
        assert f"at offset {hole} of journal-1" in found.notes[0]
        journal.append(b"new")
    assert recovered(half_synced, sync=True) == [*kept, b"new"]


def test_a_hole_in_what_was_durable_is_damage(half_synced: Path) -> None:
    """The records behind it, or the mark in the segment, know better."""
    segment = segments(half_synced)[0]
    hole = segment.data.index(b"durable 9") - 24
    overwrite(half_synced / "journal-1", hole, bytes(len(segment.data) - hole))
    with pytest.raises(JournalDamaged, match="expected record 10, found: 0 other bytes; record 10 is known"):
        Journal.open(half_synced, **SMALL, sync=True)
    overwrite(half_synced / "journal-1", hole, segment.data[hole:])
    flip(half_synced / "journal-1", hole + 26, 2)
    overwrite(half_synced / "journal-1", 48, bytes(8))
    with pytest.raises(JournalDamaged, match="expected record 10"):
        Journal.open(half_synced, **SMALL, sync=True)


@pytest.mark.parametrize("harm", ["zero", "remove"])
@pytest.mark.parametrize("lost", [[2], [3], [4], [2, 3], [3, 4], [2, 4], [2, 3, 4]])
def test_segments_that_never_reached_the_disk_are_dropped(tmp_path: Path, lost: list[int], harm: str) -> None:
    """Whole files may be without content, or missing, as long as nothing in them was promised; else it is damage."""
    files = Gate()
    live = tmp_path / "live"
    with Journal.open(live, **SMALL, sync=True, files=files)[0] as journal:
        journal.append(b"durable")
        journal.flush()
        files.open.clear()
        for number in (1, 2, 3, 4):
            journal.append(b"%d" % number * 3500)
        unsynced = copied(live, tmp_path / "unsynced")
        files.open.set()
        journal.flush()
        synced = copied(live, tmp_path / "synced")
    for number in lost:
        for folder in (unsynced, synced):
            _harm(folder / f"journal-{number}", harm)
    kept = [b"durable", *(b"%d" % number * 3500 for number in range(1, min(lost)))]
    journal, found = Journal.open(unsynced, **SMALL, sync=True)
    with journal:
        assert list(found.records) == kept
        journal.append(b"new")
    assert recovered(unsynced, sync=True) == [*kept, b"new"]
    with pytest.raises(JournalDamaged):
        Journal.open(synced, **SMALL, sync=True)


def _harm(path: Path, harm: str) -> None:
    if harm == "zero":
        path.write_bytes(bytes(path.stat().st_size))
    else:
        path.unlink()
