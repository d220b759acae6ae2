"""Requests that were answered: each has one outcome, also after the server was restarted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serving import TOKEN, WAIT_S, BareClient, Recorder, draw, drawn, frees_done, put, put_done
from transfer_queue.errors import ConnectionLost, DecodeError
from transfer_queue.messages import (
    MESSAGE_TYPES,
    Ack,
    Admit,
    Cancel,
    Done,
    Draw,
    Drop,
    FreesDone,
    GetAudit,
    Put,
    Release,
    Renew,
    Reply,
    Report,
    Request,
)
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.codec import decode, encode_message
from transfer_queue.wire.desk import Desk
from transfer_queue.wire.requests import GIVEN_BACK, REMEMBERED, Answered, RequestTable
from transfer_queue.wire.security import Introduction, Kind
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket


def ticket(request_id: int, request: Any = None, client_id: str = "c/1") -> Ticket:
    return Ticket(client_id, request_id, None, request or put(), lambda ticket, answer: None)


def answered(table: RequestTable, request_id: int, request: Any = None, client_id: str = "c/1") -> Ticket:
    """Let a request run, and note its answer."""
    made = ticket(request_id, request, client_id)
    assert table.find(client_id, request_id, 1) is None
    table.wait(made)
    table.answered(made, put_done(request_id))
    return made


def outcome(table: RequestTable, request_id: int, floor: int = 1, client_id: str = "c/1") -> Any:
    found = table.find(client_id, request_id, floor)
    return found.reply if isinstance(found, Answered) else found


def plain(dumped: list[Any]) -> list[Any]:
    """A dump with replies as bytes, as a file has them."""
    return [
        (client_id, floor, forgotten, [(number, code, encode_message(reply)) for number, code, reply in answers])
        for client_id, floor, forgotten, answers in dumped
    ]


def reloaded(table: RequestTable, **limits: int) -> RequestTable:
    """The table after a restart: what it dumped went through bytes."""
    made = RequestTable(**limits)
    made.load(
        (client_id, floor, forgotten, [(number, code, decode(reply)[1]) for number, code, reply in answers])
        for client_id, floor, forgotten, answers in plain(table.dump())
    )
    return made


# ---------------------------------------------------------------- the table


def test_changes_under_leases_are_remembered() -> None:
    """Ack, release, renew and drop are done once; an admission that nobody gets is taken back."""
    assert {Ack, Release, Renew, Drop} < set(REMEMBERED) - set(GIVEN_BACK)
    assert Admit in GIVEN_BACK


def test_a_dump_holds_what_a_load_needs() -> None:
    """Outcomes, floor and what was forgotten are the same in the next life."""
    table = RequestTable(answers=3)
    for number in (3, 4, 5, 6):
        answered(table, number)
    answered(table, 9, draw(), "d/1")
    table.find("c/1", 6, 5)
    again = reloaded(table)
    assert plain(again.dump()) == plain(table.dump())
    assert outcome(again, 5, 5).indexes.tolist() == [5]
    assert outcome(again, 9, client_id="d/1").indexes.tolist() == [9]
    assert outcome(again, 7, 5) is None
    with pytest.raises(ConnectionLost, match="request 4"):
        again.find("c/1", 4, 5)


def test_what_made_room_is_not_done_again_after_a_restart() -> None:
    """An id at or below the highest forgotten one has an outcome that nobody knows."""
    table = RequestTable(answers=2)
    for number in (3, 4, 5, 6):
        answered(table, number)
    with pytest.raises(ConnectionLost, match="request 4"):
        reloaded(table).find("c/1", 4, 1)


def test_requests_under_way_are_not_dumped() -> None:
    """Their clients send them again."""
    table = RequestTable()
    table.wait(ticket(5))
    assert table.find("c/1", 5, 1) is not None
    assert reloaded(table).find("c/1", 5, 5) is None


@pytest.mark.parametrize("given", ["request", "type"])
def test_replay_restores_one_answer_at_a_time(given: str) -> None:
    """As if the request had been answered now; of kinds that may run again, nothing is kept."""
    table = RequestTable(answers=2)
    for number in (5, 6, 7):
        table.restore("c/1", number, put() if given == "request" else Put, put_done(number))
    table.restore("c/1", 8, GetAudit(partition_id=None), Report(entries={}))
    table.restore("c/1", 0, frees_done(1), Done())
    assert outcome(table, 7).indexes.tolist() == [7]
    assert outcome(table, 8) is None
    assert outcome(table, 6, floor=6).indexes.tolist() == [6]
    with pytest.raises(ConnectionLost):
        table.find("c/1", 5, 1)


def test_a_restored_draw_can_be_withdrawn_and_a_put_cannot() -> None:
    """The answer comes back with who asked and what kind of request it was; then the draw may run again."""
    table = RequestTable()
    table.restore("c/1", 5, draw(), drawn(5))
    table.restore("c/1", 6, put(), put_done(6))
    again = reloaded(table)
    assert again.withdraw("c/1", 6) is None
    found = again.withdraw("c/1", 5)
    assert isinstance(found, Answered)
    assert (found.kind, found.ticket.client_id, found.ticket.request_id) == (Draw, "c/1", 5)
    assert found.ticket.answered
    assert again.find("c/1", 5, 1) is None


def test_a_dump_of_an_unknown_kind_is_refused() -> None:
    """It was written by another version, or is damaged."""
    with pytest.raises(DecodeError, match="999"):
        RequestTable().load([("c/1", 0, 0, [(1, 999, Done())])])


def test_tables_are_bounded_in_clients() -> None:
    """Also while they are restored: those that came first make room."""
    table = RequestTable(clients=2)
    for number in range(4):
        table.restore(f"c/{number}", 1, put(), put_done(number))
    assert [client_id for client_id, _, _, answers in table.dump() if answers] == ["c/2", "c/3"]
    assert [client_id for client_id, _, _, answers in reloaded(table, clients=1).dump() if answers] == ["c/3"]


class TestIdleClients:
    """What a client asked that was not heard of for long is not known any more, but none of it runs again."""

    @pytest.fixture
    def later(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
        now = [1000.0]
        monkeypatch.setattr("transfer_queue.wire.requests.time.monotonic", lambda: now[0])

        def move(seconds: float) -> None:
            now[0] += seconds

        return move

    @pytest.mark.parametrize("restarted", ["before", "after", "never"])
    def test_a_request_that_was_answered_long_ago_is_refused(
        self, later: Callable[[float], None], restarted: str
    ) -> None:
        """With a typed error, also after a restart; the requests that come next are served."""
        table = RequestTable()
        for number in (5, 6, 7):
            answered(table, number)
        if restarted == "before":
            table = reloaded(table)
        later(601.0)
        answered(table, 1, client_id="c/2")
        assert [client_id for client_id, *_, answers in table.dump() if answers] == ["c/2"]
        if restarted == "after":
            table = reloaded(table)
        for number in (5, 7):
            with pytest.raises(
                ConnectionLost, match=f"outcome of request {number} of client 'c/1' is not known any more"
            ):
                table.find("c/1", number, 1)
        answered(table, 8)
        assert outcome(table, 8).indexes.tolist() == [8]
        with pytest.raises(ConnectionLost):
            table.find("c/1", 7, 1)

    def test_a_client_whose_answers_made_room_for_others_is_refused_too(self) -> None:
        """Also one of which only the floor was known."""
        table = RequestTable(clients=1)
        answered(table, 5, client_id="c/1")
        assert table.find("c/2", 9, 9) is None
        answered(table, 1, client_id="c/3")
        for client_id, number in (("c/1", 5), ("c/2", 8)):
            with pytest.raises(ConnectionLost):
                table.find(client_id, number, 1)
        assert table.find("c/2", 9, 9) is None

    def test_who_waits_is_never_forgotten(self, later: Callable[[float], None]) -> None:
        """However long, and however many others come."""
        table = RequestTable(clients=2)
        waiting = ticket(5, draw())
        table.wait(waiting)
        later(10_000.0)
        for number in range(10):
            answered(table, 1, client_id=f"other/{number}")
        assert table.find("c/1", 5, 5) is waiting

    def test_a_request_that_was_taken_back_may_run_again(self, later: Callable[[float], None]) -> None:
        """Nothing of it was done."""
        table = RequestTable()
        made = ticket(5, draw())
        table.wait(made)
        table.answered(made, drawn(5))
        table.withdraw("c/1", 5)
        later(601.0)
        answered(table, 1, client_id="c/2")
        assert table.find("c/1", 5, 5) is None

    def test_the_clients_of_which_that_is_remembered_are_bounded(self) -> None:
        """Those that were forgotten last stay."""
        table = RequestTable(clients=1, passed=2)
        for number in range(5):
            answered(table, 1, client_id=f"c/{number}")
        for known in (table, reloaded(table, clients=1, passed=2)):
            assert [client_id for client_id, *_ in known.dump()] == ["c/2", "c/3", "c/4"]


def test_an_answer_that_comes_after_its_request_was_withdrawn_is_not_kept() -> None:
    """A draw runs again under the same id, and the late answer to the first one does not count for it."""
    table = RequestTable()
    first, second = ticket(5, draw()), ticket(5, draw())
    table.wait(first)
    assert table.withdraw("c/1", 5) is first
    table.wait(second)
    table.answered(first, drawn(1))
    table.discard(first)
    assert table.find("c/1", 5, 1) is second
    table.answered(second, drawn(2))
    table.discard(first)
    assert outcome(table, 5).indexes.tolist() == [2]
    table.discard(second)
    assert table.find("c/1", 5, 1) is None


def test_many_threads_answer_while_others_dump() -> None:
    """Nothing is lost, and every dump is one that a table can load."""
    table, done = RequestTable(), threading.Event()

    def answer(client: int) -> None:
        for number in range(1, 300):
            answered(table, number, client_id=f"c/{client}")

    def dump() -> None:
        while not done.is_set():
            RequestTable().load(table.dump())

    with ThreadPoolExecutor(5) as threads:
        dumping = threads.submit(dump)
        list(threads.map(answer, range(4)))
        done.set()
        dumping.result(WAIT_S)
    assert {client_id: len(answers) for client_id, _, _, answers in table.dump()} == {
        f"c/{client}": 299 for client in range(4)
    }


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
