"""A storage unit that is away is given up in time, and one that only could not be heard is not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.controller.test_full_journal import FullLife
from tests.unit.journal.faulty import FaultyFiles
from tests.unit.ledger.driver import draw_request, put_request
from transfer_queue.controller import ControllerService
from transfer_queue.controller.keeping import recover as replayed
from transfer_queue.errors import CapacityExceeded
from transfer_queue.journal import Recovered
from transfer_queue.ledger import Ledger


def test_a_unit_that_is_overdue_is_listened_for_before_it_is_given_up(tmp_path: Path) -> None:
    """A controller that was stopped finds it overdue before it reads that it is there."""
    life = Life(tmp_path / "first")
    announce(life)
    life.service.gone("unit-0/1")
    for _ in range(3):
        life.now += 40.0
        assert life.service.tick() == 2.0
        life.now += 1.0
        announce(life)
        life.service.gone("unit-0/1")
    assert not life.ledger.blocks.given_up(1)
    life.pass_time(30.0)
    assert life.ledger.blocks.given_up(1)
    life.service.close()


def test_the_time_that_recovery_takes_is_nobodys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither are units away then, nor do leases run out: nobody could renew them."""
    life = Life(tmp_path / "first")
    announce(life)
    life.ask(put_request(2, ("x",), UNIT + 1))
    life.ask(draw_request(1, ("x",), "t", lease_s=20.0))
    life.service.close()
    now = [life.now]

    def slowly(recovered: Recovered, *kept: object) -> None:
        replayed(recovered, *kept)  # type: ignore[arg-type]
        now[0] += 100.0

    monkeypatch.setattr("transfer_queue.controller.keeping.recover", slowly)
    ledger = Ledger()
    service = ControllerService(ledger, lambda: now[0])
    service.keep_in(tmp_path / "first")
    for seconds, leases in ((0.0, 1), (19.0, 1), (10.0, 0)):
        now[0] += seconds
        service.tick()
        assert len(ledger.leases.open) == leases
        assert not ledger.blocks.given_up(1)
    service.close()


class TestOnAFullDisk:
    def test_a_unit_that_comes_back_needs_no_room_but_the_reserve(self, tmp_path: Path) -> None:
        life = FullLife(tmp_path / "first")
        announce(life)
        life.fill(100_000)
        life.service.gone("unit-0/1")
        with pytest.raises(CapacityExceeded):
            life.ask(put_request(1, ("x",), UNIT + 1))
        announce(life)
        life.pass_time(100.0)
        assert not life.ledger.blocks.given_up(1)
        life.service.close()

    def test_a_unit_that_is_refused_lives(self, tmp_path: Path) -> None:
        """Where the reserve is used up as well, it is not given up as long as it says that it is there."""
        life = FullLife(tmp_path / "first")
        announce(life)
        life.fill(0)
        life.service.gone("unit-0/1")
        for _ in range(5):
            life.now += 20.0
            with pytest.raises(CapacityExceeded):
                announce(life)
            life.service.tick()
        assert not life.ledger.blocks.given_up(1)
        life.pass_time(31.0)
        assert life.ledger.blocks.given_up(1)
        life.service.close()

    def test_nobody_is_given_up_while_nothing_is_served(self, tmp_path: Path) -> None:
        """From the moment when there is space again a unit has all its time to come back."""
        life = FullLife(tmp_path / "first")
        announce(life)
        life.service.close()
        for path in life.folder.glob("spare-*"):
            path.unlink()
        files = FaultyFiles()
        files.space_bytes = 0
        again = Life(life.folder, files=files)
        for _ in range(5):
            again.pass_time(50.0)
        files.space_bytes = None
        again.service.tick()
        again.pass_time(27.0)
        assert not again.ledger.blocks.given_up(1)
        again.pass_time(1.0)
        again.pass_time(0.0)
        assert again.ledger.blocks.given_up(1)
        again.service.close()
