"""Free ranges: no overlap, nothing lost, exact fits found, cost independent of fragmentation."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfer_queue.extents import Extents


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 300), st.sampled_from([1, 2, 8, 64])), max_size=200))
def test_runs_never_overlap_and_all_space_comes_back_as_one_range(steps: list[tuple[bool, int, int]]) -> None:
    """Whatever is taken and freed in whichever order, runs are disjoint and the free ranges end as one."""
    extents = Extents(4096)
    held: list[tuple[int, int]] = []
    for take, length, alignment in steps:
        if take or not held:
            start = extents.allocate(length, alignment)
            if start is None:
                assert all(size - (-begin % alignment) < length for begin, size in extents.ranges())
                continue
            assert start % alignment == 0 and start + length <= 4096
            assert all(start + length <= other or other + size <= start for other, size in held)
            held.append((start, length))
        else:
            extents.free(*held.pop(length % len(held)))
        assert extents.free_total == 4096 - sum(size for _, size in held) == sum(size for _, size in extents.ranges())
    for run in held:
        extents.free(*run)
    assert extents.ranges() == [(0, 4096)] and extents.largest == 4096


def test_a_run_that_fits_exactly_is_found() -> None:
    """The last range is found even where its class also holds shorter ones."""
    extents = Extents(1000)
    for length in (513, 487):
        assert extents.allocate(length) is not None
    assert extents.allocate(1) is None
    extents.free(0, 513)
    assert extents.allocate(514) is None
    assert extents.allocate(513) == 0


def test_extending_joins_the_new_space_with_what_is_free_before_it() -> None:
    """A table that grows offers one run across its old end."""
    extents = Extents(10)
    assert extents.allocate(8) == 0
    extents.extend(20)
    assert extents.ranges() == [(8, 12)]
    assert extents.allocate(12) == 8
    assert repr(extents) == "<Extents: 0 of 20 free in 0 ranges>"


def test_parts_of_a_run_may_come_back_one_by_one() -> None:
    """A run can be freed in pieces, in any order."""
    extents = Extents(100)
    assert extents.allocate(100) == 0
    for start in (50, 0, 90, 10):
        extents.free(start, 10)
    assert extents.ranges() == [(0, 20), (50, 10), (90, 10)]


def test_freeing_twice_is_refused() -> None:
    """A range that is free already cannot be freed again."""
    extents = Extents(100)
    with pytest.raises(AssertionError, match="free already"):
        extents.free(0, 10)


def test_cost_does_not_grow_with_the_number_of_free_ranges() -> None:
    """Taking a run among a hundred thousand free ranges costs about what it costs among a hundred."""

    def cost(holes: int) -> float:
        extents = Extents(holes * 256)
        for _ in range(holes):
            extents.allocate(256)
        for hole in range(0, holes, 2):
            extents.free(hole * 256, 128 + hole % 128)
        best = float("inf")
        for _ in range(5):
            started = time.perf_counter()
            for _ in range(200):
                start = extents.allocate(100)
                assert start is not None
                extents.free(start, 100)
            best = min(best, time.perf_counter() - started)
        return best

    assert cost(100_000) < 10 * cost(1_000)
