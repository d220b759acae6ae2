"""Fields that are lost with a storage unit, as the change feed tells of them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import UNIT, Driver, ints, put_request
from transfer_queue.messages import GetKeys, Keys, Reconcile, WaitKeys
from transfer_queue.messages.journal import UnitGivenUp


def put_keys(queue: Driver, keys: tuple[str, ...], block: int, field: str = "x", **options: Any) -> Any:
    request = put_request(len(keys), (field,), block, keys=keys, **options)
    return queue.after(queue.ledger.put, request, queue._next(), "writer", queue.now)


def give_up(queue: Driver, unit: int) -> None:
    queue.after(queue.ledger.lose_unit, unit, queue.now, UnitGivenUp(unit=unit))


def forget(queue: Driver, unit: int) -> None:
    """The unit is back, and has nothing."""
    queue.after(queue.ledger.reconcile, Reconcile(unit=unit, blocks=ints()), queue.now)


def listing(queue: Driver, since: str) -> Keys:
    return queue.ledger.serving.keys.listing(GetKeys(partition_id=None, since=since))


@pytest.mark.parametrize("lose", [give_up, forget])
def test_keys_that_lost_a_field_are_listed_as_changed(lose: Any) -> None:
    """Once, though two fields are lost; those that lost nothing are not, nor is anything listed as removed."""
    queue = Driver()
    put_keys(queue, ("a", "b"), UNIT + 11)
    put_keys(queue, ("a", "b"), UNIT + 12, "y")
    put_keys(queue, ("c",), 2 * UNIT + 1)
    put_keys(queue, ("d",), UNIT + 13, partition_id="q")
    queue.put(1)  # a row without a key
    cursor = listing(queue, "").cursor
    assert listing(queue, cursor).keys == ()
    lose(queue, 1)
    changes = listing(queue, cursor)
    assert (changes.partitions, changes.keys, changes.removed) == (("p", "q"), ("a", "b", "d"), ())
    assert not changes.full
    assert listing(queue, changes.cursor).keys == ()


def test_who_waits_for_changes_hears_of_it() -> None:
    """And who waits for a field hears nothing of its loss, but of its return."""
    queue = Driver()
    put_keys(queue, ("a",), UNIT + 1)
    cursor = listing(queue, "").cursor
    rest: dict[str, Any] = {"keys": None, "fields": (), "where": {}, "timeout_s": 10.0}
    changes = WaitKeys(partition_id="p", count=None, since=cursor, **rest)
    fields = WaitKeys(partition_id="p", count=1, since=cursor, **rest | {"fields": ("x",)})
    tickets = []
    for request in (changes, fields):
        tickets.append(queue._next())
        assert queue.after(queue.ledger.serving.keys.wait, request, tickets[-1], queue.now) is None
    give_up(queue, 1)
    answers: dict[int, Any] = dict(queue.answers)
    assert list(answers) == tickets[:1] and answers[tickets[0]].keys == ("a",)
    put_keys(queue, ("a",), 2 * UNIT + 1)
    answers = dict(queue.answers)
    assert answers[tickets[1]].keys == ("a",)
