"""Draws split over data-parallel ranks: who got which slice, until all have theirs and the rows are cleared.

A batch that a sampler keeps for one rank is such a draw with one slice: it is reserved from the moment at which it is
dealt, consumed when the rank has it, handed out again, and forgotten when a row of it is cleared.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, SamplerError, StaleSampleError
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.selection import Plan, Split
from transfer_queue.ledger.table import Handle, RowTable
from transfer_queue.messages import Draw

Int64s: TypeAlias = NDArray[np.int64]
Key: TypeAlias = tuple[str, Hashable, Any]
"""("named", dp_group_id, batch_index), ("counted", None, number) or ("kept", dp_rank, batch_index)."""

REMEMBERED = 1024
"""How many cleared assignments of a task are remembered, so that a late rank gets an error and not new rows."""


@dataclass
class Assignment:
    """One selection of `batch_size × dp_size` rows, fixed when the first rank asked."""

    key: Key
    dp_size: int
    terms: dict[str, object]  # what all ranks have to agree on
    chosen: Handle
    bounds: list[int]  # rank r gets rows[bounds[r] : bounds[r + 1]] of `chosen`
    consumed: Int64s  # what the sampler marks consumed
    held: Handle  # reserved until the assignment is complete; what is consumed by it from then on
    deliveries: Counter[int] = field(default_factory=Counter)  # how often each rank got its slice
    broken: set[int] = field(default_factory=set)  # ranks whose slice lost rows, or got too old, before they came
    done: set[int] = field(default_factory=set)  # ranks that got theirs, and acknowledged it if it was leased
    leased: dict[int, int] = field(default_factory=dict)  # rank -> token of its open lease
    tokens: dict[int, int] = field(default_factory=dict)  # rank -> token of its last lease
    acked: set[int] = field(default_factory=set)  # rows acknowledged by ranks that are not done

    @property
    def missing(self) -> list[int]:
        """Ranks that are waited for."""
        return [rank for rank in range(self.dp_size) if rank not in self.done and rank not in self.broken]

    def slice_of(self, rank: int) -> Handle:
        part = slice(self.bounds[rank], self.bounds[rank + 1])
        return Handle(self.chosen.rows[part], self.chosen.generations[part])


@dataclass
class Turns:
    """Which batch is next for a rank that names no group: its own count, after those that never reached it."""

    count: int = 0
    returned: set[int] = field(default_factory=set)

    @property
    def current(self) -> int:
        return min(self.returned, default=self.count)

    def advance(self) -> None:
        if self.returned:
            self.returned.remove(self.current)
        else:
            self.count += 1


class Assignments:
    """All assignments, by partition, task and group. A group without a name is numbered by each rank's own count.

    `forgotten(partition, task, dp_rank, batch_index)` is told of each kept batch that cannot be handed out again.
    """

    def __init__(self, table: RowTable, forgotten: Callable[[str, str, Any, Any], None]) -> None:
        self._table = table
        self._forgotten = forgotten
        self.by_task: dict[tuple[str, str], dict[Key, Assignment]] = {}
        self.turns: dict[tuple[str, str, int], Turns] = {}
        self.cleared: dict[str, deque[tuple[str, Key]]] = {}
        self.skipped = False  # the last `find` moved a rank on to its next batch

    def find(self, partition: str, draw: Draw, split: Split) -> Assignment | None:
        """The assignment that the rank asks for, if it exists; raises if the ranks disagree or its slice lost rows.

        A rank without a group name is told once of a batch that was cleared, and goes on with the next one.
        """
        key = self._key(partition, draw.task_name, split)
        found = self.formed(partition, draw.task_name, split)
        if split.kept:
            return found
        if found is None:
            if (partition, key) in self.cleared.get(draw.task_name, ()):
                self._came_too_late(partition, draw, split)
            return None
        for name, mine in _terms(draw, split).items():
            if mine != found.terms[name]:
                raise InvalidArgument(
                    f"ranks of dp_group_id {split.group!r} of task {draw.task_name!r} disagree on {name}: "
                    f"rank {split.rank} asks with {mine!r}, the group was formed with {found.terms[name]!r}"
                )
        if split.rank in found.broken or not self._table.fresh(*found.slice_of(split.rank)).all():
            self._came_too_late(partition, draw, split)
        return found

    def formed(self, partition: str, task: str, split: Split) -> Assignment | None:
        """The assignment that the rank asks for, whatever the terms on which it asks."""
        return self.by_task.get((partition, task), {}).get(self._key(partition, task, split))

    def form(
        self, partition: Partition, draw: Draw, split: Split, rows: Int64s, consumed: Int64s, bounds: list[int]
    ) -> Assignment:
        """Fix a selection for all ranks of the group."""
        made = Assignment(
            self._key(partition.name, draw.task_name, split),
            split.size,
            _terms(draw, split),
            self._table.handle(rows),
            bounds,
            consumed,
            self._table.handle(rows if consumed is rows else np.union1d(rows, consumed)),
        )
        self.by_task.setdefault((partition.name, draw.task_name), {})[made.key] = made
        return made

    def serve(self, partition: str, task: str, split: Split, assignment: Assignment, *, leased: bool) -> bool:
        """Note that the rank has its slice, for good unless it is leased; return whether it had it before."""
        assignment.deliveries[split.rank] += 1
        if not leased:
            assignment.done.add(split.rank)
        if split.group is None:
            self.turns.setdefault((partition, task, split.rank), Turns()).advance()
            self.forget_finished(partition, task, assignment)
        return assignment.deliveries[split.rank] > 1

    def unserve(self, partition: str, task: str, split: Split, assignment: Assignment) -> None:
        """This slice never reached the rank after all."""
        assignment.deliveries -= Counter([split.rank])
        if not assignment.deliveries[split.rank]:
            assignment.done.discard(split.rank)
        if split.group is None:
            self.offer_again(partition, task, assignment, split.rank)
            self.by_task.setdefault((partition, task), {})[assignment.key] = assignment

    def offer_again(self, partition: str, task: str, assignment: Assignment, rank: int) -> None:
        """The rank gets this slice at its next draw; one that names its group asks for it itself."""
        if assignment.key[0] == "counted":
            self.turns.setdefault((partition, task, rank), Turns()).returned.add(assignment.key[2])

    def forget_finished(self, partition: str, task: str, assignment: Assignment) -> None:
        """A group without a name is never asked for again once every rank came and none is waited for."""
        came = len(assignment.deliveries) == assignment.dp_size
        if assignment.key[0] == "counted" and came and not assignment.missing:
            self.by_task.get((partition, task), {}).pop(assignment.key, None)

    def skip(self, partition: str, task: str, split: Split) -> None:
        """A rank without a group name goes on: the samples of its batch are gone, or its slice lost some."""
        found = self.by_task.get((partition, task), {}).get(self._key(partition, task, split))
        if found is None:
            self.turns.setdefault((partition, task, split.rank), Turns()).advance()
        else:
            self.serve(partition, task, split, found, leased=False)

    def of_partition(self, partition: str) -> list[tuple[str, Assignment]]:
        """(task, assignment) of all that are remembered in a partition."""
        books = [(task, book) for (name, task), book in self.by_task.items() if name == partition]
        return [(task, assignment) for task, book in books for assignment in book.values()]

    def forget_cleared(self, partition: str) -> None:
        """Forget the assignments of which no row is left, all but their names, and kept batches that lack a row."""
        for task, assignment in self.of_partition(partition):
            fresh = self._table.fresh(*assignment.chosen)
            if assignment.key[0] == "kept":
                if assignment.broken or not fresh.all():
                    del self.by_task[partition, task][assignment.key]
                    self._forgotten(partition, task, *assignment.key[1:])
            elif not fresh.any():
                del self.by_task[partition, task][assignment.key]
                self.cleared.setdefault(task, deque(maxlen=REMEMBERED)).append((partition, assignment.key))

    def forget(self, partition: str, task: str | None = None) -> None:
        """Drop all assignments of a partition, of one task or of all."""
        for book in [k for k in self.by_task if k[0] == partition and task in (None, k[1])]:
            for kind, *kept in self.by_task.pop(book):
                if kind == "kept":
                    self._forgotten(*book, *kept)
        for turns in [k for k in self.turns if k[0] == partition and task in (None, k[1])]:
            del self.turns[turns]
        for name in [name for name in self.cleared if task in (None, name)]:  # counts start again, names do not
            kept = [(where, key) for where, key in self.cleared[name] if where != partition or key[0] == "named"]
            self.cleared[name] = deque(kept, maxlen=REMEMBERED)

    def _key(self, partition: str, task: str, split: Split) -> Key:
        if isinstance(split.group, tuple):
            return ("kept", split.group[0], split.batch_index)
        if split.group is not None:
            return ("named", split.group, split.batch_index)
        turns = self.turns.get((partition, task, split.rank))
        return ("counted", None, turns.current if turns else 0)

    def _came_too_late(self, partition: str, draw: Draw, split: Split) -> None:
        if split.group is None:
            self.skip(partition, draw.task_name, split)
            self.skipped = True
        named = f"dp_group_id {split.group!r}, batch_index {split.batch_index}"
        which = named if split.group is not None else "its next batch"
        raise StaleSampleError(
            f"samples of {which} were cleared or dropped in partition {partition!r}; rank {split.rank} of task "
            f"{draw.task_name!r} came too late for them"
        )

    def bounds(self, plan: Plan, rows: Int64s) -> list[int]:
        """Where the slice of each rank begins in `rows`, and the end; whole groups stay together."""
        assert plan.split is not None
        ranks = plan.split.size
        starts = np.arange(len(rows) + 1) if plan.group_size is None else self._group_starts(plan.group_size, rows)
        units = len(starts) - 1
        if units % ranks:
            raise SamplerError(
                f"sampler {plan.sampler!r} returned {units} {'rows' if plan.group_size is None else 'groups'}, "
                f"which cannot be split over {ranks} ranks"
            )
        bounds: list[int] = starts[:: units // ranks].tolist()
        return bounds

    def _group_starts(self, size: int, rows: Int64s) -> Int64s:
        """Positions at which a group starts, and the end."""
        declared = self._table.group[rows]
        block = np.where(declared >= 0, declared, -1 - self._table.ordinal[rows] // size)
        return np.concatenate([[0], np.flatnonzero(np.diff(block)) + 1, [len(rows)]])


def _terms(draw: Draw, split: Split) -> dict[str, object]:
    return {
        "dp_size": split.size,
        "batch_size": draw.batch_size,
        "inner sampler": draw.sampler_params.get("sampler"),
        "get_n_samples": draw.get_n_samples,
    }
