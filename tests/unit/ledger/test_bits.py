"""The ordered bitmap against a sorted set."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer_queue.ledger.bits import CHUNK, OrderedBits

POSITIONS = st.sets(st.integers(0, 5 * CHUNK), max_size=40)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), POSITIONS, st.integers(0, 60)), max_size=12))
def test_members_come_in_order_whatever_was_added_and_removed(steps: list[tuple[bool, set[int], int]]) -> None:
    """`first(n)` equals the n smallest members; add and discard tell what they changed."""
    bits, model = OrderedBits(), set[int]()
    for add, positions, count in steps:
        given_positions = np.array(sorted(positions), dtype=np.int64)
        changed = bits.add(given_positions) if add else bits.discard(given_positions)
        assert set(changed.tolist()) == (positions - model if add else positions & model)
        model = model | positions if add else model - positions
        assert bits.first(count).tolist() == sorted(model)[:count]
        assert len(bits) == bits.total == len(model)
        assert bits.contains(given_positions).all() == (positions <= model)


def test_positions_outside_are_no_members() -> None:
    """Asking for a position below zero or beyond the end is no error and no member."""
    bits = OrderedBits()
    bits.add(np.array([0, CHUNK]))
    assert bits.contains(np.array([-1, 0, CHUNK, 10 * CHUNK])).tolist() == [False, True, True, False]
    assert bits.discard(np.array([1, 9 * CHUNK])).tolist() == []
