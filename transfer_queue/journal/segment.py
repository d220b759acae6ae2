"""One segment of a journal, as its writer sees it: a file of fixed size, mapped."""

from __future__ import annotations

import mmap
import os
import secrets
from contextlib import suppress
from pathlib import Path

from transfer_queue.journal.files import Files
from transfer_queue.journal.layout import (
    DURABLE_AT,
    FOLLOWED_AT,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    pack_number,
    pack_record,
    record_bytes,
)


class Segment:
    """Not thread-safe. `tail` is (bytes used, sequence number of the last record), changed in one step."""

    def __init__(self, path: Path, size_bytes: int, files: Files, *, sync: bool) -> None:
        """Create and reserve an unused segment, or take over one that is there and unused; raises `OSError`."""
        self.path = path
        self.size_bytes = size_bytes
        self.sync = sync
        self.number = self.first = 0
        self.tail = (SEGMENT_HEADER_BYTES, 0)
        self._files = files
        self._salt = secrets.randbits(32)
        self.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC) if path.exists() else files.create(path)
        try:
            files.allocate(self.descriptor, size_bytes)
            if sync:
                files.fsync(self.descriptor)
            self._memory = mmap.mmap(self.descriptor, size_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except BaseException:
            os.close(self.descriptor)
            with suppress(OSError):
                os.unlink(path)
            raise

    def __repr__(self) -> str:
        return f"<Segment {self.path.name}: {self.tail[0]} of {self.size_bytes} bytes, ends with {self.tail[1]}>"

    @property
    def free_bytes(self) -> int:
        """How many bytes of records, headers included, still fit."""
        return self.size_bytes - self.tail[0]

    def begin(self, path: Path, number: int, first: int) -> None:
        """Become the segment `number` of a journal, at `path`; raises `OSError`, and then is still unused."""
        header = SegmentHeader(number, first, self.size_bytes, self._salt, self.sync)
        self._memory[:SEGMENT_HEADER_BYTES] = header.pack()
        self._files.rename(self.path, path)
        self.path, self.number, self.first, self.tail = path, number, first, (SEGMENT_HEADER_BYTES, first - 1)

    def put(self, payload: bytes, durable: int | None) -> int:
        """Write the next record, for which there is room; return its sequence number. `durable` None: the one before.

        The header comes last, so that a process that dies in between has written nothing.
        """
        at, last = self.tail
        start = at + RECORD_HEADER_BYTES
        self._memory[start : start + len(payload)] = payload
        self._memory[at:start] = pack_record(payload, last + 1, last if durable is None else durable, self._salt)
        self.tail = (at + record_bytes(len(payload)), last + 1)
        return last + 1

    def mark_durable(self, sequence: int) -> None:
        self._memory[DURABLE_AT : DURABLE_AT + 8] = pack_number(sequence)

    def mark_followed(self, first: int) -> None:
        """Say that a segment that begins with the record `first` comes next."""
        self._memory[FOLLOWED_AT : FOLLOWED_AT + 8] = pack_number(first)

    def fsync(self) -> None:
        self._files.fsync(self.descriptor)

    def discard(self) -> None:
        """Unmap and remove a segment that was not used."""
        self.close()
        with suppress(OSError):
            self._files.unlink(self.path)

    def close(self) -> None:
        """Unmap; the file stays. May be called twice."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self.descriptor)


def mark_followed(path: Path, first: int) -> None:
    """Say in a segment that is not mapped any more that one that begins with the record `first` comes next."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.pwrite(descriptor, pack_number(first), FOLLOWED_AT)
    finally:
        os.close(descriptor)
