"""A record that was being written is dropped; anything else that is not as it was written is refused, and nothing
is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from tests.unit.journal.faulty import SMALL, content, copied, flip, overwrite, recovered, segments, written
from transfer_queue.errors import JournalDamaged
from transfer_queue.journal import Journal
from transfer_queue.journal.evidence import Scanned
from transfer_queue.journal.layout import record_bytes

RECORDS = [b"record %d " % number * (1 + number % 7) for number in range(120)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A journal of several segments."""
    folder = written(tmp_path / "journal", *RECORDS)
    assert len(segments(folder)) > 2
    return folder


def refused(folder: Path) -> JournalDamaged:
    """Return the error; asserts that it is raised again and again, and that what is good can be had."""
    before = content(folder)
    with pytest.raises(JournalDamaged) as caught:
        Journal.open(folder, **SMALL)
    error = caught.value
    assert content(folder) == before
    saved = Journal.salvage(folder)
    assert content(folder) == before
    assert (len(saved.records), saved.sequence) == (error.details["records"], error.details["sequence"])
    assert list(saved.records) == RECORDS[saved.sequence - len(saved.records) : saved.sequence]
    assert saved.notes[-1] == str(error)
    assert error.details["file"] in str(error)
    assert f"offset {error.details['offset']}" in str(error)
    assert f"up to sequence number {saved.sequence}" in str(error)
    return error


@pytest.mark.parametrize("header_first", [True, False])
def test_a_torn_last_record_is_dropped_whole(tmp_path: Path, header_first: bool) -> None:
    """Cut at every byte of the last record, whichever part of it was written first; the rest is there."""
    whole = written(tmp_path / "whole", b"first", b"second", b"the last one, of 34 bytes in all...")
    last = segments(whole)[-1]
    start = last.end - 64
    record = last.data[start : last.end].rstrip(b"\0")
    assert len(record) == 24 + 35
    order = [*range(len(record))] if header_first else [*range(24, len(record)), *range(24)]
    for count in range(len(record)):
        torn = bytearray(64)
        for at in order[:count]:
            torn[at] = record[at]
        if torn.rstrip(b"\0") == record:
            continue  # what was not written yet is zero anyway
        copy = copied(whole, tmp_path / "copy")
        overwrite(copy / last.path.name, start, torn)
        journal, found = Journal.open(copy, **SMALL)
        with journal:
            assert list(found.records) == [b"first", b"second"], count
            assert journal.append(b"third again") == 3
        if any(torn):
            size = len(bytes(torn).rstrip(b"\0"))
            assert found.notes == [
                "a record that was being written when the process died was dropped: "
                f"{size} bytes at offset {start} of journal-1"
            ]
        assert recovered(copy) == [b"first", b"second", b"third again"]


def read_bytes_of(segment: Scanned) -> list[int]:
    """Return the offsets that a reader looks at: the header without its marks, and each record without its padding."""
    offsets, at = list(range(48)), 64
    for _, payload in segment.records:
        offsets += range(at, at + 24 + len(payload))
        at += record_bytes(len(payload))
    return offsets


def test_one_flipped_bit_anywhere_inside_is_found(folder: Path, tmp_path: Path) -> None:
    """Headers of segments, headers of records and payloads: the refusal says where, and the good part ends before."""
    found = segments(folder)
    tried = 0
    for segment in found:
        last_record = record_bytes(len(RECORDS[-1])) if segment is found[-1] else 0
        for at in read_bytes_of(segment)[3::41]:
            if at >= segment.end - last_record:
                continue
            copy = copied(folder, tmp_path / "copy")
            flip(copy / segment.path.name, at, at % 8)
            error = refused(copy)
            assert error.details["sequence"] < segment.next_sequence
            assert error.details["offset"] <= at
            assert error.details["file"].endswith("/" + segment.path.name)
            tried += 1
    assert tried > 150


def test_a_flipped_bit_in_the_last_record_is_noted(folder: Path, tmp_path: Path) -> None:
    """It cannot be told from a record that was being written: dropped, and said."""
    last = segments(folder)[-1]
    flip(last.path, last.end - 20, 3)
    journal, found = Journal.open(folder, **SMALL)
    journal.close()
    assert list(found.records) == RECORDS[:-1]
    assert "dropped" in found.notes[0]


def shorten(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


HARMS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (Path.unlink, "the file is missing"),
    "shortened": (shorten, "the file was made with 4096 bytes"),
    "lengthened": (lengthen, "the file was made with 4096 bytes"),
    "empty": (lambda path: path.write_bytes(b""), "less than its header"),
    "zeroed": (lambda path: path.write_bytes(bytes(4096)), "it begins with"),
    "version": (lambda path: overwrite(path, 12, b"\7"), "format is version 7 and this library reads version 1"),
    "other": (lambda path: path.write_bytes((path.parent / "journal-2").read_bytes()), "was written as journal-2"),
}


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("harm", HARMS)
def test_a_segment_that_is_not_as_it_was_made_is_damage(folder: Path, harm: str, which: int) -> None:
    """The first, one in the middle, and the last."""
    change, text = HARMS[harm]
    segment = segments(folder)[which]
    change(segment.path)
    error = refused(folder)
    assert text in str(error)
    assert error.details["file"] == str(segment.path)
    assert error.details["sequence"] in (segment.header.first - 1, segment.next_sequence - 2, segment.next_sequence - 1)


def test_a_record_that_vanished_is_damage(folder: Path) -> None:
    """Zeros where a record was, with another behind it or in the next segment, are no end."""
    for segment in segments(folder)[:2]:
        end = segment.end
        overwrite(segment.path, end - 16, bytes(16))
        assert refused(folder).details["sequence"] == segment.next_sequence - 2
        overwrite(segment.path, end - 16, segment.data[end - 16 : end])
    assert recovered(folder) == RECORDS


def test_a_segment_of_another_journal_is_damage(folder: Path, tmp_path: Path) -> None:
    """Its numbers do not follow."""
    other = written(tmp_path / "other", *RECORDS[:60], *RECORDS)
    (folder / "journal-3").write_bytes((other / "journal-3").read_bytes())
    assert "expected record" in str(refused(folder))


def test_a_torn_tail_stays_harmless_later(folder: Path) -> None:
    """Behind what was dropped comes a new segment; the next readers go on there, and damage before it is still seen."""
    last = segments(folder)[-1]
    overwrite(last.path, last.end, b"half a record")
    assert recovered(folder) == RECORDS
    journal, found = Journal.open(folder, **SMALL)
    with journal:
        assert found.notes == []
        journal.append(b"more")
    assert recovered(folder) == [*RECORDS, b"more"]
    flip(last.path, last.end - 20, 3)
    assert "begins with record" in str(refused(folder))


def test_a_copy_of_a_record_inside_a_record_is_no_record(tmp_path: Path) -> None:
    """A torn record may hold anything, even the bytes of a journal."""
    inner = segments(written(tmp_path / "inner", *[b"x"] * 20))[0]
    folder = written(tmp_path / "outer", b"first", inner.data[: inner.end])
    outer = segments(folder)[0]
    overwrite(outer.path, outer.end - 8 - inner.end, bytes(24))
    overwrite(outer.path, outer.end - inner.end - 24, bytes(24))
    assert recovered(folder) == [b"first"]


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    """Header, content and length are checked."""
    folder = written(tmp_path / "journal", b"first")
    with Journal.open(folder, **SMALL)[0] as journal:
        journal.begin_snapshot().write([b"content " * 10])
    path = folder / "snapshot-1"
    good = path.read_bytes()
    for at in range(0, len(good), 3):
        flip(path, at, at % 8)
        with pytest.raises(JournalDamaged, match="snapshot-1 is damaged at offset 0"):
            Journal.open(folder, **SMALL)
        assert Journal.salvage(folder).snapshot is None
        path.write_bytes(good)
    path.write_bytes(good[:-1])
    with pytest.raises(JournalDamaged, match="79 bytes of content and was written with 80"):
        Journal.open(folder, **SMALL)


def test_a_snapshot_without_its_segment_is_refused(tmp_path: Path) -> None:
    """The records after it are missing."""
    folder = written(tmp_path / "journal", b"first")
    with Journal.open(folder, **SMALL)[0] as journal:
        journal.begin_snapshot().write([b"content"])
    for segment in segments(folder):
        segment.path.unlink()
    with pytest.raises(JournalDamaged, match="the file is missing; a snapshot up to record 1 and 0 records"):
        Journal.open(folder, **SMALL)
    assert Journal.salvage(folder).snapshot == b"content"


@pytest.mark.parametrize("seed", range(40))
def test_garbage_is_refused_or_is_no_record(folder: Path, seed: int) -> None:
    """Random bytes anywhere, in any number: the outcome is typed, and every record that comes back was appended."""
    random = Random(seed)
    for _ in range(random.randint(1, 3)):
        segment = random.choice(sorted(folder.glob("journal-*")))
        size = random.choice([1, 8, 30, 500])
        overwrite(segment, random.randrange(4096 - size), random.randbytes(size))
    saved = Journal.salvage(folder)
    assert list(saved.records) == RECORDS[: saved.sequence]
    if "is damaged" in "".join(saved.notes):
        refused(folder)
    else:
        assert recovered(folder) == RECORDS[: saved.sequence]
        assert saved.sequence >= len(RECORDS) - 1
