"""Group commit: one sync of the files for all records that somebody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from transfer_queue.errors import JournalUnavailable
from transfer_queue.journal.files import Files
from transfer_queue.journal.space import Space


class GroupSync:
    """Who waits for which records. `durable` is the last record that is on the disk."""

    def __init__(self, folder: Path, files: Files, changed: threading.Condition, space: Space) -> None:
        self.durable = space.last_sequence
        self._folder = folder
        self._files = files
        self._changed = changed
        self._space = space
        self._failed: JournalUnavailable | None = None
        self._waiting: list[Callable[[BaseException | None], None]] = []

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits; needs the lock."""
        return bool(self._waiting)

    @property
    def is_behind(self) -> bool:
        """Whether there are records that are not on the disk and may still come there; needs the lock."""
        return self._failed is None and self.durable < self._space.last_sequence

    def when_durable(self, done: Callable[[BaseException | None], None]) -> None:
        """Call `done` as `Journal.when_durable` says."""
        with self._changed:
            if self.is_behind:
                self._waiting.append(done)
                self._changed.notify_all()
                return
            error = self._failed
        done(error)

    def run(self) -> None:
        """Sync what was appended up to now and tell those who wait for it; without the lock, from one thread.

        After a failed sync nobody knows what is on the disk, and trying again could only hide it: the journal takes
        no more records.
        """
        with self._changed:
            waiting, self._waiting = self._waiting, []
            segments, target = self._space.unsynced(), self._space.last_sequence
        error: JournalUnavailable | None = None
        try:
            for segment in segments:
                segment.fsync()
            if len(segments) > 1:  # their names are new
                self._files.fsync_folder(self._folder)
        except OSError as problem:
            error = JournalUnavailable(
                f"the journal in {self._folder} takes no more records: syncing it failed ({problem}), so what was "
                "appended last may not be on the disk; see to the disk and restart this process",
                folder=str(self._folder),
            )
            error.__cause__ = problem
        with self._changed:
            if error is None:
                self.durable = target
                self._space.mark_synced(segments, target)
            else:
                self._space.refuse(error)
                self._failed = error
                waiting += self._waiting
                self._waiting = []
        for done in waiting:
            done(error)
