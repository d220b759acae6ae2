"""Rows in the order in which they were allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transfer_queue.samplers.base import BaseSampler, Selection


class SequentialSampler(BaseSampler):
    """The first `batch_size` ready rows. The default of every task. O(batch_size)."""

    lazy = True

    def sample(self, ready_indices: Sequence[int], batch_size: int, **kwargs: Any) -> Selection:
        return ready_indices[:batch_size]
