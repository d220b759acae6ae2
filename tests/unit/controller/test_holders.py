"""What clients hold beside leases, room for a put or a cut, is theirs as long as they live and say so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.ledger.driver import put_request
from transfer_queue.errors import LeaseExpired
from transfer_queue.messages import Admit, Admitted, Clear, Cut, CutDone, EndCut, KeepCut
from transfer_queue.wire.ticket import Ticket


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path / "first", limits={"total_bytes": 1000})
    announce(one)
    yield one
    one.service.close()


def admit(size_bytes: int) -> Admit:
    return Admit(partition_id="p", global_step=None, num_rows=1, size_bytes=size_bytes, timeout_s=600.0)


def cut(life: Life, client: str, hold_s: float = 60.0) -> int:
    """Returns the number of the hold; the answer comes from a thread."""
    answers: list[Any] = []
    came = threading.Event()

    def take(_: Ticket, answer: Any) -> None:
        answers.append(answer)
        came.set()

    request = Cut(hold_s=hold_s)
    life.service.submit(request, Ticket(client, 1, None, request, take))
    assert came.wait(10.0) and isinstance(answers[0], CutDone)
    return answers[0].hold


def test_room_that_a_client_asked_for_is_free_when_it_is_gone(life: Life) -> None:
    """At once, for who waits; another process of the same name keeps its own."""
    assert isinstance(life.ask(admit(600), client="rollout/a"), Admitted)
    other = life.ask(admit(300), client="rollout/b")
    assert life.ask(admit(500), client="late/c") is None
    waiting = max(life.answers) + 1
    assert life.service.holding() == {"rollout/a", "rollout/b"}
    life.service.gone("rollout/a")
    assert isinstance(life.answers[waiting], Admitted)
    assert life.service.holding() == {"rollout/b", "late/c"}
    put = put_request(1, ("x",), UNIT + 1, size_bytes=300, admission=other.admission)
    assert len(life.ask(put, client="rollout/b").indexes) == 1
    assert life.service.holding() == {"late/c"}


def test_a_cut_is_held_as_long_as_it_is_renewed(life: Life) -> None:
    """What is cleared meanwhile is reused afterwards; a hold that ended cannot be renewed."""
    life.ask(put_request(1, ("x",), UNIT + 1, size_bytes=10))
    hold = cut(life, "saver/1")
    assert life.service.holding() == {"saver/1"}
    life.ask(Clear(partition_id="p", global_step=None, indexes=None, generations=None))
    for _ in range(5):
        life.now += 50.0
        life.service.tick()
        life.ask(KeepCut(hold=hold, hold_s=60.0), client="saver/1")
    assert life.pushed == []
    life.now += 61.0
    life.service.tick()
    assert [order.blocks.tolist() for order in life.pushed] == [[UNIT + 1]]
    with pytest.raises(LeaseExpired, match="not held any more"):
        life.ask(KeepCut(hold=hold, hold_s=60.0), client="saver/1")


@pytest.mark.parametrize("how", ["gone", "ended", "restarted"])
def test_a_cut_that_is_not_held_is_never_taken_for_one_that_is(life: Life, tmp_path: Path, how: str) -> None:
    """Neither after the death of its client nor after that of the controller, whatever is held then."""
    hold = cut(life, "saver/1")
    if how == "gone":
        life.service.gone("saver/1")
    elif how == "ended":
        life.ask(EndCut(hold=hold), request_id=0)
    now = life.killed(tmp_path / "second", limits={"total_bytes": 1000}) if how == "restarted" else life
    other = cut(now, "saver/2")
    assert other != hold
    with pytest.raises(LeaseExpired):
        now.ask(KeepCut(hold=hold, hold_s=60.0), client="saver/1", request_id=90)
    assert now.ask(KeepCut(hold=other, hold_s=60.0), client="saver/2", request_id=91) is not None
    now.service.close()
