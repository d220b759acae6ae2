"""An answer goes out before what else is due; who waits for what its request brought is served with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.ledger.driver import draw_request, put_request
from transfer_queue.errors import GetMetaTimeout
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


def test_an_answer_goes_out_before_what_else_is_due(client: Client) -> None:
    """And `send` is called without the lock: a draw whose time is over is told so afterwards."""
    sent: list[list[type]] = []

    def send() -> None:
        with client.life.service._lock:
            sent.append(client.kinds())

    client.ask(draw_request(2, timeout_s=1.0))
    client.life.now += 2.0
    client.ask(put_request(2, ("y",), UNIT, partition_id="other"), send)
    assert sent == [[PutDone]] and client.kinds() == [PutDone, GetMetaTimeout]


def test_who_waits_for_it_is_served_with_it(client: Client) -> None:
    """A draw that waits for what a put brings gets it before anybody hears of the put and asks for it too."""
    client.ask(draw_request(2))
    client.ask(put_request(3, ("x",), UNIT), lambda: pytest.fail("the answers go out together"))
    waited, put = client.given
    assert isinstance(waited, Drawn) and waited.indexes.tolist() == [0, 1] and isinstance(put, PutDone)


def test_what_raises_while_it_is_sent_holds_up_nobody(client: Client) -> None:
    """What is due is done with the next request."""

    def fail() -> None:
        raise RuntimeError("a bug")

    client.ask(draw_request(2, timeout_s=1.0))
    client.life.now += 2.0
    with pytest.raises(RuntimeError):
        client.ask(put_request(2, ("y",), UNIT, partition_id="other"), fail)
    assert client.kinds() == [PutDone]
    client.ask(GetStatus(partition_id="p", global_step=None, task_name="t", fields=("x",)))
    assert GetMetaTimeout in client.kinds()


def test_what_was_answered_first_is_known_after_a_restart(tmp_path: Path) -> None:
    """It is written down before."""
    client = Client(Life(tmp_path / "first"))
    announce(client.life)
    lives: list[Life] = []
    client.ask(put_request(2, ("x",), UNIT), lambda: lives.append(client.life.killed(tmp_path / "second")))
    [second] = lives
    assert second.ask(draw_request(2), client="client/3").indexes.tolist() == [0, 1]
    for life in (client.life, second):
        life.service.close()
