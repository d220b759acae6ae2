"""Whole groups of a fixed size, found in the order of indexes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.samplers.pairs import BatchKeeper


class GRPOGroupNSampler(BatchKeeper):
    """Complete groups of `n_samples_per_prompt` rows.

    Rows that were put with a group id form groups by it. Among the others, in ascending order, n consecutive indexes
    are a group. Groups are handed out by their first index. O(ready rows).
    """

    def __init__(self, n_samples_per_prompt: int = 1) -> None:
        super().__init__()
        self.n_samples_per_prompt = check_positive("n_samples_per_prompt", n_samples_per_prompt)

    def check_request(self, batch_size: int, **kwargs: Any) -> None:
        self._check_size(batch_size)

    def _check_size(self, batch_size: int) -> None:
        if batch_size % self.n_samples_per_prompt:
            raise InvalidArgument(
                f"batch_size ({batch_size}) must be a multiple of n_samples_per_prompt ({self.n_samples_per_prompt})"
            )

    def choose(
        self, ready_indexes: Sequence[int], batch_size: int, *, partition: Any = None, **kwargs: Any
    ) -> Sequence[int]:
        return [index for group in self.groups(ready_indexes, batch_size, partition) for index in group]

    def groups(self, ready_indexes: Sequence[int], batch_size: int, partition: Any) -> list[list[int]]:
        """The first groups that make `batch_size` rows; none if there are not so many."""
        self._check_size(batch_size)
        wanted = batch_size // self.n_samples_per_prompt
        ids = _group_ids(partition, ready_indexes)
        free = sorted(index for index in ready_indexes if index not in ids) if ids else sorted(ready_indexes)
        found = list(self._consecutive(free, wanted))
        if ids:
            found = sorted(found + self._declared(ids), key=lambda group: group[0])[:wanted]
        return found if len(found) == wanted else []

    def _consecutive(self, ordered: list[int], wanted: int) -> Iterator[list[int]]:
        size, at, found = self.n_samples_per_prompt, 0, 0
        while found < wanted and at + size <= len(ordered):
            if ordered[at + size - 1] - ordered[at] == size - 1:
                yield ordered[at : at + size]
                at, found = at + size, found + 1
            else:
                at += 1

    def _declared(self, ids: Mapping[int, Any]) -> list[list[int]]:
        members: dict[Any, list[int]] = {}
        for index in sorted(ids):
            members.setdefault(ids[index], []).append(index)
        return [group for group in members.values() if len(group) == self.n_samples_per_prompt]


def _group_ids(partition: Any, indexes: Sequence[int]) -> Mapping[int, Any]:
    """{index: group id} of the rows that have one, as far as `partition` can tell."""
    look = getattr(partition, "get_group_ids", None)
    ids: Mapping[int, Any] = {} if look is None else look(indexes)
    return ids


def check_positive(name: str, value: Any) -> int:
    """The value, if it is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongType(f"{name} must be an int, not {value!r}")
    if value < 1:
        raise InvalidArgument(f"{name} must be positive, not {value}")
    return value
