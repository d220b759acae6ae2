"""Requests that a server gets again, and clients that wait, withdraw or vanish."""

from __future__ import annotations

import pytest

from tests.unit.serving import (
    BareClient,
    Recorder,
    draw,
    drawn,
    put,
    put_done,
)
from transfer_queue.messages import (
    ListPartitions,
    ListUnits,
)
from transfer_queue.wire import server as wire_server
from transfer_queue.wire.security import Kind


@pytest.fixture
def frequent_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be named before the server."""
    monkeypatch.setattr(wire_server, "PING_INTERVAL_S", 0.05)


# ---------------------------------------------------------------- the same request again


def test_a_repeated_request_is_done_once(handler: Recorder, client: BareClient) -> None:
    """Sent again with its id, a put gives its first answer."""
    first, again = client.ask(put(), 5), client.ask(put(), 5)
    assert handler.puts == 1
    assert first.indexes.tolist() == again.indexes.tolist() == [1]
    assert client.ask(put(), 6).indexes.tolist() == [2]


def test_an_answer_follows_the_client_to_its_new_connection(
    handler: Recorder, address: str, client: BareClient
) -> None:
    """A request that waits and is sent again over another connection is answered there, once."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    with BareClient(address) as second:
        second.introduce().send(draw(), 1)
        second.ask(ListPartitions(), 2)
        handler.tickets[0].answer(drawn(3))
        number, reply = second.receive()
    assert (number, reply.indexes.tolist(), len(handler.tickets)) == (1, [3], 1)


def test_the_same_number_of_another_client_is_another_request(
    handler: Recorder, address: str, client: BareClient
) -> None:
    """Request ids belong to a client id."""
    client.ask(put(), 1)
    with BareClient(address, "other/1") as other:
        other.introduce().ask(put(), 1)
    assert handler.puts == 2


def test_what_the_client_does_not_wait_for_is_forgotten(handler: Recorder, client: BareClient) -> None:
    """Below the floor that a client names, a repeated request is refused instead of done again."""
    client.ask(put(), 5)
    client.ask(put(), 6, floor=6)
    reply = client.ask(put(), 5)
    assert (reply.name, reply.details) == ("ConnectionLost", {"request_id": 5})
    assert handler.puts == 2


# ---------------------------------------------------------------- clients that are gone


def test_a_client_that_vanished_does_not_wait(handler: Recorder, address: str) -> None:
    """Its waiting request is lost within seconds, and so is an answer that comes later."""
    with BareClient(address) as client:
        client.introduce().send(draw(), 1)
        handler.wait_for(lambda: handler.tickets)
    handler.wait_for(lambda: handler.lost_replies)
    [ticket] = handler.tickets
    assert handler.lost_replies == [(ticket, None)]
    reply = drawn(1)
    ticket.answer(reply)
    handler.wait_for(lambda: len(handler.lost_replies) == 2)
    assert handler.lost_replies[1] == (ticket, reply)


@pytest.mark.usefixtures("frequent_pings")
def test_a_waiting_client_is_pinged(handler: Recorder, client: BareClient) -> None:
    """One that waits longer than the interval hears that the server lives."""
    client.send(ListUnits(timeout_s=60.0), 1)
    assert client.receive_frames() == [bytes([Kind.PING])]


@pytest.mark.parametrize("answered", [False, True], ids=["waiting", "answered"])
def test_a_withdrawn_draw_is_lost(handler: Recorder, client: BareClient, answered: bool) -> None:
    """Cancelled before or after its answer, the handler takes the draw back; asked again, it is a new one."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    reply = drawn(1)
    if answered:
        handler.tickets[0].answer(reply)
        client.receive()
    client.cancel(1)
    handler.wait_for(lambda: handler.lost_replies)
    assert handler.lost_replies == [(handler.tickets[0], reply if answered else None)]
    client.send(draw(), 1)
    handler.wait_for(lambda: len(handler.tickets) == 2)


def test_a_put_that_was_answered_cannot_be_withdrawn(handler: Recorder, client: BareClient) -> None:
    """Its outcome stands and can still be asked for."""
    client.ask(put(), 1)
    client.cancel(1)
    assert client.ask(put(), 1).indexes.tolist() == put_done(1).indexes.tolist()
    assert (handler.puts, handler.lost_replies) == (1, [])
