"""The answers that a server remembers: dumped, replayed, bounded, and forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.unit.reloaded import plain, reloaded
from tests.unit.serving import WAIT_S, draw, drawn, frees_done, put, put_done
from transfer_queue.errors import ConnectionLost, DecodeError
from transfer_queue.messages import (
    Ack,
    Admit,
    Done,
    Draw,
    Drop,
    GetAudit,
    Put,
    Release,
    Renew,
    Report,
)
from transfer_queue.wire.requests import GIVEN_BACK, REMEMBERED, Answered, RequestTable
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
