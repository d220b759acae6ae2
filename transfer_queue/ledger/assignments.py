"""Draws split over data-parallel ranks: who got which slice, until all have theirs and the rows are cleared."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, SamplerError, StaleSampleError
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.selection import Plan, Split
from transfer_queue.ledger.table import RowTable
from transfer_queue.messages import Draw

Int64s: TypeAlias = NDArray[np.int64]
Key: TypeAlias = tuple[Hashable, ...]

REMEMBERED = 1024
"""How many cleared assignments of a task are remembered, so that a late rank gets an error and not new rows."""


@dataclass
class Assignment:
    """One selection of `batch_size × dp_size` rows, fixed when the first rank asked."""

    dp_size: int
    batch_size: int
    sampler: str
    rows: Int64s
    generations: Int64s
    consumed: Int64s
    bounds: list[int]  # rank r gets rows[bounds[r] : bounds[r + 1]]
    served: set[int] = field(default_factory=set)

    @property
    def complete(self) -> bool:
        return len(self.served) == self.dp_size

    def part(self, rank: int) -> slice:
        return slice(self.bounds[rank], self.bounds[rank + 1])


class Assignments:
    """All assignments, by partition, task and group. A group without a name is numbered by each rank's own count."""

    def __init__(self, table: RowTable) -> None:
        self._table = table
        self._by_task: dict[tuple[str, str], dict[Key, Assignment]] = {}
        self._count: dict[tuple[str, str, int], int] = {}
        self._cleared: dict[str, deque[tuple[str, Key]]] = {}

    def key(self, partition: str, task: str, split: Split) -> Key:
        if split.group is not None:
            return ("named", split.group, split.batch_index)
        return ("counted", self._count.get((partition, task, split.rank), 0))

    def find(self, partition: str, draw: Draw, plan: Plan) -> Assignment | None:
        """The assignment that the rank asks for, if it exists; raises if the ranks disagree or it was cleared."""
        assert plan.split is not None
        key = self.key(partition, draw.task_name, plan.split)
        found = self._by_task.get((partition, draw.task_name), {}).get(key)
        if found is None:
            if (partition, key) in self._cleared.get(draw.task_name, ()):
                raise StaleSampleError(
                    f"the samples of dp_group_id {plan.split.group!r}, batch_index {plan.split.batch_index} were "
                    f"cleared in partition {partition!r}; rank {plan.split.rank} came too late for them"
                )
            return None
        told = (plan.split.size, draw.batch_size, repr(plan.sampler))
        fixed = (found.dp_size, found.batch_size, found.sampler)
        for name, mine, theirs in zip(("dp_size", "batch_size", "inner sampler"), told, fixed, strict=True):
            if mine != theirs:
                raise InvalidArgument(
                    f"ranks of dp_group_id {plan.split.group!r} of task {draw.task_name!r} disagree on {name}: "
                    f"rank {plan.split.rank} asks with {mine}, the group was formed with {theirs}"
                )
        return found

    def form(self, partition: Partition, draw: Draw, plan: Plan, rows: Int64s, consumed: Int64s) -> Assignment:
        """Fix a selection for all ranks of the group."""
        assert plan.split is not None
        made = Assignment(
            plan.split.size,
            draw.batch_size,
            repr(plan.sampler),
            rows,
            self._table.generation[rows],
            consumed,
            self._bounds(plan, rows),
        )
        key = self.key(partition.name, draw.task_name, plan.split)
        self._by_task.setdefault((partition.name, draw.task_name), {})[key] = made
        return made

    def serve(self, partition: str, draw: Draw, split: Split, assignment: Assignment) -> bool:
        """Note that the rank has its slice; return whether it had it before."""
        if split.rank in assignment.served:
            return True
        key = self.key(partition, draw.task_name, split)
        assignment.served.add(split.rank)
        if split.group is None:
            self._count[partition, draw.task_name, split.rank] = int(key[1]) + 1  # type: ignore[call-overload]
            if assignment.complete:
                del self._by_task[partition, draw.task_name][key]
        return False

    def unserve(self, partition: str, draw: Draw, split: Split, assignment: Assignment) -> None:
        """The rank never got its slice after all."""
        assignment.served.discard(split.rank)
        if split.group is None:
            self._count[partition, draw.task_name, split.rank] -= 1
            key = self.key(partition, draw.task_name, split)
            self._by_task.setdefault((partition, draw.task_name), {})[key] = assignment

    def open(self, partition: str, task: str) -> dict[Key, Assignment]:
        """Assignments that some rank has not collected yet."""
        return {key: a for key, a in self._by_task.get((partition, task), {}).items() if not a.complete}

    def after_clear(self, partition: str) -> None:
        """Forget the assignments of which no row is left."""
        for (name, task), book in self._by_task.items():
            if name != partition:
                continue
            memory = self._cleared.setdefault(task, deque(maxlen=REMEMBERED))
            for key in [k for k, a in book.items() if not self._table.fresh(a.rows, a.generations).any()]:
                del book[key]
                if key[0] == "named":
                    memory.append((partition, key))

    def forget(self, partition: str, task: str | None = None) -> None:
        """Drop all assignments of a partition, of one task or of all."""
        for book in [k for k in self._by_task if k[0] == partition and task in (None, k[1])]:
            del self._by_task[book]
        for count in [k for k in self._count if k[0] == partition and task in (None, k[1])]:
            del self._count[count]

    def _bounds(self, plan: Plan, rows: Int64s) -> list[int]:
        assert plan.split is not None
        ranks = plan.split.size
        starts = np.arange(len(rows) + 1)
        if plan.sampler.whole_groups or plan.group_size is not None:
            starts = self._group_starts(plan, rows)
        units = len(starts) - 1
        if units % ranks:
            raise SamplerError(
                f"sampler {plan.sampler!r} returned {units} {'rows' if units == len(rows) else 'groups'}, "
                f"which cannot be split over {ranks} ranks"
            )
        bounds: list[int] = starts[:: units // ranks].tolist() if units else [0] * (ranks + 1)
        return bounds

    def _group_starts(self, plan: Plan, rows: Int64s) -> Int64s:
        """Positions at which a group starts, and the end."""
        declared = self._table.group[rows]
        size = plan.group_size or getattr(plan.sampler, "num_n_samples", None) or 1
        block = np.where(declared >= 0, declared, -1 - self._table.ordinal[rows] // size)
        return np.concatenate([[0], np.flatnonzero(np.diff(block)) + 1, [len(rows)]])
