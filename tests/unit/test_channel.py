"""Peers: one interface over a Unix socket, tcp and in process; from threads, event loops and forked children."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serving import (
    TOKEN,
    WAIT_S,
    MakePeer,
    Recorder,
    aask,
    announce,
    ask,
    eventually,
    explain,
    frees_done,
    put,
)
from transfer_queue.errors import ConnectionLost, EncodeError, InvalidArgument, NotAuthorized, RemoteError
from transfer_queue.messages import (
    Announced,
    FreeBlocks,
    FreesDone,
    GetAudit,
    ListPartitions,
    Names,
    Report,
    SetTags,
)
from transfer_queue.wire import channel
from transfer_queue.wire.channel import Peer, choose_address
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server

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
def test_a_server_that_is_not_there_ends_at_the_deadline(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call raises `ConnectionLost` with address and request id; a one-way message gives up in silence."""
    monkeypatch.setattr(channel, "NOTIFY_S", 0.05)
    peer = Peer.at(address, token=TOKEN, client_id="c", grace_s=0.05)
    with pytest.raises(ConnectionLost, match=address) as lost:
        peer.begin(put()).result(0.05)
    assert lost.value.details["request_id"] > 0
    with pytest.raises(ConnectionLost, match=address):
        asyncio.run(peer.acall(put(), 0.05))
    peer.notify(frees_done(1))
    peer.close()


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
