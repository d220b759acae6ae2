"""Calls through a peer that get no answer, are withdrawn, or outlive a peer, a server or a fork."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving import (
    TOKEN,
    WAIT_S,
    MakePeer,
    Recorder,
    aask,
    ask,
    draw,
    drawn,
    put,
)
from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import (
    ListPartitions,
    ListUnits,
    Report,
)
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server

# ---------------------------------------------------------------- no answer in time


def test_a_late_reply_reaches_nobody(handler: Recorder, make_peer: MakePeer) -> None:
    """After a timeout the next call gets its own answer, not the late one."""
    peer = make_peer(grace_s=0.0)
    with pytest.raises(ConnectionLost):
        peer.begin(ListUnits(timeout_s=0.01)).result(0.01)
    handler.wait_for(lambda: handler.tickets)
    handler.tickets[0].answer(Report(entries={"asked": "late"}))
    assert [ask(peer, str(number)) for number in range(5)] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("face", ["blocking", "awaitable"])
def test_asking_again_gives_the_true_outcome(handler: Recorder, make_peer: MakePeer, face: str) -> None:
    """A put without answer is done once, and its id brings the answer that it had."""
    handler.park_puts = True
    peer = make_peer(grace_s=0.05)

    def call(timeout_s: float, request_id: int | None = None) -> Any:
        if face == "blocking":
            return peer.begin(put(), request_id=request_id).result(timeout_s)
        return asyncio.run(peer.acall(put(), timeout_s, request_id=request_id))

    with pytest.raises(ConnectionLost) as lost:
        call(0.0)
    handler.wait_for(lambda: handler.tickets)
    handler.tickets[0].answer(drawn(42))
    assert call(WAIT_S, lost.value.details["request_id"]).indexes.tolist() == [42]
    assert handler.puts == 1


def test_a_draw_without_answer_is_taken_back(handler: Recorder, make_peer: MakePeer) -> None:
    """Nobody would use its rows: the handler hears that it is lost."""
    peer = make_peer(grace_s=0.05)
    with pytest.raises(ConnectionLost):
        peer.begin(draw()).result(0.1)
    handler.wait_for(lambda: handler.lost_replies)
    assert handler.lost_replies == [(handler.tickets[0], None)]


async def test_a_cancelled_call_is_withdrawn(handler: Recorder, peer: AnyPeer) -> None:
    """The handler hears of it, and the next call gets its own answer."""
    task = asyncio.ensure_future(peer.acall(draw(), WAIT_S))
    while not handler.tickets:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await aask(peer, "next") == "next"
    await asyncio.to_thread(handler.wait_for, lambda: handler.lost_replies)
    assert handler.lost_replies == [(handler.tickets[0], None)]


def test_an_interrupted_call_is_withdrawn(handler: Recorder, peer: AnyPeer) -> None:
    """Ctrl-C ends a blocking call; the handler hears of it, and the peer works on."""
    pending = peer.begin(draw())
    handler.wait_for(lambda: handler.tickets)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        pending.result(WAIT_S)
    timer.join()
    handler.wait_for(lambda: handler.lost_replies)
    assert handler.lost_replies == [(handler.tickets[0], None)]
    assert ask(peer, "next") == "next"


# ---------------------------------------------------------------- the end


def test_close_ends_calls_in_other_threads(handler: Recorder, peer: AnyPeer) -> None:
    """A thread that waits for an hour raises at once when the peer is closed."""
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: peer.begin(draw()).result(3600))
        handler.wait_for(lambda: handler.tickets)
        peer.close()
        with pytest.raises(ConnectionLost, match="closed"):
            waiting.result(WAIT_S)
    with pytest.raises(ConnectionLost, match="closed"):
        peer.begin(ListPartitions())
    peer.close()
    assert "closed" in repr(peer)


def test_close_ends_calls_in_other_loops(handler: Recorder, peer: AnyPeer) -> None:
    """So does an awaited one, in the loop of another thread."""
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: asyncio.run(peer.acall(draw(), 3600)))
        handler.wait_for(lambda: handler.tickets)
        peer.close()
        with pytest.raises(ConnectionLost, match="closed"):
            waiting.result(WAIT_S)
    with pytest.raises(ConnectionLost, match="closed"):
        asyncio.run(peer.acall(ListPartitions(), 1))


def test_a_peer_that_was_never_used_can_be_closed(make_peer: MakePeer) -> None:
    """Nothing was opened; closing twice is allowed."""
    peer = make_peer()
    peer.close()
    peer.close()


def test_a_loop_that_was_closed_under_a_call_does_not_matter(handler: Recorder, socket_peer: Peer) -> None:
    """Its connection is given up, and others go on."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(socket_peer.acall(draw(), WAIT_S))
    while not handler.tickets:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant to be lost
    assert asyncio.run(aask(socket_peer, "next")) == "next"
    assert ask(socket_peer, "next") == "next"


# ---------------------------------------------------------------- restarts and forks


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_waiting_requests_survive_a_restart_of_the_server(handler: Recorder, tmp_path: Path, kind: str) -> None:
    """The client proves its token again and sends what it waits for; the answer comes from the new server."""
    path = str(tmp_path / "socket")
    server = Server(handler, TOKEN, local_path=path).start()
    port = int(server.address.rpartition(":")[2])
    peer = Peer.at(server.local_address if kind == "unix" else server.address, token=TOKEN, client_id="c")
    with ThreadPoolExecutor(2) as threads:
        blocked = threads.submit(lambda: peer.begin(draw()).result(WAIT_S))
        awaited = threads.submit(lambda: asyncio.run(peer.acall(draw(), WAIT_S)))
        handler.wait_for(lambda: len(handler.tickets) == 2)
        server.close()
        successor = Recorder()
        with Server(successor, TOKEN, local_path=path, tcp_port=port):
            successor.wait_for(lambda: len(successor.tickets) == 2)
            for ticket in successor.tickets:
                ticket.answer(drawn(ticket.request_id))
            replies: list[Any] = [blocked.result(WAIT_S), awaited.result(WAIT_S)]
            answered = {int(reply.indexes[0]) for reply in replies}
            assert answered == {ticket.request_id for ticket in successor.tickets}
            assert ask(peer, "next") == "next"
            peer.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_opens_its_own_connection(handler: Recorder, socket_peer: Peer) -> None:
    """Parent and child both go on, as two clients, even if the fork happens within a call of another thread."""
    [mine] = socket_peer.begin(ListPartitions()).result(WAIT_S).names  # type: ignore[union-attr]
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lambda: socket_peer.begin(draw()).result(WAIT_S))
        handler.wait_for(lambda: handler.tickets)
        inlet, outlet = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                [name] = socket_peer.begin(ListPartitions()).result(WAIT_S).names  # type: ignore[union-attr]
                os.write(outlet, name.encode())
            os._exit(0)
        os.close(outlet)
        os.waitpid(child, 0)
        theirs = os.read(inlet, 1000).decode()
        os.close(inlet)
        handler.tickets[0].answer(drawn(1))
        assert waiting.result(WAIT_S).indexes.tolist() == [1]  # type: ignore[union-attr]
    assert theirs.startswith("client/")
    assert theirs != mine
    assert ask(socket_peer, "next") == "next"
