"""Samplers that return (handed out, marked consumed), and keep the batch of a rank where that is asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.samplers.base import BaseSampler
from transfer_queue.samplers.states import Batch, batch_of, keep, kept_of, states_of


class SequentialSampler(BaseSampler):
    """The first `batch_size` ready rows. O(batch_size)."""

    lazy = True

    def sample(  # type: ignore[override]  # the other dialect
        self, ready_indexes: Sequence[int], batch_size: int, *args: Any, **kwargs: Any
    ) -> Batch:
        chosen = [int(index) for index in ready_indexes[:batch_size]]
        return chosen, list(chosen)


class BatchKeeper(BaseSampler):
    """A sampler that gives a rank the same batch whenever it asks with the same `batch_index`."""

    @abstractmethod
    def choose(self, ready_indexes: Sequence[int], batch_size: int, **kwargs: Any) -> Sequence[int]:
        """Choose a new batch; empty: there is not enough."""

    def sample(  # type: ignore[override]  # the other dialect
        self,
        ready_indexes: Sequence[int],
        batch_size: int,
        *args: Any,
        dp_rank: int | None = None,
        batch_index: int | None = None,
        task_name: str | None = None,
        partition_id: str | None = None,
        **kwargs: Any,
    ) -> Batch:
        """A batch, which is kept if `dp_rank` is given."""
        if dp_rank is None:
            chosen = list(self.choose(ready_indexes, batch_size, **kwargs))
            return chosen, list(chosen)
        kept = self._kept(partition_id, task_name, dp_rank, batch_index)
        if kept is None:
            chosen = list(self.choose(ready_indexes, batch_size, **kwargs))
            if chosen:
                self._keep(partition_id, task_name, dp_rank, batch_index, chosen)
            return chosen, list(chosen)
        return kept

    def _kept(self, partition_id: Any, task_name: Any, dp_rank: Any, batch_index: Any) -> Batch | None:
        found = kept_of(states_of(self), partition_id, task_name, batch_index).get(dp_rank)
        return None if found is None else batch_of(found)

    def _keep(self, partition_id: Any, task_name: Any, dp_rank: Any, batch_index: Any, chosen: Sequence[int]) -> None:
        at = (partition_id, task_name, dp_rank, batch_index)
        keep(states_of(self), at, (list(chosen), list(chosen)))


def check_dp_rank(sampler: BaseSampler, dp_rank: Any) -> int:
    """The rank; raises for none, or one that cannot be."""
    if dp_rank is None:
        raise InvalidArgument(f"{type(sampler).__name__} needs dp_rank in sampling_config")
    if isinstance(dp_rank, bool) or not isinstance(dp_rank, int):
        raise WrongType(f"dp_rank must be an int, not {dp_rank!r}")
    if dp_rank < 0:
        raise InvalidArgument(f"dp_rank must be at least 0, not {dp_rank}")
    return dp_rank
