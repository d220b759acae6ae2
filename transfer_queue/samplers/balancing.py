"""Numbers in k parts with nearly equal sums.

Source of the method: Karmarkar and Karp 1982, "The Differencing Method of Set Partitioning", in the form for k parts:
the two partial solutions that differ most are joined, the largest parts of one with the smallest of the other.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias


class _Part(NamedTuple):
    total: float
    members: tuple[int, ...]


_Solution: TypeAlias = list[_Part]  # k parts, the largest first


def get_seqlen_balanced_partitions(seqlen_list: Sequence[int], k_partitions: int, equal_size: bool) -> list[list[int]]:
    """k ascending lists of positions that cover all of `seqlen_list`, with nearly equal sums; none is empty.

    equal_size    all lists have the same length

    Raises `AssertionError` for fewer numbers than lists, and if they cannot have equal lengths. O(n · k · log n).
    """
    count = len(seqlen_list)
    assert k_partitions >= 1, f"k_partitions must be at least 1, not {k_partitions}"
    assert count >= k_partitions, f"number of items ({count}) must be at least k_partitions ({k_partitions})"
    assert not equal_size or count % k_partitions == 0, (
        f"number of items ({count}) must be a multiple of k_partitions ({k_partitions}) for parts of equal size"
    )
    width = k_partitions if equal_size else 1  # every solution adds one number to each part, or to one of them
    order = sorted(range(count), key=lambda at: (seqlen_list[at], at))
    solutions = [
        _solution([_Part(seqlen_list[at], (at,)) for at in order[start : start + width]], k_partitions)
        for start in range(0, count, width)
    ]
    heap = [(-_spread(solution), number, solution) for number, solution in enumerate(solutions)]
    heapq.heapify(heap)
    number = len(heap)
    while len(heap) > 1:
        one, other = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        joined = [
            _Part(mine.total + theirs.total, mine.members + theirs.members)
            for mine, theirs in zip(one, reversed(other), strict=True)
        ]
        made = _solution(joined, k_partitions)
        heapq.heappush(heap, (-_spread(made), number, made))
        number += 1
    return sorted(sorted(part.members) for part in heap[0][2])


def _solution(parts: list[_Part], k: int) -> _Solution:
    """Largest first; of equal sums the longest, so that a part without members gets some while there are any left."""
    filled = parts + [_Part(0, ())] * (k - len(parts))
    return sorted(filled, key=lambda part: (part.total, len(part.members)), reverse=True)


def _spread(solution: _Solution) -> float:
    return solution[0].total - solution[-1].total
