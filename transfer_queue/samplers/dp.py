"""One selection, split over data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.samplers.base import BaseSampler, Selection
from transfer_queue.samplers.sequential import SequentialSampler


class DPSampler(BaseSampler):
    """Rank `dp_rank` gets the `dp_rank`-th contiguous slice of what `inner` chooses for all `dp_size` ranks.

    At the controller the choice for one `dp_group_id` is made once, for the first rank that asks, and kept for the
    others; a rank that asks again gets its slice again until the rows are cleared; rows count as consumed when every
    rank has its slice. `sampler_params` may override `dp_rank` and `dp_size`. `world_rank` and `world_size` describe
    the calling process; `world_size` must be a multiple of `dp_size`.
    """

    lazy = True

    def __init__(
        self,
        dp_rank: int = 0,
        dp_size: int = 1,
        world_rank: int | None = None,
        world_size: int | None = None,
        inner: BaseSampler | None = None,
    ) -> None:
        check_rank(dp_rank, dp_size)
        if world_size is not None and (world_size < 1 or world_size % dp_size):
            raise InvalidArgument(f"world_size ({world_size}) must be divisible by dp_size ({dp_size})")
        if world_rank is not None and world_size is not None and not 0 <= world_rank < world_size:
            raise InvalidArgument(f"world_rank ({world_rank}) must lie in [0, {world_size})")
        if isinstance(inner, DPSampler):
            raise InvalidArgument("a DPSampler cannot be the inner sampler of another one")
        if inner is not None and not isinstance(inner, BaseSampler):
            raise WrongType(f"inner must be a sampler, not {type(inner).__name__}")
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.world_rank = world_rank
        self.world_size = world_size
        self.inner = SequentialSampler() if inner is None else inner
        self.accepts_partial = self.inner.accepts_partial
        self.whole_groups = self.inner.whole_groups

    def check_request(self, batch_size: int, **kwargs: Any) -> None:
        self.inner.check_request(batch_size, **kwargs)

    def sample(
        self,
        ready_indices: Sequence[int],
        batch_size: int,
        *,
        dp_rank: int | None = None,
        dp_size: int | None = None,
        **kwargs: Any,
    ) -> Selection:
        """The slice of one rank, without the memory that the controller adds: same ready rows, same slices."""
        rank = self.dp_rank if dp_rank is None else dp_rank
        size = self.dp_size if dp_size is None else dp_size
        check_rank(rank, size)
        if len(ready_indices) < batch_size * size and not self.inner.accepts_partial:
            return []
        chosen = self.inner.sample(ready_indices, batch_size * size, **kwargs)
        rows: Selection = chosen[0] if isinstance(chosen, tuple) else chosen
        return rows[rank * batch_size : (rank + 1) * batch_size]


def check_rank(dp_rank: Any, dp_size: Any) -> None:
    """Raise unless `0 <= dp_rank < dp_size`, both whole numbers."""
    for name, value in (("dp_rank", dp_rank), ("dp_size", dp_size)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise WrongType(f"{name} must be an int, not {value!r}")
    if dp_size < 1:
        raise InvalidArgument(f"dp_size must be positive, not {dp_size}")
    if not 0 <= dp_rank < dp_size:
        raise InvalidArgument(f"dp_rank must lie in [0, dp_size={dp_size}), not {dp_rank}")
