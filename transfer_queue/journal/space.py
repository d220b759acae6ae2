"""The space of a journal: the segment in use, the next one, which is allocated ahead, and who may use what is left."""

from __future__ import annotations

import itertools
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transfer_queue.errors import InvalidArgument, JournalUnavailable
from transfer_queue.journal.files import Files, failure
from transfer_queue.journal.layout import SEGMENT_HEADER_BYTES
from transfer_queue.journal.names import segment_path, spare_path
from transfer_queue.journal.segment import Segment

PAGE_BYTES = 4096


@dataclass(frozen=True)
class Sizes:
    """What a journal was configured with. `snapshot_bytes`: how much is appended at least between two snapshots."""

    segment_bytes: int
    reserve_bytes: int
    snapshot_bytes: int

    def __post_init__(self) -> None:
        most = self.segment_bytes - SEGMENT_HEADER_BYTES
        if not 0 <= self.reserve_bytes <= most:
            raise InvalidArgument(f"reserve_bytes has to fit into a segment: 0 to {most}, not {self.reserve_bytes}")


class Space:
    """All methods but `allocate_ahead` need the lock of `changed`; `place` may let go of it while it waits."""

    def __init__(self, folder: Path, files: Files, changed: threading.Condition, sizes: Sizes, *, sync: bool) -> None:
        self.current: Segment | None = None
        self.number = 0  # of the last segment that was begun
        self.sequence = 0  # what it ended with, while there is no current one
        self.passed_bytes = 0  # space of the segments before the current one
        self._refusal: JournalUnavailable | None = None
        self._folder = folder
        self._files = files
        self._changed = changed
        self._sync = sync
        self._size_bytes = sizes.segment_bytes
        self._reserve = sizes.reserve_bytes
        self._retired: list[Segment] = []
        self._spare: Segment | None = None
        self._spare_count = 0
        self._allocating = False
        self._full = False  # the last try to allocate failed: the next one is made when it is needed

    @property
    def wants_spare(self) -> bool:
        """Whether the next segment should be allocated now."""
        return self._spare is None and not self._allocating and not self._full and self._refusal is None

    @property
    def last_sequence(self) -> int:
        return self.current.tail[1] if self.current else self.sequence

    @property
    def used_bytes(self) -> int:
        """The space of all segments so far."""
        return self.passed_bytes + (self.current.tail[0] if self.current else 0)

    def free_bytes(self) -> int:
        """Return the space for ordinary records that is allocated."""
        rest = self.current.free_bytes if self.current else 0
        ahead = self._spare.free_bytes if self._spare else 0
        return max(0, rest + ahead - self._reserve)

    def adopt(self, spares: list[Path]) -> None:
        """Use a spare segment that a writer which died has left, so that a restart needs no new space."""
        for path in spares:
            content = path.read_bytes()
            if self._spare is None and len(content) == self._size_bytes and not content.strip(b"\0"):
                with suppress(OSError):
                    self._spare = Segment(path, self._size_bytes, self._files, sync=self._sync)
            else:
                self._files.unlink(path)
        self._spare_count = max((int(path.name.rpartition("-")[2]) for path in spares), default=0)

    def place(self, size_bytes: int, *, essential: bool) -> Segment:
        """Return the current segment, which has space for a record now; raises before anything has changed."""
        reserve = 0 if essential else self._reserve
        while True:
            if self._refusal is not None:
                raise self._refusal
            rest = self.current.free_bytes if self.current else 0
            ahead = self._spare.free_bytes if self._spare else 0
            if self.current and size_bytes <= rest and rest + ahead - size_bytes >= reserve:
                return self.current
            if self._spare and rest < size_bytes <= ahead - reserve:
                return self._begin_spare(self._spare)
            if self._allocating:
                self._changed.wait()
            elif self._spare is None:
                self._spare = self._allocate(self._size_bytes, size_bytes)
            else:
                own_bytes = round_to_pages(SEGMENT_HEADER_BYTES + size_bytes)
                return self._begin(self._allocate(own_bytes, size_bytes))

    def begin_first(self) -> Segment:
        """Begin a segment behind those that were read; raises `CapacityExceeded`."""
        if self._spare is None:
            self._spare = self._allocate(self._size_bytes, self._size_bytes)
        return self._begin_spare(self._spare)

    def allocate_ahead(self) -> None:
        """Allocate the next segment, without the lock, if nobody else does; a full disk is met again by `place`."""
        with self._changed:
            if not self.wants_spare:
                return
            self._allocating = True
            path = self._next_path()
        spare = None
        with suppress(OSError):
            spare = Segment(path, self._size_bytes, self._files, sync=self._sync)
        with self._changed:
            self._allocating, self._spare, self._full = False, spare, spare is None
            self._changed.notify_all()

    def refuse(self, reason: JournalUnavailable) -> None:
        """Take no more records, also from those who wait for space now."""
        self._refusal = reason
        self._changed.notify_all()

    def close(self) -> None:
        """Let go of all segments; what is in them stays, the spare too. May be called twice."""
        for segment in [*self._retired, self.current, self._spare]:
            if segment is not None:
                segment.close()

    def unsynced(self) -> list[Segment]:
        """Return the segments that may hold records which were not synced yet, in order; the current one is last."""
        return [*self._retired, *([self.current] if self.current else [])]

    def mark_synced(self, segments: list[Segment], durable: int) -> None:
        """Write into segments that were synced what their reader may expect; that itself need not be synced."""
        for segment, after in itertools.pairwise(segments):
            segment.mark_durable(after.first - 1)
            segment.mark_followed(after.first)
            self._retired.remove(segment)
            segment.close()
        if segments:
            segments[-1].mark_durable(durable)

    def _allocate(self, size_bytes: int, needed_bytes: int) -> Segment:
        try:
            segment = Segment(self._next_path(), size_bytes, self._files, sync=self._sync)
        except OSError as error:
            self._full = True
            raise failure(error, self._folder, f"a record of {needed_bytes} bytes", size_bytes) from error
        self._full = False
        return segment

    def _next_path(self) -> Path:
        self._spare_count += 1
        return spare_path(self._folder, self._spare_count)

    def _begin_spare(self, spare: Segment) -> Segment:
        self._begin(spare)
        self._spare = None
        self._changed.notify_all()
        return spare

    def _begin(self, segment: Segment) -> Segment:
        """Let a segment be the current one; its name and header are there before anything else changes."""
        old = self.current
        first = (old.tail[1] if old else self.sequence) + 1
        try:
            segment.begin(segment_path(self._folder, self.number + 1), self.number + 1, first)
        except OSError as error:
            if segment is not self._spare:
                segment.discard()
            raise failure(error, self._folder, "the name of a journal's next segment", segment.size_bytes) from error
        self.number += 1
        self.current = segment
        if old is not None:
            self.passed_bytes += old.size_bytes
            if self._sync:
                self._retired.append(old)
            else:
                old.mark_followed(first)
                old.close()
        return segment


def round_to_pages(size_bytes: int) -> int:
    return -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
