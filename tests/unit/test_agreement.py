"""A unit that was given up seeks an agreement until it has one: with pauses, one at a time, while it runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import Announced
from transfer_queue.runtime.agreement import Agreement
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.channel import Peer

GIVEN_UP = Announced(number=3, given_up=True)


class Service:
    """Agrees when it is told to; counts how many try at once."""

    def __init__(self) -> None:
        self.number = 3
        self.failures = 0
        self.calls: list[float] = []
        self.at_once = self.most_at_once = 0
        self.held = threading.Event()
        self.held.set()

    def return_to(self, number: int, ask: Callable[[Any], Any]) -> None:
        self.calls.append(time.monotonic())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.number = 0
        self.held.wait(5)
        self.at_once -= 1
        if self.failures:
            self.failures -= 1
            raise ConnectionLost("no controller")
        self.number = number


@pytest.fixture
def service() -> Service:
    return Service()


@pytest.fixture
def agreement(service: Service) -> Any:
    made = Agreement(cast(UnitService, service), cast(Peer, None), "unit-0", first_pause_s=0.02)
    yield made
    made.close()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_what_fails_is_tried_again_until_it_succeeds(service: Service, agreement: Agreement) -> None:
    """With growing pauses; until then writers wait."""
    agreement.make(3)
    service.failures = 3
    agreement.announced(GIVEN_UP)
    assert service.number == 0
    wait_for(lambda: service.number == 3)
    pauses = [after - before for before, after in zip(service.calls[1:], service.calls[2:], strict=False)]
    assert len(pauses) == 3 and pauses[0] >= 0.02 and pauses[1] >= 0.04 and pauses[2] >= 0.08


def test_one_is_sought_at_a_time_and_a_later_wish_is_not_lost(service: Service, agreement: Agreement) -> None:
    """Given up again while an agreement is under way: there is another one behind it, by the same thread."""
    agreement.make(3)
    service.held.clear()
    for _ in range(3):
        agreement.announced(GIVEN_UP)
    agreement.announced(Announced(number=3))  # the controller was started again: what is sought is sought on
    wait_for(lambda: len(service.calls) == 2)
    assert service.number == 0
    service.held.set()
    wait_for(lambda: service.number == 3 and "made" in repr(agreement))
    assert service.most_at_once == 1 and len(service.calls) in (2, 3)
    agreement.announced(GIVEN_UP)
    wait_for(lambda: len(service.calls) >= 3 and "made" in repr(agreement))


def test_closing_ends_what_is_sought(service: Service, agreement: Agreement) -> None:
    """Its thread is joined, and none is started afterwards."""
    agreement.make(3)
    service.failures = 1 << 30
    agreement.announced(GIVEN_UP)
    wait_for(lambda: len(service.calls) > 2)
    agreement.close()
    tried = len(service.calls)
    agreement.announced(GIVEN_UP)
    agreement.close()
    assert "tq-agreement" not in {thread.name for thread in threading.enumerate()}
    assert len(service.calls) == tried


def test_the_first_one_is_not_tried_again(service: Service, agreement: Agreement) -> None:
    """A unit that cannot start says so; what the controller says before it is there changes nothing."""
    agreement.announced(GIVEN_UP)
    service.failures = 1
    with pytest.raises(ConnectionLost):
        agreement.make(3)
    assert len(service.calls) == 1


def test_who_is_given_up_while_it_agrees_for_the_first_time_agrees_again(
    service: Service, agreement: Agreement
) -> None:
    """Under the number that it has by then; what was said before it began is what it agrees on."""
    agreement.announced(GIVEN_UP)
    service.held.clear()
    first = threading.Thread(target=agreement.make, args=(3,))
    first.start()
    wait_for(lambda: len(service.calls) == 1)
    agreement.announced(Announced(number=5, given_up=True))
    service.held.set()
    first.join()
    wait_for(lambda: service.number == 5)
    assert len(service.calls) == 2


def test_what_was_said_before_the_first_one_began_is_not_sought_again(service: Service, agreement: Agreement) -> None:
    agreement.announced(GIVEN_UP)
    agreement.make(3)
    assert len(service.calls) == 1 and service.number == 3
