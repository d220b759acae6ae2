"""Peers: one interface over a Unix socket, tcp and in process; from threads, event loops and forked children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serving import TOKEN, WAIT_S, Recorder, announce, draw, drawn, explain, frees_done, put
from transfer_queue.errors import ConnectionLost, EncodeError, InvalidArgument, NotAuthorized, RemoteError
from transfer_queue.messages import (
    Announced,
    FreeBlocks,
    FreesDone,
    GetAudit,
    ListPartitions,
    ListUnits,
    Names,
    Report,
    SetTags,
)
from transfer_queue.wire.channel import Peer, choose_address
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server

MakePeer = Callable[..., AnyPeer]


@pytest.fixture
def handler() -> Recorder:
    return Recorder()


@pytest.fixture
def server(handler: Recorder, tmp_path: Path) -> Iterator[Server]:
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as running:
        yield running


@pytest.fixture(params=["unix", "tcp", "local"])
def make_peer(handler: Recorder, server: Server, request: pytest.FixtureRequest) -> Iterator[MakePeer]:
    with contextlib.ExitStack() as closing:

        def make(client_id: str = "client", grace_s: float = 5.0) -> AnyPeer:
            peer: AnyPeer
            if request.param == "local":
                peer = LocalPeer(handler, client_id, grace_s=grace_s)
            else:
                address = server.local_address if request.param == "unix" else server.address
                peer = Peer.at(address, token=TOKEN, client_id=client_id, grace_s=grace_s)
            closing.callback(peer.close)
            return peer

        yield make


@pytest.fixture
def peer(make_peer: MakePeer) -> AnyPeer:
    return make_peer()


@pytest.fixture
def socket_peer(server: Server) -> Iterator[Peer]:
    made = Peer.at(server.local_address, token=TOKEN, client_id="client")
    yield made
    made.close()


def ask(peer: AnyPeer, what: str) -> Any:
    """Return what the server says that it was asked for."""
    reply = peer.begin(GetAudit(partition_id=what)).result(WAIT_S)
    assert isinstance(reply, Report)
    return reply.entries["asked"]


def eventually(predicate: Callable[[], bool]) -> None:
    """Wait for what ZeroMQ does in threads of its own."""
    deadline = time.monotonic() + WAIT_S
    while not predicate():
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()


async def aask(peer: AnyPeer, what: str) -> Any:
    reply = await peer.acall(GetAudit(partition_id=what), WAIT_S)
    assert isinstance(reply, Report)
    return reply.entries["asked"]


# ---------------------------------------------------------------- each call gets its own answer


def test_a_call_returns_its_reply(peer: AnyPeer) -> None:
    """In the calling thread, and in an event loop."""
    assert ask(peer, "a") == "a"
    assert asyncio.run(aask(peer, "b")) == "b"


def test_requests_under_way_are_awaited_in_any_order(peer: AnyPeer) -> None:
    """Several begun at once keep their answers apart."""
    pending = [peer.begin(GetAudit(partition_id=str(number))) for number in range(20)]
    replies = [each.result(WAIT_S) for each in reversed(pending)]
    assert [reply.entries["asked"] for reply in replies if isinstance(reply, Report)] == [
        str(number) for number in reversed(range(20))
    ]


def test_threads_share_a_peer(peer: AnyPeer) -> None:
    """16 threads at once, each with its own answers."""

    def work(thread: int) -> bool:
        return all(ask(peer, f"{thread}.{number}") == f"{thread}.{number}" for number in range(30))

    with ThreadPoolExecutor(16) as threads:
        assert all(threads.map(work, range(16)))


async def test_a_thousand_calls_at_once_on_one_loop(peer: AnyPeer) -> None:
    """Each of them gets its own answer."""
    answers = await asyncio.gather(*(aask(peer, str(number)) for number in range(1000)))
    assert answers == [str(number) for number in range(1000)]


def test_short_lived_loops_leave_nothing_open(peer: AnyPeer) -> None:
    """200 event loops, one after the other, use the same few descriptors."""
    asyncio.run(aask(peer, "first"))
    before = len(os.listdir("/proc/self/fd"))
    for number in range(200):
        assert asyncio.run(aask(peer, str(number))) == str(number)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_many_threads_leave_few_connections(socket_peer: Peer) -> None:
    """What a burst opened beyond eight is closed."""
    meeting = threading.Barrier(24)

    def work(number: int) -> None:
        pending = socket_peer.begin(GetAudit(partition_id=str(number)))
        meeting.wait(WAIT_S)
        pending.result(WAIT_S)

    ask(socket_peer, "first")
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(24) as threads:
        list(threads.map(work, range(24)))
    eventually(lambda: len(os.listdir("/proc/self/fd")) < before + 3 * 8)  # three for each that is kept


async def test_a_blocking_call_works_where_a_loop_runs(peer: AnyPeer) -> None:
    """Synchronous and asynchronous calls mix in one thread."""
    task = asyncio.ensure_future(aask(peer, "later"))
    assert ask(peer, "now") == "now"
    assert await task == "later"


def test_client_ids_are_unique_on_the_wire(make_peer: MakePeer) -> None:
    """Two peers of one name are two clients to a server, so that their request ids never meet."""
    replies = [make_peer("same").begin(ListPartitions()).result(WAIT_S) for _ in range(2)]
    assert len({name for reply in replies if isinstance(reply, Names) for name in reply.names}) == 2


def test_one_way_messages_arrive(handler: Recorder, peer: AnyPeer) -> None:
    """Sent from a thread, and from a coroutine; no answer is waited for."""

    async def notify() -> None:
        peer.notify(frees_done(2))
        await aask(peer, "x")

    peer.notify(frees_done(1))
    asyncio.run(notify())
    handler.wait_for(lambda: len([one for one in handler.requests if isinstance(one, FreesDone)]) == 2)


# ---------------------------------------------------------------- errors


def test_errors_arrive_as_themselves(peer: AnyPeer) -> None:
    """Class and details of an answer that is an error, in both faces."""
    with pytest.raises(InvalidArgument, match="no such task") as refused:
        peer.begin(explain("x")).result(WAIT_S)
    assert refused.value.details == {"known": ["a"]}
    with pytest.raises(InvalidArgument, match="no such task"):
        asyncio.run(peer.acall(explain("x"), WAIT_S))


def test_a_bug_of_the_server_arrives_as_remote_error(peer: AnyPeer) -> None:
    """With its type; the next call is served."""
    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        peer.begin(explain("bug")).result(WAIT_S)
    assert ask(peer, "next") == "next"


def test_what_cannot_be_encoded_is_refused_before_sending(socket_peer: Peer) -> None:
    """The error names the type, and the peer works on."""
    request = SetTags(indexes=np.arange(1), generations=np.arange(1), tags=({"x": object()},))
    with pytest.raises(EncodeError, match="object"):
        socket_peer.begin(request)
    with pytest.raises(EncodeError, match="object"):
        asyncio.run(socket_peer.acall(request, WAIT_S))
    assert ask(socket_peer, "next") == "next"


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_wrong_token_is_not_authorized(server: Server, kind: str) -> None:
    """Each call raises at once, in both faces; the server counts."""
    address = server.local_address if kind == "unix" else server.address
    thief = Peer.at(address, token=b"wrong", client_id="thief")
    with pytest.raises(NotAuthorized, match="token"):
        thief.begin(ListPartitions()).result(WAIT_S)
    with pytest.raises(NotAuthorized, match="token"):
        asyncio.run(thief.acall(ListPartitions(), WAIT_S))
    thief.close()
    assert server.auth_failures == 2


def test_a_client_id_has_a_limit(server: Server) -> None:
    """A name that no server would accept is refused here."""
    with pytest.raises(InvalidArgument, match="shorter"):
        Peer.at(server.address, token=TOKEN, client_id="x" * 250)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "unix:///nowhere/socket"])
def test_a_server_that_is_not_there_ends_at_the_deadline(address: str) -> None:
    """A call raises `ConnectionLost` with address and request id; a one-way message gives up in silence."""
    peer = Peer.at(address, token=TOKEN, client_id="c", grace_s=0.05)
    with pytest.raises(ConnectionLost, match=address) as lost:
        peer.begin(put()).result(0.05)
    assert lost.value.details["request_id"] > 0
    with pytest.raises(ConnectionLost, match=address):
        asyncio.run(peer.acall(put(), 0.05))
    peer.notify(frees_done(1))
    peer.close()


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


# ---------------------------------------------------------------- listening


def test_a_listener_announces_itself_and_takes_what_is_pushed(
    handler: Recorder, server: Server, tmp_path: Path
) -> None:
    """It gets the reply and each push, sends back what it is told to, and returns after a restart of the server."""
    received: list[Any] = []

    def receive(message: Announced | FreeBlocks) -> FreesDone | None:
        received.append(message)
        return frees_done(message.sequence) if isinstance(message, FreeBlocks) else None

    ids = np.arange(2)
    peer = Peer.at(server.address, token=TOKEN, client_id="unit")
    with Listener(peer, announce(), receive) as listener:
        assert listener.announced(WAIT_S) == received[0]
        order = FreeBlocks(sequence=5, blocks=ids, partial_blocks=ids, partial_slots=ids)
        server.push(handler.tickets[0].channel, order)
        handler.wait_for(lambda: any(isinstance(one, FreesDone) and one.sequence == 5 for one in handler.requests))
        port = int(server.address.rpartition(":")[2])
        server.close()
        successor = Recorder()
        with Server(successor, TOKEN, local_path=None, tcp_port=port):
            successor.wait_for(lambda: successor.tickets)
    assert [type(message) for message in received[:2]] == [Announced, FreeBlocks]
    peer.close()


def test_a_listener_that_is_refused_says_so(server: Server) -> None:
    """A wrong token ends the wait for the announcement with the reason."""
    peer = Peer.at(server.address, token=b"wrong", client_id="unit")
    with Listener(peer, announce(), lambda message: None) as listener, pytest.raises(NotAuthorized):
        listener.announced(WAIT_S)
    peer.close()


def test_a_local_peer_can_be_pushed_to(handler: Recorder, server: Server) -> None:
    """Its channel is what it was made with."""
    received = threading.Event()
    peer = LocalPeer(handler, "unit", on_push=lambda message: received.set())
    peer.begin(announce()).result(WAIT_S)
    server.push(handler.tickets[0].channel, Report(entries={}))
    assert received.wait(WAIT_S)
    peer.close()


# ---------------------------------------------------------------- addresses


def test_the_local_address_is_used_where_its_nonce_can_be_read(tmp_path: Path) -> None:
    """A folder of another host with the same name has another nonce."""
    (tmp_path / "nonce").write_text("abc")
    place = ("unix:///x", str(tmp_path), "abc", "tcp://h:1")
    assert choose_address(*place) == "unix:///x"
    assert choose_address(*place, transport="tcp") == "tcp://h:1"
    assert choose_address("unix:///x", str(tmp_path), "other", "tcp://h:1") == "tcp://h:1"
    assert choose_address("unix:///x", str(tmp_path / "none"), "abc", "tcp://h:1") == "tcp://h:1"
    assert choose_address("", "", "", "tcp://h:1") == "tcp://h:1"


def test_no_address_left_is_an_error(tmp_path: Path) -> None:
    """It says what was looked for; an unknown transport is refused."""
    with pytest.raises(ConnectionLost, match="unix:///x"):
        choose_address("unix:///x", str(tmp_path), "abc", "")
    with pytest.raises(InvalidArgument, match="pigeon"):
        choose_address("unix:///x", str(tmp_path), "abc", "", transport="pigeon")
