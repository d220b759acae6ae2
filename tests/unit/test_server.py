"""A server on real sockets: one bad request, client or handler never harms another."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from tests.unit.serving import (
    TOKEN,
    BareClient,
    Recorder,
    announce,
    draw,
    drawn,
    explain,
    put,
)
from transfer_queue.messages import (
    Done,
    FreeBlocks,
    GetAudit,
)
from transfer_queue.wire.server import Server

# ---------------------------------------------------------------- answers


def test_replies_echo_the_id_of_their_request(client: BareClient) -> None:
    """Requests sent together are told apart by their ids."""
    for number in (5, 3, 9):
        client.send(GetAudit(partition_id=str(number)), number)
    answers = dict(client.receive() for _ in range(3))
    assert {number: reply.entries["asked"] for number, reply in answers.items()} == {3: "3", 5: "5", 9: "9"}


def test_a_bug_in_the_handler_harms_only_its_request(server: Server, client: BareClient) -> None:
    """The caller gets type and traceback, it is counted, and the next request is served."""
    reply = client.ask(explain("bug"), 1)
    assert (reply.name, "a bug in the handler" in reply.message) == ("RemoteError", True)
    assert client.ask(GetAudit(partition_id="next"), 2).entries == {"asked": "next"}
    assert server.failures == 1


def test_an_error_of_ours_arrives_with_its_details(server: Server, client: BareClient) -> None:
    """A handler may answer with an exception; that is no failure of the server."""
    reply = client.ask(explain("unknown"), 1)
    assert (reply.name, reply.details) == ("InvalidArgument", {"known": ["a"]})
    assert server.failures == 0


def test_an_answer_that_cannot_be_sent_becomes_an_error(handler: Recorder, client: BareClient) -> None:
    """The caller hears why, and the handler that its answer was lost."""
    assert client.ask(explain("unsendable"), 1).name == "EncodeError"
    handler.wait_for(lambda: len(handler.lost_replies) == 1)


def test_answers_may_come_from_any_thread(handler: Recorder, client: BareClient) -> None:
    """A waiting request is answered as soon as another thread answers its ticket."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    answering = threading.Thread(target=handler.tickets[0].answer, args=(drawn(4),))
    answering.start()
    number, reply = client.receive()
    answering.join()
    assert (number, reply.indexes.tolist()) == (1, [4])


def test_a_ticket_is_answered_once(handler: Recorder, client: BareClient) -> None:
    """The second answer is a bug of the handler and says so."""
    client.ask(put(), 1)
    with pytest.raises(AssertionError, match="twice"):
        handler.tickets[0].answer(Done())


def test_waiting_requests_delay_nobody(handler: Recorder, address: str, client: BareClient) -> None:
    """While one client waits, others and itself are served."""
    client.send(draw(), 1)
    handler.wait_for(lambda: handler.tickets)
    with BareClient(address, "other/1") as other:
        assert other.introduce().ask(GetAudit(partition_id="x"), 1).entries == {"asked": "x"}
    assert client.ask(GetAudit(partition_id="y"), 2).entries == {"asked": "y"}


def test_what_is_due_is_done_without_requests(handler: Recorder, server: Server) -> None:
    """The handler is asked again when it said so, and when somebody wakes the server."""
    handler.next_tick_s = 0.01
    server.wake()
    handler.wait_for(lambda: handler.ticks > 5)


def test_closing_sends_what_was_answered(handler: Recorder, tmp_path: Path) -> None:
    """An answer given just before the end still arrives; closing twice is allowed."""
    server = Server(handler, TOKEN, local_path=str(tmp_path / "socket")).start()
    with BareClient(server.local_address) as client:
        client.introduce().send(draw(), 1)
        handler.wait_for(lambda: handler.tickets)
        handler.tickets[0].answer(drawn(1))
        server.close()
        server.close()
        assert client.receive()[0] == 1
    assert "closed" in repr(server)


def test_a_server_that_never_started_can_be_closed(handler: Recorder, tmp_path: Path) -> None:
    """Binding holds sockets; they are released."""
    server = Server(handler, TOKEN, local_path=str(tmp_path / "socket"))
    assert "not started" in repr(server)
    server.close()
    server.close()


# ---------------------------------------------------------------- pushing


def test_a_push_reaches_the_connection_that_asked(handler: Recorder, server: Server, client: BareClient) -> None:
    """The channel of a ticket can be told things later."""
    client.ask(announce(), 1)
    ids = np.arange(3)
    server.push(handler.tickets[0].channel, FreeBlocks(sequence=9, blocks=ids, partial_blocks=ids, partial_slots=ids))
    number, order = client.receive()
    assert (number, order.sequence, order.blocks.tolist()) == (0, 9, [0, 1, 2])


def test_a_push_within_the_process_runs_in_the_thread_of_the_server(handler: Recorder, server: Server) -> None:
    """So that it never runs under a lock of whoever pushes."""
    called = threading.Event()
    threads: list[str] = []

    def channel(message: Done) -> None:
        threads.append(threading.current_thread().name)
        called.set()

    server.push(channel, Done())
    assert called.wait(20)
    assert threads == ["transfer_queue server"]


def test_a_push_to_nobody_is_dropped(server: Server, client: BareClient) -> None:
    """A channel that is gone is no error."""
    server.push(b"\0gone", Done())
    assert client.ask(GetAudit(partition_id="x"), 1).entries == {"asked": "x"}
