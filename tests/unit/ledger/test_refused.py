"""Blocks that were given up are refused for ever, in bounded memory."""

from __future__ import annotations

import pytest

from transfer_queue.errors import BlockLost
from transfer_queue.ledger import refused
from transfer_queue.ledger.refused import Refused
from transfer_queue.messages import SPAN_SHIFT, UNIT_SHIFT


def block(unit: int, span: int, position: int = 0) -> int:
    return (unit << UNIT_SHIFT) + (span << SPAN_SHIFT) + position


def is_refused(known: Refused, number: int) -> bool:
    """As a put finds out, and as a unit that comes back does."""
    try:
        known.check(number)
    except BlockLost:
        assert known.has(number) or number >> UNIT_SHIFT in known.units
        return True
    assert not known.has(number)
    return False


def test_however_many_are_given_up_each_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the unit that has most the older ones are not told apart any more; newer blocks, and other units, are free."""
    monkeypatch.setattr(refused, "MOST", 10)
    known = Refused()
    given_up = []
    for span in range(1, 201):
        lost, spans = (block(1, span, 3), block(2, 1, span)), (block(3, span),) if span % 20 == 0 else ()
        known.lose(lost[: 1 + (span % 50 == 0)], spans)
        given_up += [*lost[: 1 + (span % 50 == 0)], *spans]
        assert len(known.blocks) + len(known.spans) <= 10
        assert all(is_refused(known, number) for number in given_up)
    again = Refused()
    again.load(known.dump())
    assert again == known
    for each in (known, again):
        assert all(is_refused(each, number) for number in given_up)
        assert not is_refused(each, block(1, 201, 1)) and not is_refused(each, block(2, 200))
        assert is_refused(each, block(3, 200, 17))


def test_of_a_unit_that_never_comes_back_nothing_else_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refused, "MOST", 4)
    known = Refused()
    known.lose([block(1, span) for span in range(1, 9)], [block(1, 20)])
    known.lose_unit(1, for_good=True)
    assert known == Refused(units={1})
    assert is_refused(known, block(1, 99))
