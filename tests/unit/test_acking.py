"""Acknowledgements that nobody waits for: their order, their failures, their number, and the end of the client."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serving import TOKEN, WAIT_S, Recorder, drawn
from transfer_queue.client.acking import Acknowledger, Behind
from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import Ack, Acked, AckMany, Draw, ListPartitions, Renew, Request
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket


class Slow(Recorder):
    """Keeps acknowledgements until it is told how to answer them; draws are served at once."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Ticket] = []
        self.refuses: dict[int, str] = {}
        self.at_once = False

    def submit(self, request: Request, ticket: Ticket) -> None:
        super().submit(request, ticket)
        with self.changed:
            match request:
                case AckMany() if self.at_once:
                    ticket.answer(self.answer_to(request))
                case AckMany():
                    self.held.append(ticket)
                case Draw():
                    ticket.answer(drawn(5))
            self.changed.notify_all()

    def answer_to(self, request: AckMany) -> Acked:
        return Acked(refused=tuple(self.refuses.get(token, "") for token in request.lease_tokens.tolist()))

    def answer(self, leases: int) -> None:
        """Answer until so many leases are acknowledged, as they come."""
        while leases > 0:
            self.wait_for(lambda: self.held)
            ticket = self.held.pop(0)
            assert isinstance(ticket.request, AckMany)
            leases -= len(ticket.request.lease_tokens)
            ticket.answer(self.answer_to(ticket.request))

    def kinds(self) -> list[str]:
        return [type(request).__name__ for request in self.requests]

    def tokens(self) -> list[int]:
        return [token for one in self.requests if isinstance(one, AckMany) for token in one.lease_tokens.tolist()]


@pytest.fixture
def handler() -> Slow:
    return Slow()


@pytest.fixture(params=["socket", "local"])
def peer(handler: Slow, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[AnyPeer]:
    if request.param == "local":
        local = LocalPeer(handler, "client")
        yield local
        local.close()
        return
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as server:
        remote = Peer.at(server.local_address, token=TOKEN, client_id="client")
        yield remote
        remote.close()


@pytest.fixture
def acks(peer: AnyPeer) -> Iterator[Acknowledger]:
    made = Acknowledger(peer, most=4)
    yield made
    peer.close()
    made.close()


@pytest.fixture(params=["blocking", "awaitable"])
def ask(peer: AnyPeer, acks: Acknowledger, request: pytest.FixtureRequest) -> Callable[[Request], Any]:
    """Asks behind what is under way."""
    behind = Behind(peer, acks)
    if request.param == "blocking":
        return lambda asked: behind.begin(asked).result(WAIT_S)
    return lambda asked: asyncio.run(behind.acall(asked, WAIT_S))


def ack(token: int = 1, samples: int = 2) -> Ack:
    return Ack(lease_token=token, indexes=np.arange(samples), generations=np.zeros(samples, np.int64))


def draw(timeout_s: float) -> Draw:
    return Draw(
        partition_id="p",
        global_step=None,
        task_name="t",
        fields=("x",),
        batch_size=1,
        get_n_samples=False,
        sampler_params={},
        timeout_s=timeout_s,
    )


@pytest.mark.parametrize("asked", [ListPartitions(), draw(0.0)], ids=["a request", "a draw that does not wait"])
def test_what_is_asked_later_comes_behind(
    handler: Slow, acks: Acknowledger, ask: Callable[[Request], Any], asked: Request
) -> None:
    """It is sent when all acknowledgements before it are answered."""
    assert acks.give([ack(1)], WAIT_S)
    handler.wait_for(lambda: handler.held)
    assert acks.give([ack(2)], WAIT_S)
    with ThreadPoolExecutor(1) as other:
        reply = other.submit(ask, asked)
        handler.answer(1)
        handler.wait_for(lambda: handler.held)
        assert not reply.done() and handler.kinds() == ["AckMany", "AckMany"]
        handler.answer(1)
        reply.result(WAIT_S)
    assert handler.kinds()[:2] == ["AckMany", "AckMany"] and acks.outstanding == acks.late == 0


@pytest.mark.parametrize(
    "asked", [draw(1.0), Renew(lease_token=9, lease_s=None)], ids=["a draw that waits", "a renewal"]
)
def test_what_need_not_come_behind(handler: Slow, peer: AnyPeer, acks: Acknowledger, asked: Request) -> None:
    """It is there while the acknowledgement is under way."""
    assert acks.give([ack()], WAIT_S)
    handler.wait_for(lambda: handler.held)
    pending = Behind(peer, acks).begin(asked)
    handler.wait_for(lambda: handler.kinds() == ["AckMany", type(asked).__name__])
    pending.cancel()
    assert acks.outstanding == 1
    handler.answer(1)


def test_failures_are_counted_and_logged(handler: Slow, acks: Acknowledger, caplog: pytest.LogCaptureFixture) -> None:
    """In samples, one warning for each lease; others are not concerned."""
    handler.refuses = {1: "lease 1 is over", 3: "lease 3 is over"}
    assert acks.give([ack(1, 2), ack(2, 3), ack(3, 4)], WAIT_S)
    handler.answer(3)
    acks.settled().result(WAIT_S)
    assert acks.late == 2 + 4
    assert [record.getMessage() for record in caplog.records] == [
        "2 samples are not acknowledged and may be handed out again: lease 1 is over",
        "4 samples are not acknowledged and may be handed out again: lease 3 is over",
    ]


def test_no_more_than_some_are_under_way(handler: Slow, acks: Acknowledger) -> None:
    """All of a call are taken or none; those of one call only may be more."""
    assert acks.give([ack(1), ack(2), ack(3)], WAIT_S)
    assert not acks.give([ack(4), ack(5)], WAIT_S)
    assert acks.give([ack(4)], WAIT_S) and not acks.give([ack(5)], WAIT_S)
    handler.answer(4)
    acks.settled().result(WAIT_S)
    assert acks.give([ack(number) for number in range(6)], WAIT_S)
    handler.answer(6)
    acks.settled().result(WAIT_S)
    assert handler.tokens() == [1, 2, 3, 4, *range(6)] and acks.late == 0


def test_many_threads(handler: Slow, acks: Acknowledger) -> None:
    """Each is sent once, and who waits until they are settled waits for its own."""
    handler.at_once = True

    def give(first: int) -> None:
        for token in range(first, first + 50):
            while not acks.give([ack(token)], WAIT_S):
                acks.settled().result(WAIT_S)
        acks.settled().result(WAIT_S)
        assert set(range(first, first + 50)) <= set(handler.tokens())

    with ThreadPoolExecutor(4) as others:
        list(others.map(give, range(0, 400, 100)))
    assert len(handler.tokens()) == 200 and acks.outstanding == 0


def test_the_end_of_the_client(handler: Slow, peer: AnyPeer, acks: Acknowledger) -> None:
    """What is not answered when the connection ends counts as late; nothing more is taken."""
    assert acks.give([ack(1, 3)], WAIT_S)
    handler.wait_for(lambda: handler.held)
    settled = acks.settled()
    assert not settled.done() and not settled.cancel()
    peer.close()
    acks.close()
    acks.close()
    settled.result(WAIT_S)
    assert acks.late == 3 and "0 under way, 3 samples late" in repr(acks)
    assert "tq-acknowledgements" not in [thread.name for thread in threading.enumerate()]
    with pytest.raises(ConnectionLost, match="closed"):
        acks.give([ack()], WAIT_S)


def test_no_answer_in_time(handler: Slow, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The thread does not wait for ever; an answer that comes later is nobody's."""
    peer = LocalPeer(handler, "client", grace_s=0.0)
    acks = Acknowledger(peer)
    assert acks.give([ack()], 0.01)
    acks.settled().result(WAIT_S)
    assert acks.late == 2 and "no reply" in caplog.text
    handler.answer(1)
    peer.close()
    acks.close()
    assert acks.late == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_begins_with_none(handler: Slow, acks: Acknowledger) -> None:
    """It waits for nothing of its parent, whoever held the lock; the parent's go on."""
    assert acks.give([ack()], WAIT_S)
    handler.wait_for(lambda: handler.held)
    with acks._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if acks.settled().done() and acks.outstanding == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert acks.outstanding == 1
    handler.answer(1)
    acks.settled().result(WAIT_S)


def test_the_thread_ends_when_it_is_not_needed(
    handler: Slow, acks: Acknowledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And comes back."""
    monkeypatch.setattr("transfer_queue.client.acking._IDLE_S", 0.01)
    handler.at_once = True
    for _ in range(2):
        assert acks.give([ack()], WAIT_S)
        thread = acks._thread
        if thread is not None:
            thread.join(WAIT_S)
        assert acks._thread is None and acks.outstanding == 0


def test_a_call_with_no_time_comes_behind_as_well(handler: Slow, peer: AnyPeer, acks: Acknowledger) -> None:
    """In an event loop: looking is asked with a timeout of 0."""
    assert acks.give([ack()], WAIT_S)
    handler.wait_for(lambda: handler.held)
    with ThreadPoolExecutor(1) as other:
        reply = other.submit(lambda: asyncio.run(Behind(peer, acks).acall(draw(0.0), 0.0)))
        threading.Event().wait(0.05)
        assert not reply.done() and handler.kinds() == ["AckMany"]
        handler.answer(1)
        reply.result(WAIT_S)
    assert handler.kinds() == ["AckMany", "Draw"]


def test_one_finds_out_that_nothing_is_answered(
    handler: Slow, peer: AnyPeer, acks: Acknowledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others go ahead, until there is an answer again."""
    monkeypatch.setattr("transfer_queue.client.acking._ORDER_S", 0.01)
    behind = Behind(peer, acks)
    assert acks.give([ack(1)], WAIT_S)
    handler.wait_for(lambda: handler.held)
    behind.begin(ListPartitions()).cancel()
    assert acks.earlier() is None
    assert acks.give([ack(2)], WAIT_S)
    handler.answer(1)
    handler.wait_for(lambda: handler.held)
    earlier = acks.earlier()
    assert earlier is not None and not earlier.done()
    handler.answer(1)
    earlier.result(WAIT_S)


def test_a_thread_that_cannot_start(acks: Acknowledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is under way after it."""
    monkeypatch.setattr(threading.Thread, "start", _refuse)
    with pytest.raises(RuntimeError, match="no more threads"):
        acks.give([ack()], WAIT_S)
    assert acks.outstanding == 0 and acks.settled().done()


def _refuse(thread: threading.Thread) -> None:
    raise RuntimeError("no more threads")


def test_what_cannot_be_sent_holds_up_nothing(
    handler: Slow, peer: AnyPeer, acks: Acknowledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that is raised."""
    handler.at_once = True
    with monkeypatch.context() as patch:
        patch.setattr("transfer_queue.client.acking._joined", lambda given: given.no_such_thing)
        assert acks.give([ack(1, 3)], WAIT_S)
        acks.settled().result(WAIT_S)
    assert acks.late == 3
    assert acks.give([ack(2)], WAIT_S)
    acks.settled().result(WAIT_S)
    assert handler.tokens() == [2] and acks.late == 3


def test_many_rows_go_in_several_messages(handler: Slow, acks: Acknowledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer_queue.client.acking._GATHER_ROWS", 4)
    handler.at_once = True
    assert acks.give([ack(token, 3) for token in range(4)], WAIT_S)
    acks.settled().result(WAIT_S)
    sizes = [len(one.lease_tokens) for one in handler.requests if isinstance(one, AckMany)]
    assert sizes == [2, 2] and handler.tokens() == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("peer", ["socket"], indirect=True)
def test_a_process_that_ends_waits_for_them(handler: Slow, acks: Acknowledger) -> None:
    """One that `multiprocessing` forked as well, which ends without all that Python does at its end."""
    handler.at_once = True
    assert acks.give([ack(1)], WAIT_S)
    acks.settled().result(WAIT_S)
    child = multiprocessing.get_context("fork").Process(target=acks.give, args=([ack(2)], WAIT_S))
    child.start()
    child.join(WAIT_S)
    assert child.exitcode == 0
    child.close()
    assert handler.tokens() == [1, 2]
