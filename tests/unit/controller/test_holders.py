"""What clients hold beside leases, room for a put or a cut, is theirs as long as they live and say so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.ledger.driver import draw_request, handle_of, ints, put_request
from transfer_queue.errors import CapacityExceeded, LeaseExpired
from transfer_queue.messages import (
    Admit,
    Admitted,
    Announce,
    Clear,
    Cut,
    CutDone,
    EndCut,
    KeepCut,
    Reconcile,
    Settle,
    SetVersion,
)
from transfer_queue.wire.ticket import Ticket


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path / "first", limits={"total_bytes": 1000})
    announce(one)
    yield one
    one.service.close()


def admit(size_bytes: int) -> Admit:
    return Admit(partition_id="p", global_step=None, num_rows=1, size_bytes=size_bytes, timeout_s=600.0)


def cut(life: Life, client: str, hold_s: float = 60.0, request_id: int = 1) -> int:
    """Returns the number of the hold; the answer comes from a thread."""
    answers: list[Any] = []
    came = threading.Event()

    def take(_: Ticket, answer: Any) -> None:
        answers.append(answer)
        came.set()

    request = Cut(hold_s=hold_s)
    life.service.submit(request, Ticket(client, request_id, None, request, take))
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


def test_a_cut_that_is_asked_for_twice_is_held_once(life: Life) -> None:
    """The server had forgotten that it was asked; what the client ends is all that there is."""
    cut(life, "saver/1")
    other = cut(life, "saver/1", request_id=2)
    hold = cut(life, "saver/1")
    for number in (hold, other):
        assert life.ledger.blocks.copied
        life.ask(EndCut(hold=number))
    assert not life.ledger.blocks.copied


@pytest.mark.parametrize("how", ["settled", "reconciled", "given up", "without its index"])
def test_a_unit_that_reuses_bytes_of_a_cut_ends_it(life: Life, how: str) -> None:
    """It is told without an order what it may reuse: whatever was copied, the checkpoint is refused."""
    done = life.ask(put_request(4, ("x",), UNIT + 1, size_bytes=10))
    hold = cut(life, "saver/1")
    keep = KeepCut(hold=hold, hold_s=60.0)
    cleared = {name: values[:2] if how == "reconciled" else values for name, values in handle_of(done).items()}
    life.ask(Clear(partition_id=None, global_step=None, **cleared))
    assert life.ask(Settle(blocks=ints(UNIT + 2))).committed.tolist() == [0]  # it has nothing of the cut
    life.ask(keep, client="saver/1")
    match how:
        case "settled":
            assert life.ask(Settle(blocks=ints(UNIT + 1))).committed.tolist() == [0]
        case "reconciled":
            assert life.ask(Reconcile(unit=1, blocks=ints(UNIT + 1))).cleared_slots.tolist() == [0, 1]
        case "given up":
            life.service.gone("unit-0/1")
            life.pass_time(31.0)
            assert life.ledger.blocks.given_up(1)
        case _:
            place = {"address": "tcp://127.0.0.1:1", "local_address": "", "folder": "", "nonce": ""}
            life.ask(Announce(unit_id="unit-0", capacity_bytes=1, life="other", **place), client="unit-0/1")
    with pytest.raises(LeaseExpired, match="not held any more"):
        life.ask(keep, client="saver/1", request_id=90)
    if how in ("settled", "reconciled"):
        assert [order.sequence for order in life.pushed] == [1]


def test_units_are_told_after_it_is_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that held a cut and a stale row is gone while the journal is full."""
    life = Life(tmp_path / "first", max_staleness=0)
    announce(life)
    life.ask(put_request(1, ("x",), UNIT + 1, version=1))
    life.ask(draw_request(1, lease_s=60.0), client="saver/1")
    life.ask(SetVersion(version=2))
    cut(life, "saver/1", request_id=90)
    keeper = life.service._answers.keeper
    assert keeper is not None

    def full(*parts: bytes, essential: bool = False) -> int:
        raise CapacityExceeded("no room")

    with monkeypatch.context() as patch:
        patch.setattr(keeper._journal, "append", full)
        life.service.gone("saver/1")
        life.service.tick()
        assert life.pushed == []
    life.service.tick()
    assert [order.blocks.tolist() for order in life.pushed] == [[UNIT + 1]]
    life.service.close()
