"""What a sampler keeps for the ranks of a task under one batch index, before and after it is asked."""

from __future__ import annotations

from typing import Any

from transfer_queue.ledger.guarding import plain_copy
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.states import forget, keep, kept_of, states_of


class KeptBatches:
    """Looks at a sampler that may keep batches, and can put it back to what it kept before."""

    def __init__(self, sampler: BaseSampler, partition: str, task: str, batch_index: Any) -> None:
        self._sampler = sampler
        self._at = (partition, task, batch_index)
        self._before = self._now()

    def _now(self) -> dict[Any, Any]:
        return kept_of(states_of(self._sampler), *self._at)

    def changed(self, own: Any) -> list[tuple[Any, Any]]:
        """(rank, a copy of what is kept for it) of the rank `own` and of those for which it is another object now."""
        news = {rank: value for rank, value in self._now().items() if rank == own or self._is_new(rank, value)}
        return [(rank, plain_copy(self._sampler, "_states", value)) for rank, value in news.items()]

    def put_back(self) -> None:
        """Nothing was handed out: what is kept is what was kept before."""
        partition, task, batch_index = self._at
        for rank in self._now().keys() - self._before.keys():
            forget(states_of(self._sampler), (partition, task, rank, batch_index))
        for rank, value in self._before.items():
            keep(states_of(self._sampler), (partition, task, rank, batch_index), value)

    def _is_new(self, rank: Any, value: Any) -> bool:
        return rank not in self._before or self._before[rank] is not value
