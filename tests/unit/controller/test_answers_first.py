"""An answer goes out before what else its request made possible is looked at, and nobody comes in between."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.ledger.driver import draw_request, put_request
from transfer_queue.messages import Drawn, GetStatus, PutDone
from transfer_queue.wire.ticket import Answer, Ticket

Send = Callable[[], None]


class Client:
    """Hands requests in as the thread of a server does, which sends answers in between."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.given: list[Answer] = []

    def ask(self, request: Any, send: Send = lambda: None) -> None:
        ticket = Ticket("client/2", next(self.life.ids), "channel", request, lambda ticket, answer: self._take(answer))
        ticket.send = send
        self.life.service.requests.wait(ticket)
        self.life.service.submit(request, ticket)

    def _take(self, answer: Answer) -> None:
        self.given.append(answer)

    def kinds(self) -> list[type]:
        return [type(answer) for answer in self.given]


@pytest.fixture(params=["kept", "not kept"])
def client(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Client]:
    life = Life(tmp_path / "journal")
    announce(life)
    if request.param == "not kept":
        keeper = life.service._answers.keeper
        life.service._answers.keeper = None
        life.ledger.records.keep = False
        assert keeper is not None
        keeper.close()
    yield Client(life)
    life.service.close()


def test_a_put_is_answered_before_the_draw_that_waits_for_it(client: Client) -> None:
    """And sent: `send` is called without the lock, when the other answer is not there yet."""
    sent: list[list[type]] = []

    def send() -> None:
        with client.life.service._lock:
            sent.append(client.kinds())

    client.ask(draw_request(2))
    client.ask(put_request(2, ("x",), UNIT), send)
    assert sent == [[PutDone]] and client.kinds() == [PutDone, Drawn]


def test_who_asks_in_between_does_not_go_ahead_of_who_waits(client: Client) -> None:
    """A draw from within the process, while the answer of the put is sent, comes behind the one that waits."""
    late: list[Any] = []
    client.ask(draw_request(2))
    client.ask(
        put_request(3, ("x",), UNIT),
        lambda: late.append(client.life.ask(draw_request(1), client="client/3")),
    )
    [waited] = [answer for answer in client.given if isinstance(answer, Drawn)]
    assert waited.indexes.tolist() == [0, 1] and late[0].indexes.tolist() == [2]


def test_what_raises_while_it_is_sent_holds_up_nobody(client: Client) -> None:
    """What waits is looked at with the next request."""

    def fail() -> None:
        raise RuntimeError("a bug")

    client.ask(draw_request(2))
    with contextlib.suppress(RuntimeError):
        client.ask(put_request(2, ("x",), UNIT), fail)
    assert client.kinds() == [PutDone]
    client.ask(GetStatus(partition_id="p", global_step=None, task_name="t", fields=("x",)))
    assert client.kinds()[:2] == [PutDone, Drawn]


def test_what_was_answered_first_is_known_after_a_restart(tmp_path: Path) -> None:
    """The put is written down before it is answered; the draw that waits comes again by itself."""
    client = Client(Life(tmp_path / "first"))
    announce(client.life)
    lives: list[Life] = []
    client.ask(draw_request(2))
    client.ask(put_request(2, ("x",), UNIT), lambda: lives.append(client.life.killed(tmp_path / "second")))
    [second] = lives
    assert second.ask(draw_request(2), client="client/3").indexes.tolist() == [0, 1]
    for life in (client.life, second):
        life.service.close()
