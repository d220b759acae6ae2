"""What a journal's folder holds: the snapshot, the records after it, and whether something is missing or wrong.

Reading changes nothing. Where the records stop, two things are told apart: the place that a process or machine had
come to when it died, and damage. It is damage if anything says that there was more: a later record or segment, a
mark that records were durable, or a file that is not as it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transfer_queue.errors import JournalDamaged
from transfer_queue.journal.evidence import Scanned, durable_by_later, known_durable, scan
from transfer_queue.journal.layout import SEGMENT_HEADER_BYTES, read_segment_header, read_snapshot
from transfer_queue.journal.names import list_segments, list_snapshots, segment_path


@dataclass(frozen=True)
class Recovered:
    """What was appended before: `records` follow the snapshot, in order; `sequence` is the number of the last."""

    snapshot: bytes | None
    records: Sequence[bytes]
    sequence: int
    notes: list[str]


@dataclass
class Contents:
    """The good part of a folder, and what ended it."""

    records: list[bytes] = field(default_factory=list)
    snapshot: bytes | None = None
    snapshot_sequence: int = 0
    sequence: int = 0
    notes: list[str] = field(default_factory=list)
    damage: JournalDamaged | None = None
    last_segment: Path | None = None
    next_number: int = 1
    unneeded: list[Path] = field(default_factory=list)
    used_bytes: int = 0  # of the segments, since the snapshot

    def recovered(self) -> Recovered:
        notes = [*self.notes, str(self.damage)] if self.damage else self.notes
        return Recovered(self.snapshot, self.records, self.sequence, notes)


@dataclass(frozen=True)
class _End:
    """Why reading stopped at an offset. `unwritten`: a machine that stopped could have left it so."""

    path: Path
    offset: int
    found: str
    unwritten: bool


def read_folder(folder: Path) -> Contents:
    """Read all that is good; `damage` of the result says what is not. Raises `OSError` if a file cannot be read."""
    reader = _Reader(folder)
    reader.read()
    reader.conclude()
    return reader.contents


class _Reader:
    def __init__(self, folder: Path) -> None:
        self.contents = Contents()
        self._folder = folder
        self._paths = list_segments(folder)
        self._last: Scanned | None = None
        self._damage: tuple[Path, int, str, str] | None = None  # file, offset, found, expected

    def read(self) -> None:
        contents = self.contents
        first = contents.next_number = self._read_snapshots()
        contents.unneeded += [path for number, path in self._paths.items() if number < first]
        last = max(self._paths, default=0)
        if last < first and contents.snapshot is None:
            return
        for number in range(first, max(first, last) + 1):
            end = self._read_segment(number)
            if end is not None:
                self._judge(end, number)
                return
            contents.next_number = number + 1
        self._judge_last()

    def _read_snapshots(self) -> int:
        """Take the newest snapshot that is good; return the number of the segment that goes on from it."""
        contents, first = self.contents, 1
        for path in reversed(list_snapshots(self._folder).values()):
            if contents.snapshot is not None:
                contents.unneeded.append(path)
                continue
            found = read_snapshot(path.read_bytes())
            if isinstance(found, str):
                self._damaged(path, 0, found, "a whole snapshot")
                continue
            header, contents.snapshot = found
            contents.sequence = contents.snapshot_sequence = header.sequence
            first = header.segment
        return first

    def _read_segment(self, number: int) -> _End | None:
        """Read the records of a segment; returns why it does not go on from what was read, if so."""
        path, last = segment_path(self._folder, number), self._last
        wanted = last.next_sequence if last else self.contents.sequence + 1
        sync = last is not None and last.header.sync
        if number not in self._paths:
            return _End(path, 0, "the file is missing", sync)
        data = path.read_bytes()
        header = read_segment_header(data)
        if isinstance(header, str):
            return _End(path, 0, header, sync and not any(data[:SEGMENT_HEADER_BYTES]))
        if header.number != number:
            return _End(path, 0, f"it was written as journal-{header.number}", False)
        if last is not None and header.first > wanted:
            found = f"something else, and journal-{number} begins with record {header.first}"
            return _End(last.path, last.end, found, sync)
        if header.first > wanted or (last is not None and header.first < wanted):
            return _End(path, 0, f"it begins with record {header.first}", False)
        self._take(scan(path, data, header))
        if len(data) != header.size_bytes:
            return _End(path, len(data), f"the file was made with {header.size_bytes} bytes and ends here", False)
        return None

    def _take(self, segment: Scanned) -> None:
        contents = self.contents
        first = self._last is None and contents.snapshot is not None  # then what it holds may all be in the snapshot
        self._last, contents.last_segment = segment, segment.path
        new = [payload for sequence, payload in segment.records if sequence > contents.snapshot_sequence]
        contents.records += new
        contents.sequence += len(new)
        contents.used_bytes += segment.header.size_bytes if new or not first else 0

    def _judge_last(self) -> None:
        """All segments were read: the last one ends where the writer had come to, unless something says otherwise."""
        last = self._last
        assert last is not None
        if last.followed:
            number = last.header.number + 1
            path = segment_path(self._folder, number)
            self._damaged(path, 0, "the file is missing", f"record {last.followed}")
        else:
            remains = last.remains()
            self._judge(_End(last.path, last.end, f"{remains} other bytes", True), last.header.number + 1)

    def _judge(self, end: _End, number: int) -> None:
        """Decide whether the end is damage or was left by a death; `number` is the first segment that is not read."""
        contents, last = self.contents, self._last
        wanted = last.next_sequence if last else contents.sequence + 1
        later = [path for other, path in self._paths.items() if other >= number]
        if last is not None and end.unwritten and not last.followed:
            known = max([known_durable(last), contents.snapshot_sequence, *map(durable_by_later, later)])
            if known < wanted:
                contents.next_number = number
                contents.unneeded += later
                self._note_dropped(last, later)
                return
            end = _End(end.path, end.offset, f"{end.found}; record {known} is known to have been written", False)
        self._damaged(end.path, end.offset, end.found, f"record {wanted}")

    def _note_dropped(self, last: Scanned, later: list[Path]) -> None:
        dropped = last.remains()
        if dropped:
            self.contents.notes.append(
                "a record that was being written when the process died was dropped: "
                f"{dropped} bytes at offset {last.end} of {last.path.name}"
            )
        if later:
            names = ", ".join(path.name for path in later)
            self.contents.notes.append(f"dropped, because nothing in it was on the disk for certain: {names}")

    def _damaged(self, path: Path, offset: int, found: str, expected: str) -> None:
        """Keep the first damage that is met."""
        self._damage = self._damage or (path, offset, found, expected)

    def conclude(self) -> None:
        """Turn damage into an error that says what is good in spite of it."""
        if self._damage is None:
            return
        contents = self.contents
        path, offset, found, expected = self._damage
        base = f"a snapshot up to record {contents.snapshot_sequence} and " if contents.snapshot is not None else ""
        contents.damage = JournalDamaged(
            f"{path} is damaged at offset {offset}: expected {expected}, found: {found}; {base}{len(contents.records)} "
            f"records before it are good, up to sequence number {contents.sequence}; nothing was changed; restore the "
            f"file or load a checkpoint, or read what is good with Journal.salvage({str(self._folder)!r}) and move the "
            "folder away",
            file=str(path),
            offset=offset,
            records=len(contents.records),
            sequence=contents.sequence,
        )
