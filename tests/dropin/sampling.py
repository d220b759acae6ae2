"""What the tests of samplers share: a sampler as users write it, and the draw of one rank."""

from __future__ import annotations

from typing import Any

from tests.unit.ledger.driver import Driver, rows
from transfer_queue import GRPOGroupNSampler, RankAwareSampler, SeqlenBalancedSampler
from transfer_queue.errors import GetMetaTimeout
from transfer_queue.samplers import BaseSampler

KEEPERS = [GRPOGroupNSampler, RankAwareSampler, SeqlenBalancedSampler]


class Keeps(BaseSampler):
    """What users write: a batch is kept per rank and batch index."""

    def sample(  # type: ignore[override]
        self,
        ready_indexes: list[int],
        batch_size: int,
        dp_rank: int = 0,
        batch_index: int = 0,
        task_name: str = "",
        partition_id: str = "",
        *args: Any,
        **kwargs: Any,
    ) -> tuple[list[int], list[int]]:
        kept = self._states.setdefault(partition_id, {}).setdefault(task_name, {}).setdefault(dp_rank, {})
        if batch_index not in kept:
            if len(ready_indexes) < batch_size:
                return [], []
            kept[batch_index] = ready_indexes[:batch_size]
        return kept[batch_index], kept[batch_index]


def ask(queue: Driver, rank: int, index: int | None = 0, count: int = 2, **options: Any) -> list[int] | None:
    """The draw of one rank; None: there is nothing for it."""
    params = {"dp_rank": rank, "batch_index": index, "task_name": "t", "partition_id": "p"}
    try:
        return rows(queue.draw(count, sampler_params=params, **{"timeout_s": 0.0, **options}))
    except GetMetaTimeout:
        return None
