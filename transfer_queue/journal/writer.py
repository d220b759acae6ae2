"""The journal: what a server appends before it answers, so that the next process of the same server can go on.

Records are copied into files that are allocated before they are needed and mapped, so an append is a copy of memory:
it makes no system call, cannot meet a full disk and cannot be half done for a reader. In a folder in shared memory
that survives the process; in a folder on disk with `sync` it survives the machine: a thread syncs all records that
somebody waits for together.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from transfer_queue.errors import CapacityExceeded, InvalidArgument, JournalUnavailable, TransferQueueError
from transfer_queue.journal.files import REAL_FILES, Files, failure
from transfer_queue.journal.layout import MAX_PAYLOAD_BYTES, record_bytes
from transfer_queue.journal.lock import FolderLock
from transfer_queue.journal.names import LOCK, list_segments, list_unfinished
from transfer_queue.journal.reading import Contents, Recovered, read_folder
from transfer_queue.journal.segment import mark_followed
from transfer_queue.journal.snapshot import SnapshotFile, SnapshotWriter
from transfer_queue.journal.space import Sizes, Space, round_to_pages
from transfer_queue.journal.syncing import GroupSync

DEFAULT_SEGMENT_BYTES = 4 << 20
DEFAULT_RESERVE_BYTES = 1 << 20
DEFAULT_SNAPSHOT_BYTES = 4 << 20  # some 10 000 changes of a controller, which take less than a second to make again


class Journal:
    """One writer process for a folder; all methods may be called from any thread of it. A forked child may not."""

    def __init__(
        self,
        folder: Path,
        contents: Contents,
        lock: FolderLock,
        files: Files,
        sizes: Sizes,
        *,
        sync: bool,
    ) -> None:
        """Use `Journal.open`."""
        self._folder = folder
        self._lock = lock
        self._files = files
        self._sync = sync
        self._sizes = sizes
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.Lock())
        self._space = Space(folder, files, self._changed, sizes, sync=sync)
        self._writing_snapshot = threading.Lock()
        self._snapshot_size = len(contents.snapshot or b"")
        self._snapshot_at = 0  # where in the space used so far the last snapshot stands
        self._retry_at = 0  # no new snapshot before this much is used, after one that failed
        self._closing = False
        with self._changed:
            try:
                self._take_over(contents)
            except BaseException:
                self._space.close()
                raise
        self._group = GroupSync(folder, files, self._changed, self._space) if sync else None
        self._thread = threading.Thread(target=self._work, name="tq-journal", daemon=True)
        self._thread.start()

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        sync: bool = False,
        segment_bytes: int = DEFAULT_SEGMENT_BYTES,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        snapshot_bytes: int = DEFAULT_SNAPSHOT_BYTES,
        files: Files = REAL_FILES,
    ) -> tuple[Journal, Recovered]:
        """Create a journal in a folder, or recover the one that is there.

        `reserve_bytes` are kept for essential records. `snapshot_bytes` is how much is appended at least between two
        snapshots. Raises `JournalDamaged`, then nothing was changed; `JournalUnavailable` if another process has it;
        `CapacityExceeded` if there is no space for a new one.
        """
        sizes = Sizes(round_to_pages(segment_bytes), reserve_bytes, snapshot_bytes)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FolderLock(folder)
            try:
                contents = read_folder(folder)
                if contents.damage is not None:
                    raise contents.damage
                return cls(folder, contents, lock, files, sizes, sync=sync), contents.recovered()
            except BaseException:
                lock.close()
                raise
        except OSError as error:
            if isinstance(error, TransferQueueError):
                raise
            raise failure(error, folder, "opening the journal", segment_bytes) from error

    @staticmethod
    def salvage(folder: Path) -> Recovered:
        """Read what is good of a journal that nobody has open, damaged or not; the last note says what is wrong."""
        if not (folder / LOCK).exists():  # a copy, say: nothing is written into it
            return read_folder(folder).recovered()
        with closing(FolderLock(folder)):
            return read_folder(folder).recovered()

    def __repr__(self) -> str:
        state = "closed" if self._closing else f"{self._space.free_bytes()} bytes free"
        return f"<Journal {self._folder}: record {self.sequence}, {state}>"

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def syncs(self) -> bool:
        """Whether records are made durable on a disk, which takes time."""
        return self._sync

    @property
    def sequence(self) -> int:
        """The number of the last record, counted from 1 over all processes that wrote here."""
        return self._space.last_sequence

    def append(self, *parts: bytes | memoryview, essential: bool = False) -> int:
        """Append one record, which is the parts joined; return its sequence number.

        Raises before anything has changed: `CapacityExceeded` if there is no space, which an ordinary record meets
        earlier than an essential one; `JournalUnavailable` after `close` or when the disk has failed.
        """
        payload = b"".join(parts)
        self._check_owner()
        if len(payload) > MAX_PAYLOAD_BYTES:
            raise InvalidArgument(f"a record has at most {MAX_PAYLOAD_BYTES} bytes, not {len(payload)}")
        with self._changed:
            segment = self._space.place(record_bytes(len(payload)), essential=essential)
            return segment.put(payload, None if self._group is None else self._group.durable)

    def check_room(self, size_bytes: int, *, essential: bool = False) -> None:
        """Raise as `append` if a record of so many bytes could not be appended now."""
        self._check_owner()
        with self._changed:
            self._space.place(record_bytes(size_bytes), essential=essential)

    def when_durable(self, done: Callable[[BaseException | None], None]) -> None:
        """Call `done(None)` once all that was appended so far is durable, or `done(error)` if that has failed.

        Without `sync` at once, in the caller; else in a thread of the journal, which `done` must not hold up.
        """
        self._check_owner()
        if self._group is None:
            done(None)
        else:
            self._group.when_durable(done)

    def flush(self) -> None:
        """Wait until all that was appended so far is durable; raises `JournalUnavailable` if the disk fails."""
        ended = threading.Event()
        errors: list[BaseException | None] = []

        def end(error: BaseException | None) -> None:
            errors.append(error)
            ended.set()

        self.when_durable(end)
        ended.wait()
        if errors[0] is not None:
            raise errors[0]

    @property
    def wants_snapshot(self) -> bool:
        """Whether so much was appended since the last snapshot that a new one saves space and time."""
        used = self._space.used_bytes
        enough = max(self._sizes.snapshot_bytes, 2 * self._snapshot_size)
        return used - self._snapshot_at > enough and used >= self._retry_at

    def begin_snapshot(self) -> SnapshotWriter:
        """Return the writer of a snapshot of what was appended so far; quick, takes no space and cannot fail.

        The caller fixes the state to write, then calls `write` of the result where it stops nobody.
        """
        self._check_owner()
        with self._changed:
            at = self._space.used_bytes
            return SnapshotWriter(
                self._space.last_sequence, self._space.number, lambda writer, parts: self._write(writer, parts, at)
            )

    def postpone_snapshot(self) -> None:
        """One could not be written: none is wanted before some more is appended."""
        self._retry_at = self._space.used_bytes + self._sizes.reserve_bytes // 4

    def close(self) -> None:
        """Make durable what was appended, wait for a snapshot that is being written, and let go. The files stay.

        May be called twice; a forked child that calls it changes nothing.
        """
        if os.getpid() != self._pid:
            return
        with self._writing_snapshot:
            with self._changed:
                self._closing = True
                self._space.refuse(self._closed_error())
            if threading.current_thread() is not self._thread:
                self._thread.join()
            with self._changed:
                self._space.close()
            self._lock.close()

    def _take_over(self, contents: Contents) -> None:
        """Go on in a new segment behind what was read, and remove what is not needed any more."""
        space, folder = self._space, self._folder
        space.number, space.sequence = contents.next_number - 1, contents.sequence
        space.passed_bytes = contents.used_bytes
        unfinished = list_unfinished(folder)
        spares = [path for path in unfinished if path.name.startswith("spare-")]
        for path in contents.unneeded + [path for path in unfinished if path not in spares]:
            self._files.unlink(path)
        space.adopt(spares)
        try:
            space.begin_first()
        except CapacityExceeded as error:
            if contents.last_segment is None:
                raise
            contents.notes.append(f"recovered, but nothing can be appended yet: {error}")
        if self._sync:
            for path in list_segments(folder).values():
                _fsync(self._files, path)
            self._files.fsync_folder(folder)
        if contents.last_segment is not None and space.current is not None:
            mark_followed(contents.last_segment, space.current.first)

    def _closed_error(self) -> JournalUnavailable:
        return JournalUnavailable(f"the journal in {self._folder} is closed", folder=str(self._folder))

    def _check_owner(self) -> None:
        if os.getpid() != self._pid:
            raise JournalUnavailable(f"the journal in {self._folder} belongs to process {self._pid}, not to its child")

    def _work(self) -> None:
        """Allocate the next segment ahead and sync; ends when the journal closes and nobody waits."""
        space, group = self._space, self._group
        while True:
            with self._changed:
                while not (self._closing or space.wants_spare or (group and group.is_wanted)):
                    self._changed.wait()
                closing = self._closing
                syncing = group is not None and (group.is_wanted or (closing and group.is_behind))
                if closing and not syncing:
                    return
            if group and syncing:
                group.run()
            space.allocate_ahead()

    def _write(self, writer: SnapshotWriter, parts: Iterable[bytes], at: int) -> None:
        """Write a snapshot that was begun when the space used was `at`."""
        with self._writing_snapshot:
            if self._closing:
                raise self._closed_error()
            if at < self._snapshot_at:
                return  # one that was begun later is there
            self.flush()  # a snapshot must not know records that the disk does not
            file = SnapshotFile(self._folder, self._files, sync=self._sync)
            try:
                file.write(writer.sequence, writer.segment, parts)
            except OSError as error:
                if isinstance(error, TransferQueueError):
                    raise
                self.postpone_snapshot()
                raise failure(error, self._folder, "a snapshot of the journal", file.size_bytes) from error
            self._snapshot_at, self._snapshot_size, self._retry_at = at, file.size_bytes, 0
            file.remove_older(writer.sequence, writer.segment)


def _fsync(files: Files, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        files.fsync(descriptor)
    finally:
        os.close(descriptor)
