"""A storage unit and its controller agree on what is stored: when the unit starts, and whenever it was given up."""

from __future__ import annotations

import logging
import threading

from transfer_queue.errors import TransferQueueError
from transfer_queue.messages import Announced, Reconcile, Reconciled
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.channel import Peer

log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 10.0


class Agreement:
    """Of one unit. `close` ends what is under way; the connection to the controller is to be closed before."""

    def __init__(
        self, service: UnitService, controller: Peer, unit_id: str, *, first_pause_s: float = _FIRST_PAUSE_S
    ) -> None:
        self._service = service
        self._controller = controller
        self._unit_id = unit_id
        self._first_pause_s = first_pause_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._made = False  # the first one
        self._asked = 0  # how often the controller said that the unit is given up
        self._number: int | None = None  # that the controller said last
        self._thread: threading.Thread | None = None  # works on it

    def __repr__(self) -> str:
        return f"<Agreement of storage unit {self._unit_id}: {'sought' if self._thread else 'made'}>"

    def make(self, number: int) -> None:
        """Agree for the first time; if the controller dies meanwhile, with its successor. Raises if that fails.

        If the controller gave the unit up meanwhile, another agreement is sought, as `announced` says.
        """
        asked = self._asked
        self._agree(number)
        with self._lock:
            self._made = True
            if asked != self._asked or self._number not in (None, number):
                self._agree_anew()

    def announced(self, answer: Announced) -> None:
        """The controller was restarted, or met again. If it had given the unit up, agree anew, for as long as it takes.

        Until then writers wait.
        """
        with self._lock:
            self._number = answer.number
            self._asked += answer.given_up
            if not self._made:
                return
            if answer.given_up:
                self._agree_anew()
            elif self._thread is None:
                self._service.number = answer.number

    def close(self) -> None:
        """Give up, and wait until that is done. May be called twice."""
        with self._lock:
            self._ended.set()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _agree_anew(self) -> None:
        """Begin to; called with the lock held."""
        self._service.number = 0
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._seek, name="tq-agreement", daemon=True)
            self._thread.start()

    def _seek(self) -> None:
        """Try until it succeeds; once more if it was asked for meanwhile."""
        pause_s = self._first_pause_s
        while not self._ended.is_set():
            with self._lock:
                asked, number = self._asked, self._number
            assert number is not None
            try:
                self._agree(number)
            except TransferQueueError as error:
                log.warning("storage unit %s could not agree with the controller: %s", self._unit_id, error)
                self._ended.wait(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            with self._lock:
                if asked == self._asked and number == self._number:
                    self._thread = None
                    return

    def _agree(self, number: int) -> None:
        self._service.return_to(number, self._ask)

    def _ask(self, question: Reconcile) -> Reconciled:
        reply = self._controller.begin(question).result(_TIMEOUT_S)
        assert isinstance(reply, Reconciled)
        return reply
