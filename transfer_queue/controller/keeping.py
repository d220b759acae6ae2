"""What a controller writes down before it answers.

Each change of the ledger is one record of the journal, a snapshot takes the place of the records before it
(`controller.recording`). A change that was made but could not be written down, because there is no space, stays here
until there is: nothing else is changed, and nobody is told of it, before that.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transfer_queue.controller.recording import FORMAT, pack_state, packed, recover
from transfer_queue.controller.units import UnitBook
from transfer_queue.errors import CapacityExceeded
from transfer_queue.journal import Journal
from transfer_queue.journal.files import REAL_FILES, Files
from transfer_queue.journal.snapshot import SnapshotWriter
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.records import Record
from transfer_queue.messages import (
    Admit,
    Announce,
    Cut,
    Draw,
    EndCut,
    GetAdmission,
    GetAudit,
    GetExplanation,
    GetKeys,
    GetStatus,
    KeepCut,
    ListPartitions,
    ListUnits,
    Locate,
    Put,
    RegisterSampler,
    Reply,
    Request,
    Restore,
    SetTags,
    WaitKeys,
    Withdraw,
)
from transfer_queue.messages.journal import Marked
from transfer_queue.wire.codec import encode_message, frame_bytes
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.ticket import Ticket

log = logging.getLogger(__name__)

_GROWING = {Put, Draw, SetTags, RegisterSampler, Admit, Announce}  # refused where space is short
_UNRECORDED = {
    *(Locate, GetStatus, GetAudit, GetExplanation, GetAdmission, GetKeys, WaitKeys, ListPartitions, ListUnits),
    *(Withdraw, Cut, KeepCut, EndCut, Restore),  # a restored state is written down as a whole
}
_RECORD_BYTES = 4096  # of a record beside the request and the rows
_MARGIN_BYTES = 4 * _RECORD_BYTES  # of the reserve: for what nobody asks for, as leases that end
_ROW_BYTES = 32  # index and mark of a row that a draw hands out, twice


class Keeper:
    """Keeps the state of one controller in a journal. Used under the controller's lock, but for `close`."""

    def __init__(self, journal: Journal, ledger: Ledger, units: UnitBook, requests: RequestTable) -> None:
        self._journal = journal
        self._ledger = ledger
        self._units = units
        self._requests = requests
        self._encoded: tuple[Any, Sequence[Any]] | None = None  # the request that was looked at last, and its frames
        self.syncs = journal.syncs  # what is kept is not there for good at once: see `when_durable`
        self._snapshot: threading.Thread | None = None
        self._promised = 0  # bytes of records to come
        self._unwritten: deque[bytes] = deque()  # records of changes that were made
        self.held_back = False  # some that wait were not let in
        self.snapshot_error: str | None = None  # why the last snapshot that was begun is not there
        ledger.records.keep = True
        ledger.serving.admits = self.admits

    @classmethod
    def open(
        cls,
        folder: Path,
        ledger: Ledger,
        units: UnitBook,
        requests: RequestTable,
        *,
        sync: bool,
        clock: Callable[[], float],
        files: Files = REAL_FILES,
    ) -> Keeper:
        """Fill an empty ledger with what the folder holds, and go on from there.

        Raises `JournalDamaged`, changing nothing, if it does not fit together; `JournalUnavailable` if it is in use.
        """
        journal, recovered = Journal.open(folder, sync=sync, files=files)
        try:
            for note in recovered.notes:
                log.warning("%s", note)
            known = recovered.sequence > 0
            recover(recovered, ledger, units, requests)
            keeper = cls(journal, ledger, units, requests)
            if known:
                ledger.resume(clock())  # the time that this took is nobody's
                with suppress(CapacityExceeded):  # it recovers on a full disk as well, and goes on when there is space
                    keeper.keep(ledger.records.take())
            return keeper
        except BaseException:
            journal.close()
            raise

    def __repr__(self) -> str:
        return f"<Keeper of {self._journal!r}>"

    # ------------------------------------------------------------ writing

    def admit(self, request: Request, frames: Sequence[Any] | None = None) -> None:
        """Raise `CapacityExceeded` if there may be no room to write down what this request changes.

        `frames`: as it came, if it did; they are written down as they are.
        """
        if type(request) in _UNRECORDED:
            self._encoded = None
            return
        if frames is None:
            frames = encode_message(request)
        self._encoded = (request, frames)
        size = self._size(request, frames)
        if type(request) in _GROWING and not (isinstance(request, Announce) and self._units.returns(request)):
            self._journal.check_room(size)
        else:  # what may give room back goes on into the reserve
            self._journal.check_room(size + _MARGIN_BYTES, essential=True)

    def admits(self, request: Put) -> bool:
        """Whether there is room as well for this put, which has waited, beside those let in since the last `keep`."""
        size = self._promised + self._size(request, encode_message(request))
        try:
            self._journal.check_room(size)
        except CapacityExceeded:
            self.held_back = True
            return False
        self._promised = size
        return True

    def _size(self, request: Request, frames: Sequence[Any]) -> int:
        """The most that a record of this request takes."""
        rows = min(request.batch_size, self._ledger.capacity) if isinstance(request, Draw) else 0
        return sum(map(frame_bytes, frames)) + _RECORD_BYTES + _ROW_BYTES * max(rows, 0)

    @property
    def short(self) -> bool:
        """There is no room for more than what gives room back: nothing that waits is to be served now."""
        try:
            self._journal.check_room(_RECORD_BYTES * 16)
        except CapacityExceeded:
            return True
        return False

    @property
    def behind(self) -> bool:
        """Changes were made that are not written down: nobody may be told of them, nor may anything else be changed."""
        return bool(self._unwritten)

    def keep(self, records: list[Record], ticket: Ticket | None = None) -> None:
        """Write changes down. `ticket`: of the request that is being carried out; others name theirs themselves.

        Raises as `catch_up`.
        """
        for record in records:
            asked: Any = record.ticket
            if asked is None and ticket is not None and record.request is ticket.request:
                asked = (ticket.client_id, ticket.request_id)
            known = self._encoded is not None and self._encoded[0] is record.request
            frames = self._encoded[1] if known and self._encoded else encode_message(record.request)
            self._unwritten.append(packed(record, asked, frames))
        self._encoded, self._promised = None, 0
        self.catch_up()

    def catch_up(self) -> None:
        """Write down what could not be written so far.

        Raises `CapacityExceeded` if there is still no space for it, `JournalUnavailable` if there never will be.
        """
        while self._unwritten:
            self._journal.append(self._unwritten[0], essential=True)
            self._unwritten.popleft()

    def report(self) -> dict[str, Any]:
        """How the journal does, as plain values."""
        return {
            "records": self._journal.sequence,
            "unwritten": len(self._unwritten),
            "snapshot_error": self.snapshot_error,
        }

    def when_durable(self, done: Callable[[BaseException | None], None]) -> None:
        """Call back when all that was kept so far will be there after a restart."""
        self._journal.when_durable(done)

    def flush(self) -> None:
        """Wait for that."""
        self._journal.flush()

    def close(self) -> None:
        """End the snapshot under way and let go of the journal. May be called twice."""
        if self._snapshot is not None:
            self._snapshot.join()
        self._journal.close()

    # ------------------------------------------------------------ snapshots

    def snapshot_if_due(self) -> None:
        """Write the state down as a whole once the records take too much space. Never raises: see `snapshot_error`."""
        if self.behind or not self._journal.wants_snapshot:
            return
        if self._snapshot is None or not self._snapshot.is_alive():
            try:
                self.snapshot()
            except (MemoryError, OSError, RuntimeError) as error:  # the last: no thread could be started
                self._not_written(error)

    def snapshot(self) -> threading.Thread:
        """Write the state down as it is now, in a thread: only copying it holds others up."""
        work = (self._journal.begin_snapshot(), self.state())
        thread = threading.Thread(target=self._write, args=work, name="transfer_queue snapshot", daemon=True)
        thread.start()
        self._snapshot = thread
        return thread

    def _write(self, writer: SnapshotWriter, state: dict[str, Any]) -> None:
        try:
            writer.write(pack_state(state))
        except Exception as error:  # whatever it was: the journal goes on, and the next snapshot may succeed
            self._not_written(error)
        else:
            self.snapshot_error = None

    def _not_written(self, error: BaseException) -> None:
        """Say so once, until one is written again, and try again after some more records."""
        if self.snapshot_error is None:
            log.warning("no snapshot of the controller was written; its journal goes on growing: %r", error)
        self.snapshot_error = f"{type(error).__name__}: {error}"
        self._journal.postpone_snapshot()

    def replace(self, ticket: Ticket, reply: Reply, now: float) -> None:
        """The state was changed by no record: write it down as a whole, with the answer to who asked for that.

        A record that changes nothing comes first, so that no snapshot of before has the same place.
        """
        self.keep([Record(Marked(), now)])
        self._requests.restore(ticket.client_id, ticket.request_id, ticket.request, reply)
        self._journal.begin_snapshot().write(pack_state(self.state()))

    def state(self) -> dict[str, Any]:
        """Everything that has to be there after a restart."""
        return {
            "format": FORMAT,
            "ledger": self._ledger.state(),
            "units": self._units.state(),
            "requests": self._requests.dump(),
        }
