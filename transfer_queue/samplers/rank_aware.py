"""One batch per rank and batch index, whoever of the rank's processes asks first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transfer_queue.errors import InvalidArgument
from transfer_queue.samplers.pairs import BatchKeeper, check_dp_rank
from transfer_queue.samplers.states import Batch


class RankAwareSampler(BatchKeeper):
    """The first `batch_size` ready rows for who asks first; the same again for peers with the same four names.

    Needs `dp_rank`, `batch_index`, `task_name` and `partition_id`. O(batch_size).
    """

    lazy = True

    def check_request(self, batch_size: int, *, dp_rank: Any = None, batch_index: Any = None, **kwargs: Any) -> None:
        check_dp_rank(self, dp_rank)
        if batch_index is None:
            raise InvalidArgument(
                "RankAwareSampler needs batch_index in sampling_config: without it every draw of "
                "a rank would be the same batch"
            )

    def sample(  # type: ignore[override]  # the other dialect
        self,
        ready_indexes: Sequence[int],
        batch_size: int,
        *args: Any,
        dp_rank: int | None = None,
        batch_index: int | None = None,
        **kwargs: Any,
    ) -> Batch:
        self.check_request(batch_size, dp_rank=dp_rank, batch_index=batch_index)
        return super().sample(ready_indexes, batch_size, *args, dp_rank=dp_rank, batch_index=batch_index, **kwargs)

    def choose(self, ready_indexes: Sequence[int], batch_size: int, **kwargs: Any) -> Sequence[int]:
        if len(ready_indexes) < batch_size:
            return []
        return [int(index) for index in ready_indexes[:batch_size]]
