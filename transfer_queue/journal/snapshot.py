"""Writing a snapshot: the state up to a record, in place of all records up to it."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from transfer_queue.errors import InvalidArgument
from transfer_queue.journal.aside import write_aside
from transfer_queue.journal.files import Files, write_all
from transfer_queue.journal.layout import SNAPSHOT_HEADER_BYTES, SnapshotHeader
from transfer_queue.journal.names import list_segments, list_snapshots, snapshot_path


class SnapshotWriter:
    """Takes the content of one snapshot; records up to `sequence` are in it, later ones are not."""

    def __init__(self, sequence: int, segment: int, write: Callable[[SnapshotWriter, Iterable[bytes]], None]) -> None:
        self.sequence = sequence
        self.segment = segment  # the oldest that is needed beside the snapshot
        self._write = write
        self._used = False

    def __repr__(self) -> str:
        return f"<SnapshotWriter up to record {self.sequence}>"

    def write(self, parts: Iterable[bytes]) -> None:
        """Write the content, which is the parts joined, and let it replace the records up to `sequence`. Once only.

        May run in any thread while records are appended. If it raises, the journal goes on with what it had:
        `CapacityExceeded` if there is no space, `JournalUnavailable` if the journal is closed or its disk fails.
        """
        if self._used:
            raise InvalidArgument("a snapshot is written once: begin another one")
        self._used = True
        self._write(self, parts)


class SnapshotFile:
    """A file being written; `size_bytes` is known as far as it got, for the message of an error."""

    def __init__(self, folder: Path, files: Files, *, sync: bool) -> None:
        self.size_bytes = 0
        self._folder = folder
        self._files = files
        self._sync = sync

    def write(self, sequence: int, segment: int, parts: Iterable[bytes]) -> None:
        """Make `snapshot-<sequence>` appear whole; raises `OSError`."""
        with write_aside(snapshot_path(self._folder, sequence), sync=self._sync, files=self._files) as descriptor:
            write_all(self._files, descriptor, bytes(SNAPSHOT_HEADER_BYTES))
            checksum = 0
            for part in parts:
                write_all(self._files, descriptor, part)
                checksum = zlib.crc32(part, checksum)
                self.size_bytes += memoryview(part).nbytes
            os.lseek(descriptor, 0, os.SEEK_SET)
            write_all(self._files, descriptor, SnapshotHeader(sequence, segment, self.size_bytes).pack(checksum))

    def remove_older(self, sequence: int, segment: int) -> None:
        """Remove what the snapshot stands for; what cannot be removed now is removed with the next one."""
        snapshots = [path for number, path in list_snapshots(self._folder).items() if number < sequence]
        segments = [path for number, path in list_segments(self._folder).items() if number < segment]
        for path in snapshots + segments:
            with suppress(OSError):
                self._files.unlink(path)
