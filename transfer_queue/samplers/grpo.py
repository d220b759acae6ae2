"""Whole groups: the n responses of a prompt are drawn together or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transfer_queue.errors import InsufficientSamples, InvalidArgument, WrongType
from transfer_queue.samplers.base import BaseSampler, Int64s, ReadyView, Selection


class GRPOSampler(BaseSampler):
    """The first `batch_size // num_n_samples` complete groups, as group relative policy optimisation needs them.

    A group is what was put with one `group_id`; rows without one form groups by position, blocks of `num_n_samples`
    ordinals. So no window ever straddles two prompts, and a group that misses a row is waited for while later ones
    are served. Groups sealed smaller count as one group too. `num_n_samples=None` takes the controller's number.

    Source of the grouping rule: Shao et al. 2024, DeepSeekMath, section 4.1 (advantages relative to the group).
    """

    lazy = True
    accepts_partial = True
    whole_groups = True

    def __init__(self, num_n_samples: int | None = None) -> None:
        if num_n_samples is not None and (isinstance(num_n_samples, bool) or not isinstance(num_n_samples, int)):
            raise WrongType(f"num_n_samples must be an int, not {num_n_samples!r}")
        if num_n_samples is not None and num_n_samples < 1:
            raise InvalidArgument(f"num_n_samples must be positive, not {num_n_samples}")
        self.num_n_samples = num_n_samples

    def check_request(self, batch_size: int, *, num_n_samples: int = 1, **kwargs: Any) -> None:
        size = self.num_n_samples or num_n_samples
        if batch_size % size:
            raise InvalidArgument(f"batch_size ({batch_size}) must be divisible by num_n_samples ({size})")

    def sample(
        self,
        ready_indices: Sequence[int],
        batch_size: int,
        *,
        num_n_samples: int = 1,
        group_ids: Mapping[int, Any] | None = None,
        **kwargs: Any,
    ) -> Selection:
        self.check_request(batch_size, num_n_samples=num_n_samples)
        size = self.num_n_samples or num_n_samples
        wanted = batch_size // size
        if isinstance(ready_indices, ReadyView):
            found, rows = ready_indices.groups(wanted, size)
        else:
            found, rows = _groups_of_list(ready_indices, wanted, size, group_ids)
        if found < wanted:
            raise InsufficientSamples(f"Insufficient ready indices: {found} complete groups of {size}, {wanted} wanted")
        return rows


def _groups_of_list(
    ready: Sequence[int], wanted: int, size: int, group_ids: Mapping[int, Any] | None
) -> tuple[int, Int64s]:
    """Groups of a plain list: by id where given, else by index in blocks of `size`; complete at `size` rows."""
    members: dict[Any, list[int]] = {}
    for index in ready:
        group = None if group_ids is None else group_ids.get(index)
        members.setdefault(("at", index // size) if group is None else ("id", group), []).append(index)
    complete = [rows for rows in members.values() if len(rows) == size][:wanted]
    return len(complete), np.array([index for rows in complete for index in rows], dtype=np.int64)
