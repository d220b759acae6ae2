"""A curve in one line of text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], *, top: float = 1.0, width: int = 50) -> str:
    """Return one bar per value in [0, `top`], or per mean of neighbouring values where there are more than `width`."""
    width = min(len(values), width)
    edges = [position * len(values) // width for position in range(width + 1)]
    heights = [sum(values[begin:end]) / (end - begin) / top for begin, end in pairwise(edges)]
    return "".join(BARS[min(max(int(height * len(BARS)), 0), len(BARS) - 1)] for height in heights)
