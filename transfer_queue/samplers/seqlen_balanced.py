"""Shares of about equal length for all data-parallel ranks, dealt at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transfer_queue.samplers.balancing import get_seqlen_balanced_partitions
from transfer_queue.samplers.group_n import GRPOGroupNSampler, check_positive
from transfer_queue.samplers.pairs import check_dp_rank
from transfer_queue.samplers.states import Batch

_LENGTH = "total_lengths"


class SeqlenBalancedSampler(GRPOGroupNSampler):
    """`batch_size` rows for each of `dp_size` ranks, in whole groups, with nearly equal sums of a tag, `total_lengths`.

    The first rank that asks with a `batch_index` fixes the shares of all ranks; a row without the tag counts 1.
    Without `partition` there are no tags, and the shares are contiguous. A rank beyond `dp_size` gets nothing.
    """

    def __init__(self, n_samples_per_prompt: int = 1, dp_size: int = 1) -> None:
        super().__init__(n_samples_per_prompt)
        self.dp_size = check_positive("dp_size", dp_size)

    def check_request(self, batch_size: int, *, dp_rank: Any = None, **kwargs: Any) -> None:
        self._check_size(batch_size)
        check_dp_rank(self, dp_rank)

    def sample(  # type: ignore[override]  # the other dialect
        self,
        ready_indexes: Sequence[int],
        batch_size: int,
        *args: Any,
        dp_rank: int | None = None,
        batch_index: int | None = None,
        task_name: str | None = None,
        partition_id: str | None = None,
        partition: Any = None,
        **kwargs: Any,
    ) -> Batch:
        self.check_request(batch_size, dp_rank=dp_rank)
        kept = self._kept(partition_id, task_name, dp_rank, batch_index)
        if kept is not None:
            return kept
        ranks = [r for r in range(self.dp_size) if self._kept(partition_id, task_name, r, batch_index) is None]
        if dp_rank not in ranks:
            return [], []
        groups = self.groups(ready_indexes, batch_size * len(ranks), partition)
        if not groups:
            return [], []
        for rank, share in zip(ranks, self._shares(groups, len(ranks), partition), strict=True):
            self._keep(partition_id, task_name, rank, batch_index, share)
        return self._kept(partition_id, task_name, dp_rank, batch_index) or ([], [])

    def _shares(self, groups: list[list[int]], ranks: int, partition: Any) -> list[list[int]]:
        if partition is None:
            each = len(groups) // ranks
            chosen = [list(range(at, at + each)) for at in range(0, len(groups), each)]
        else:
            tags = partition.get_custom_meta([index for group in groups for index in group])
            lengths = [sum(tags.get(index, {}).get(_LENGTH, 1) for index in group) for group in groups]
            chosen = get_seqlen_balanced_partitions(lengths, ranks, equal_size=True)
        return [[index for number in part for index in groups[number]] for part in chosen]
