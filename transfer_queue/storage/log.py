"""The facts of a storage unit on their way to its journal and back."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgpack

from transfer_queue.errors import CapacityExceeded, DecodeError, JournalDamaged, JournalUnavailable
from transfer_queue.journal import Journal, SnapshotWriter
from transfer_queue.storage.facts import Fact, Known

log = logging.getLogger(__name__)

_FOLDER = "journal"
_SEGMENT_BYTES = 1 << 20
_RESERVE_BYTES = 1 << 18
_SNAPSHOT_BYTES = 4 << 20
_FACT_BYTES = 256  # more than a fact of one block or span takes


class FactLog:
    """Not thread-safe, except `finish_snapshot`."""

    def __init__(self, journal: Journal, folder: Path) -> None:
        """Use `open`."""
        self._journal = journal
        self._folder = folder

    @classmethod
    def open(cls, folder: Path) -> tuple[FactLog, Known]:
        """Return the log in a unit's folder and what it knows: nothing, if there is none or if it is damaged.

        Raises as `Journal.open`, but for damage: that is reported, and the log begins anew.
        """
        path = folder / _FOLDER
        options: Any = {
            "segment_bytes": _SEGMENT_BYTES,
            "reserve_bytes": _RESERVE_BYTES,
            "snapshot_bytes": _SNAPSHOT_BYTES,
        }
        journal: Journal | None = None
        try:
            journal, recovered = Journal.open(path, **options)
            known = Known.of(_unpacked([recovered.snapshot or b"", *recovered.records]))
            for note in recovered.notes:
                log.warning("storage unit: %s", note)
        except (JournalDamaged, DecodeError) as error:
            log.error("the storage unit in %s forgets what it stored: %s", folder, error)
            if journal is not None:
                journal.close()
            shutil.rmtree(path)
            journal, _ = Journal.open(path, **options)
            known = Known()
        return cls(journal, path), known

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
            self._journal.append(msgpack.packb(facts), essential=True)
        except (CapacityExceeded, JournalUnavailable) as error:
            log.error("the storage unit cannot write down %d facts now: %s", len(facts), error)
        else:
            facts.clear()

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
        if remove:
            shutil.rmtree(self._folder, ignore_errors=True)


def _unpacked(records: Iterable[bytes]) -> Iterable[Fact]:
    for record in records:
        if not record:
            continue
        try:
            yield from msgpack.unpackb(record, use_list=False)
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise DecodeError(f"the storage unit's journal has a record that cannot be read: {error}") from error
