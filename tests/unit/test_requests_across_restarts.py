"""Requests that a server has noted, and calls under way when it dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.reloaded import reloaded
from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder, draw, drawn, frees_done, put
from transfer_queue.messages import (
    MESSAGE_TYPES,
    Cancel,
    Draw,
    FreesDone,
    Put,
    Reply,
    Request,
)
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.codec import decode, encode_message
from transfer_queue.wire.desk import Desk
from transfer_queue.wire.requests import RequestTable
from transfer_queue.wire.security import Introduction, Kind
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket

# ---------------------------------------------------------------- in a server


class Noting(Recorder):
    """Looks into the table right after each answer, still under its own lock."""

    def __init__(self, table: RequestTable) -> None:
        super().__init__()
        self.table = table
        self.dumps: list[Any] = []

    def submit(self, request: Request, ticket: Ticket) -> None:
        with self.changed:
            super().submit(request, ticket)
            self.dumps.append(self.table.dump())


def server(handler: Recorder, path: Path, table: RequestTable | None = None, port: int = 0) -> Server:
    return Server(handler, TOKEN, local_path=str(path / "socket"), tcp_port=port, requests=table)


def test_an_answer_is_noted_when_it_is_given(tmp_path: Path) -> None:
    """A snapshot that a handler takes after answering, before anything was sent, holds the answer."""
    table = RequestTable()
    handler = Noting(table)
    with server(handler, tmp_path, table) as running, BareClient(running.local_address) as client:
        client.introduce().ask(put(), 5)
    [(client_id, _, _, [(request_id, code, reply)])] = handler.dumps[0]
    assert (client_id, request_id, MESSAGE_TYPES[code]) == ("bare/1", 5, Put)
    assert reply.indexes.tolist() == [1]


def test_a_server_goes_on_where_its_table_ends(tmp_path: Path) -> None:
    """A put from before the restart has its answer, one below the floor is refused, a draw can be withdrawn."""
    table = RequestTable()
    with server(Recorder(), tmp_path, table) as running, BareClient(running.local_address) as client:
        client.introduce().ask(put(), 5)
        client.ask(put(), 7, floor=7)
    table.restore("bare/1", 8, draw(), drawn(8))
    handler = Recorder()
    with server(handler, tmp_path, reloaded(table)) as running, BareClient(running.local_address) as client:
        client.introduce()
        assert client.ask(put(), 7).indexes.tolist() == [2]
        assert client.ask(put(), 5).name == "ConnectionLost"
        assert client.ask(draw(), 8).indexes.tolist() == [8]
        client.cancel(8)
        handler.wait_for(lambda: handler.lost_replies)
        [(lost, reply)] = handler.lost_replies
        assert (lost.client_id, lost.request_id, lost.request) == ("bare/1", 8, None)
        assert reply.indexes.tolist() == [8]  # type: ignore[union-attr]
        assert handler.puts == 0


class Counter:
    """A desk without sockets: `sent` are the frames of replies by connection, `unsettled` what was answered."""

    def __init__(self) -> None:
        self.handler = Recorder()
        self.sent: list[tuple[Any, int]] = []
        self.unsettled: list[tuple[Ticket, Reply]] = []
        self.desk = Desk(
            self.handler, TOKEN, self._send, lambda identity: True, lambda *answer: self.unsettled.append(answer)
        )

    def _send(self, identity: Any, frames: Any) -> bool:
        self.reply = frames[0]
        if self.reply[0] == Kind.MESSAGE:
            self.sent.append((identity, decode(frames)[0]))
        return True

    def introduce(self, identity: str) -> None:
        introduction = Introduction(TOKEN, "c/1")
        frame: bytes | None = introduction.hello()
        while frame is not None:
            self.desk.receive(identity, [frame])
            frame = introduction.receive(self.reply)

    def settle(self) -> None:
        while self.unsettled:
            self.desk.settle(*self.unsettled.pop(0))


@pytest.mark.parametrize("change", ["again", "withdrawn"])
def test_what_comes_between_answer_and_reply_meets_the_answer(change: str) -> None:
    """A draw that was answered but not sent yet: sent again it is answered there; withdrawn it is lost; each once."""
    counter = Counter()
    counter.introduce("first")
    counter.introduce("second")
    counter.desk.receive("first", encode_message(draw(), 5, 1))
    [asked], reply = counter.handler.tickets, drawn(3)
    asked.answer(reply)
    if change == "again":
        counter.desk.receive("second", encode_message(draw(), 5, 1))
    else:
        counter.desk.receive("first", encode_message(Cancel(request_id=5)))
    counter.settle()
    assert counter.sent == ([("second", 5)] if change == "again" else [])
    assert counter.handler.lost_replies == ([] if change == "again" else [(asked, reply)])
    assert counter.handler.tickets == [asked]


# ---------------------------------------------------------------- calls that outlive a server


class Life:
    """One life of a server whose journal is its table: puts and draws are done once over all lives."""

    def __init__(self, path: Path, table: RequestTable, port: int = 0) -> None:
        self.handler = Recorder()
        self.handler.park_puts = True
        self.table = table
        self.server = server(self.handler, path, table, port).start()
        self.port = int(self.server.address.rpartition(":")[2])

    def kill(self) -> None:
        """End as a killed process does: nothing that was answered from now on is sent."""
        self.server._desk.settle = lambda ticket, reply: None  # type: ignore[method-assign]
        self.server.close()


def calls(peer: Peer) -> dict[str, Callable[[], Any]]:
    async def parked() -> list[Any]:
        return await asyncio.gather(*(peer.acall(draw(), WAIT_S) for _ in range(32)))

    return {
        "thread": lambda: peer.begin(put()).result(WAIT_S),
        "asyncio": lambda: asyncio.run(peer.acall(put(), WAIT_S)),
        "parked": lambda: asyncio.run(parked()),
    }


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("known", [True, False], ids=["table kept", "table lost"])
def test_calls_under_way_survive_the_death_of_a_server(tmp_path: Path, kind: str, known: bool) -> None:
    """What was answered before the end is not done again, the rest is done now; without a table all is done."""
    first = Life(tmp_path, RequestTable())
    address = first.server.local_address if kind == "unix" else first.server.address
    peer = Peer.at(address, token=TOKEN, client_id="c")
    with ThreadPoolExecutor(3) as threads:
        under_way = {name: threads.submit(call) for name, call in calls(peer).items()}
        first.handler.wait_for(lambda: len(first.handler.tickets) == 34)
        by_kind = {kind: [each for each in first.handler.tickets if type(each.request) is kind] for kind in (Put, Draw)}
        first.server._desk.settle = lambda ticket, reply: None  # type: ignore[method-assign]
        for done in [*by_kind[Put], *by_kind[Draw][:10]]:  # answered, noted, and never sent
            done.answer(drawn(1000 + done.request_id))
        first.kill()
        second = Life(tmp_path, reloaded(first.table) if known else RequestTable(), first.port)
        expected = 22 if known else 34
        second.handler.wait_for(lambda: len(second.handler.tickets) == expected)
        for waiting in second.handler.tickets:
            waiting.answer(drawn(2000 + waiting.request_id))
        replies = [under_way["thread"].result(WAIT_S), under_way["asyncio"].result(WAIT_S)]
        replies += under_way["parked"].result(WAIT_S)
        peer.notify(frees_done(9))
        second.handler.wait_for(lambda: any(isinstance(each, FreesDone) for each in second.handler.requests))
    found = np.sort([int(reply.indexes[0]) for reply in replies])
    old = {1000 + each.request_id for each in [*by_kind[Put], *by_kind[Draw][:10]]} if known else set()
    assert found.tolist() == sorted(old | {2000 + each.request_id for each in second.handler.tickets})
    peer.close()
    second.server.close()
