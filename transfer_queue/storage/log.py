"""The facts of a storage unit on their way to its journal and back.

The journal says itself where it was damaged, but not that it was cut short at a record. So the number of the last
record is kept in a file beside it, noted after the record and before anybody sees its effect: a journal that has less
is not whole. Neither file outlives the machine, and what a killed process has written to them stays.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack

from transfer_queue.errors import CapacityExceeded, DecodeError, JournalDamaged, JournalUnavailable
from transfer_queue.journal import Journal, SnapshotWriter
from transfer_queue.storage.facts import Fact, Known

log = logging.getLogger(__name__)

_FOLDER = "journal"
_END_FILE = "journal.end"
_END = struct.Struct("<Q")
_SEGMENT_BYTES = 1 << 20
_RESERVE_BYTES = 1 << 18
_SNAPSHOT_BYTES = 4 << 20
_FACT_BYTES = 1024  # more than a fact of one block or span takes, with the longest names there are


class FactLog:
    """Not thread-safe, except `finish_snapshot`."""

    def __init__(self, journal: Journal, folder: Path, end: _End) -> None:
        """Use `open`."""
        self._journal = journal
        self._folder = folder
        self._end = end
        self._failing = False  # and it was said

    @classmethod
    def open(cls, folder: Path) -> tuple[FactLog, Known]:
        """Return the log in a unit's folder and what it knows: nothing, if there is none or if it is not whole.

        Raises as `Journal.open`, but for damage: that is reported, and the log begins anew.
        """
        end = _End(folder / _END_FILE)
        try:
            journal, known = _opened(folder / _FOLDER, end)
            try:
                end.note(journal.sequence)
            except BaseException:
                journal.close()
                raise
        except BaseException:
            end.close()
            raise
        return cls(journal, folder / _FOLDER, end), known

    def __repr__(self) -> str:
        return f"<FactLog {self._journal!r}>"

    def check_room(self, facts: int, blocks: int = 0) -> None:
        """Raise `CapacityExceeded` unless so many facts that name so many blocks can be written."""
        self._journal.check_room(_FACT_BYTES * facts + 8 * blocks)

    def write(self, facts: list[Fact]) -> None:
        """Write facts, and then forget them; if there is no space even in reserve, they are kept for the next time.

        Until they are written, `check_room` lets nobody have anything that they made free.
        """
        try:
            self._end.note(self._journal.append(msgpack.packb(facts), essential=True))
        except (CapacityExceeded, JournalUnavailable) as error:
            if not self._failing:
                log.error("the storage unit cannot write down %d facts now: %s", len(facts), error)
            self._failing = True
        else:
            facts.clear()
            self._failing = False

    @property
    def wants_snapshot(self) -> bool:
        return self._journal.wants_snapshot

    def begin_snapshot(self) -> SnapshotWriter:
        """Return what `finish_snapshot` needs; the facts must be fixed at this moment."""
        return self._journal.begin_snapshot()

    @staticmethod
    def finish_snapshot(writer: SnapshotWriter, facts: list[Fact]) -> None:
        try:
            writer.write([msgpack.packb(facts)])
        except (CapacityExceeded, JournalUnavailable) as error:
            log.warning("the storage unit's journal was not shortened: %s", error)

    def close(self, *, remove: bool) -> None:
        """Let go of the journal; `remove`: for good. May be called twice."""
        self._journal.close()
        self._end.close()
        if remove:
            self._end.remove()
            shutil.rmtree(self._folder, ignore_errors=True)


class _End:
    """The number of the last record that was written, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def check(self, sequence: int) -> None:
        """Raise `JournalDamaged` unless a journal that ends with this record is whole."""
        found = os.pread(self._file, _END.size, 0)
        last = _END.unpack(found)[0] if len(found) == _END.size else None
        if last is None and sequence:
            raise JournalDamaged(f"{self._path} is gone, which says how many of the {sequence} records there should be")
        if last is not None and last > sequence:
            raise JournalDamaged(f"{self._path} says that {last} records were written, but there are {sequence}")

    def note(self, sequence: int) -> None:
        """Raises `CapacityExceeded` if there is no space for the file, which is so the first time at most."""
        try:
            os.pwrite(self._file, _END.pack(sequence), 0)
        except OSError as error:
            raise CapacityExceeded(f"cannot write {self._path}: {error}; is there capacity left?") from error

    def close(self) -> None:
        """May be called twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


def _opened(path: Path, end: _End) -> tuple[Journal, Known]:
    options: Any = {"segment_bytes": _SEGMENT_BYTES, "reserve_bytes": _RESERVE_BYTES, "snapshot_bytes": _SNAPSHOT_BYTES}
    journal: Journal | None = None
    try:
        journal, recovered = Journal.open(path, **options)
        end.check(recovered.sequence)
        known = Known.of(_unpacked([recovered.snapshot or b"", *recovered.records]))
        for note in recovered.notes:
            log.warning("storage unit: %s", note)
    except (JournalDamaged, DecodeError) as error:
        log.error("the storage unit in %s forgets what it stored: %s", path.parent, error)
        if journal is not None:
            journal.close()
        shutil.rmtree(path)
        journal, _ = Journal.open(path, **options)
        known = Known()
    return journal, known


def _unpacked(records: Iterable[bytes]) -> Iterable[Fact]:
    for record in records:
        if not record:
            continue
        try:
            yield from msgpack.unpackb(record, use_list=False)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise DecodeError(f"the storage unit's journal has a record that cannot be read: {error}") from error
