"""A controller that keeps a journal, without sockets, and a client that asks it."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

from transfer_queue.controller import ControllerService
from transfer_queue.journal.files import REAL_FILES, Files
from transfer_queue.ledger import Ledger
from transfer_queue.messages import Announce, Announced, FreeBlocks
from transfer_queue.wire.ticket import Answer, Ticket

UNIT = 1 << 48


class Life:
    """One life of a controller, and a client that asks it."""

    def __init__(self, folder: Path, *, start: float = 100.0, files: Files = REAL_FILES, **options: Any) -> None:
        self.now = start
        self.folder = folder
        self.ledger = Ledger(**options)
        self.service = ControllerService(self.ledger, lambda: self.now)
        self.pushed: list[FreeBlocks] = []
        self.service.send_frees_by(lambda channel, order: self.pushed.append(order))
        self.service.keep_in(folder, files=files)
        self.ids = itertools.count(1)
        self.answers: dict[int, Answer] = {}

    def ask(self, request: Any, *, client: str = "client/1", request_id: int | None = None) -> Any:
        """The answer, or None for a request that waits."""
        number = next(self.ids) if request_id is None else request_id
        ticket = Ticket(client, number, "channel", request, self._deliver)
        self.service.requests.wait(ticket)
        self.service.submit(request, ticket)
        answer = self.answers.get(number)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _deliver(self, ticket: Ticket, answer: Answer) -> None:
        self.answers[ticket.request_id] = answer
        if not isinstance(answer, BaseException):
            self.service.requests.answered(ticket, answer)

    def pass_time(self, seconds: float) -> None:
        """What is due then is done; whoever is missed then is listened for a moment longer."""
        self.now += seconds
        self.service.tick()
        self.now += 2.1
        self.service.tick()

    def killed(self, folder: Path, **options: Any) -> Life:
        """The next life, from a copy of what this one has written so far."""
        for last in (False, False, False, True):
            shutil.rmtree(folder, ignore_errors=True)
            try:
                shutil.copytree(self.folder, folder)
                break
            except shutil.Error:  # the journal's own thread was removing a segment that is not needed any more
                if last:
                    raise
        return Life(folder, start=self.now, **options)


def announce(life: Life) -> None:
    announced = life.ask(
        Announce(
            unit_id="unit-0",
            address="tcp://127.0.0.1:1",
            local_address="",
            folder="",
            nonce="",
            capacity_bytes=1,
        ),
        client="unit-0/1",
    )
    assert isinstance(announced, Announced)
