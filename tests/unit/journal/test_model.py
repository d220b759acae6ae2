"""Random histories of a journal against a list."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.journal.faulty import FaultyFiles, copied, overwrite, segments
from transfer_queue.errors import CapacityExceeded
from transfer_queue.journal import Journal, SnapshotWriter

PAYLOADS = st.binary(max_size=60) | st.integers(0, 9000).map(lambda size: b"\xa5" * size)


class JournalMachine(RuleBasedStateMachine):
    """`records` is everything ever appended; a snapshot holds how many of them it stands for."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.TemporaryDirectory()
        self.folder = Path(self.root.name) / "live"
        self.files = FaultyFiles()
        self.records: list[bytes] = []
        self.snapshots: list[tuple[SnapshotWriter, int]] = []
        self.journal = self.open()

    def open(self) -> Journal:
        journal, found = Journal.open(self.folder, segment_bytes=4096, reserve_bytes=512, files=self.files)
        known = int(found.snapshot or b"0")
        assert found.sequence == len(self.records)
        assert list(found.records) == self.records[known:]
        self.snapshots = []
        return journal

    @rule(payload=PAYLOADS, essential=st.booleans())
    def append(self, payload: bytes, essential: bool) -> None:
        try:
            number = self.journal.append(payload, essential=essential)
        except CapacityExceeded:
            assert self.files.space_bytes is not None
            return
        self.records.append(payload)
        assert number == len(self.records)

    @rule(payload=PAYLOADS)
    def check_and_append(self, payload: bytes) -> None:
        try:
            self.journal.check_room(len(payload))
        except CapacityExceeded:
            assert self.files.space_bytes is not None
            return
        self.journal.append(payload)
        self.records.append(payload)

    @rule(space_bytes=st.none() | st.integers(0, 20_000))
    def change_space(self, space_bytes: int | None) -> None:
        self.files.space_bytes = space_bytes

    @rule()
    def begin_snapshot(self) -> None:
        self.snapshots.append((self.journal.begin_snapshot(), len(self.records)))

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def write_snapshot(self, data: st.DataObject) -> None:
        snapshot, count = self.snapshots.pop(data.draw(st.integers(0, len(self.snapshots) - 1)))
        try:
            snapshot.write([b"%d" % count])
        except CapacityExceeded:
            assert self.files.space_bytes is not None

    @rule(torn=st.binary(max_size=40))
    def die_and_come_back(self, torn: bytes) -> None:
        """The files as they are now, with a part of a record behind them, are what the next process finds."""
        copy = copied(self.folder, self.folder.with_name("copy"))
        self.journal.close()
        last = segments(copy)[-1]
        overwrite(copy / last.path.name, last.end, torn[: 4096 - last.end] if last.header.size_bytes == 4096 else b"")
        copied(copy, self.folder)
        self.files.space_bytes = None
        self.journal = self.open()

    @invariant()
    def numbers_agree(self) -> None:
        assert self.journal.sequence == len(self.records)

    def teardown(self) -> None:
        self.journal.close()
        self.files.space_bytes = None
        self.open().close()
        self.root.cleanup()


JournalMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=40)
TestJournalModel = JournalMachine.TestCase
