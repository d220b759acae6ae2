"""Acknowledgements of several leases in one request: each counts, or is refused, by itself."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.ledger.driver import Driver, ints, rows, token_of
from transfer_queue.errors import InvalidArgument, TransferQueueError
from transfer_queue.messages import AckMany, Drawn


def together(*parts: tuple[int, Drawn, Sequence[int]]) -> AckMany:
    """Of each part: the token, what was drawn, and which rows of it."""
    return AckMany(
        lease_tokens=ints(*(token for token, _, _ in parts)),
        sizes=ints(*(len(chosen) for _, _, chosen in parts)),
        indexes=np.concatenate([drawn.indexes[list(chosen)] for _, drawn, chosen in parts]).astype(np.int64),
        generations=np.concatenate([drawn.generations[list(chosen)] for _, drawn, chosen in parts]).astype(np.int64),
    )


def leased(queue: Driver, *counts: int) -> list[Drawn]:
    queue.put(sum(counts))
    found = [queue.lease(count) for count in counts]
    return [drawn for drawn in found if drawn is not None]


@given(st.lists(st.tuples(st.integers(0, 3), st.sets(st.integers(0, 1), min_size=1)), min_size=1, max_size=6))
def test_they_do_what_each_does_alone(parts: list[tuple[int, set[int]]]) -> None:
    """In their order: also where one was released, one is acknowledged twice, and a token is unknown."""
    one, other = Driver(), Driver()
    for queue in (one, other):
        drawn = leased(queue, 2, 2, 2)
        queue.release(drawn[2])
    asked = [(99 if which == 3 else which + 1, drawn[min(which, 2)], sorted(chosen)) for which, chosen in parts]
    refused = one.after(one.ledger.ack_many, together(*asked), one.now)
    alone = []
    for token, handed, chosen in asked:
        try:
            part = together((token, handed, chosen))
            other.ack(handed, part) if token == token_of(handed) else other.ledger.leases.get(token)
            alone.append("")
        except TransferQueueError as error:
            alone.append(str(error))
    assert list(refused) == alone
    assert one.snapshot() == other.snapshot()


def test_who_waits_for_the_end_of_the_stream_hears_it() -> None:
    """An acknowledgement wakes draws of a sealed partition."""
    queue = Driver()
    queue.put(2, is_last=True)
    drawn = [queue.lease(1), queue.lease(1)]
    assert queue.draw(2) is None
    parts = [(token_of(one), one, [0]) for one in drawn if one is not None]
    assert queue.after(queue.ledger.ack_many, together(*parts), queue.now) == ("", "")
    assert rows(queue.answers[queue.ticket]) == []


@pytest.mark.parametrize(
    "change", [{"sizes": ints(1)}, {"sizes": ints(1, 2)}, {"sizes": ints(-1, 3)}, {"generations": ints(0)}]
)
def test_parts_that_do_not_fit_are_refused_as_a_whole(change: dict[str, np.ndarray]) -> None:
    """Nothing is consumed."""
    queue = Driver()
    drawn = leased(queue, 1, 1)
    good = together(*((token_of(one), one, [0]) for one in drawn))
    body = {name: getattr(good, name) for name in ("lease_tokens", "sizes", "indexes", "generations")}
    with pytest.raises(InvalidArgument, match=r"sizes|samples"):
        queue.after(queue.ledger.ack_many, AckMany(**(body | change)), queue.now)
    assert queue.account()["reserved"] == 2
