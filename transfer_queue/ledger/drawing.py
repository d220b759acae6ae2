"""One draw: find rows, take them, tell where they are; and how to take it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.ledger.assignments import Assignment, Assignments
from transfer_queue.ledger.lookup import Lookup
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.selection import Plan, SamplerBook, Split
from transfer_queue.ledger.table import Handle
from transfer_queue.messages import Draw, Drawn
from transfer_queue.samplers.registry import SamplerLike

Int64s: TypeAlias = NDArray[np.int64]


@dataclass
class DrawRecord:
    """What an answered draw took."""

    partition: str
    draw: Draw
    consumed: Handle
    split: Split | None = None
    assignment: Assignment | None = None
    stirs: bool = False  # the draw gave rows back, or fixed the slices of other ranks: others may be answered now


class Drawing:
    """Serves draws from the ready sets."""

    def __init__(self, rows: Rows, lookup: Lookup, sampler: SamplerLike | None, num_n_samples: int) -> None:
        self._rows = rows
        self._lookup = lookup
        self.samplers = SamplerBook(sampler, num_n_samples)
        self.assignments = Assignments(rows.table)

    def plan(self, draw: Draw, name: str) -> Plan:
        """Check the request; raise if no state of the partition could ever serve it."""
        if not draw.task_name:
            raise InvalidArgument("get_meta needs a task_name: consumption is tracked per task")
        if not draw.fields or not all(isinstance(field, str) for field in draw.fields):
            raise InvalidArgument(f"data_fields must name at least one field, not {draw.fields!r}")
        if isinstance(draw.batch_size, bool) or not isinstance(draw.batch_size, int):
            raise WrongType(f"batch_size must be an int, not {draw.batch_size!r}")
        if draw.batch_size < 1:
            raise InvalidArgument(f"batch_size must be at least 1, not {draw.batch_size}")
        plan = self.samplers.plan(draw)
        if self._rows.step_of(name) is not None and plan.want > self._rows.step_size:
            raise InvalidArgument(
                f"{name!r} holds at most {self._rows.step_size} samples (global_batch_size × num_n_samples); "
                f"a draw of {plan.want} can never be served"
            )
        return plan

    def attempt(self, draw: Draw, plan: Plan, name: str) -> tuple[Drawn, DrawRecord] | None:
        """Serve the draw if that is possible now."""
        partition = self._rows.partitions.get(name)
        if partition is None:
            return None
        if plan.split is not None:
            return self._attempt_split(draw, plan, partition)
        chosen = self._select(draw, plan, partition)
        if chosen is None:
            return None
        rows, consumed = chosen
        self._rows.table.task(draw.task_name).consumed[consumed] = 1
        partition.take(draw.task_name, consumed)
        drawn = self._lookup.describe(name, rows, draw.fields, owners=[partition])
        taken = Handle(rows, drawn.generations) if consumed is rows else self._rows.table.handle(consumed)
        return drawn, DrawRecord(name, draw, taken)

    def _select(self, draw: Draw, plan: Plan, partition: Partition) -> tuple[Int64s, Int64s] | None:
        ready = partition.ready_set(draw.task_name, draw.fields)
        if len(ready) < plan.least:
            return None
        return self.samplers.select(plan, draw, ready, self._rows.table)

    def _attempt_split(self, draw: Draw, plan: Plan, partition: Partition) -> tuple[Drawn, DrawRecord] | None:
        assert plan.split is not None
        assignment = self.assignments.find(partition.name, draw, plan)
        formed = assignment is None
        if assignment is None:
            chosen = self._select(draw, plan, partition)
            if chosen is None:
                return None
            assignment = self.assignments.form(partition, draw, plan, *chosen)
            self._reserve(partition, draw.task_name, assignment.held.rows)
        rows = assignment.slice_of(plan.split.rank).rows
        if not self._rows.table.produced(rows, draw.fields).all():
            return None
        was_complete = not assignment.missing
        replayed = self.assignments.serve(partition.name, draw, plan.split, assignment)
        record = DrawRecord(partition.name, draw, self._rows.table.handle(rows[:0]), plan.split, assignment, formed)
        if not was_complete and not assignment.missing:
            record.stirs |= self._complete(partition, draw.task_name, assignment)
        extra = {"replayed": True} if replayed else {}
        return self._lookup.describe(partition.name, rows, draw.fields, [partition], extra_info=extra), record

    def _reserve(self, partition: Partition, task: str, rows: Int64s) -> None:
        column = self._rows.table.task(task)
        column.consumed[rows] = 0
        column.reserved[rows] = True
        partition.take(task, rows)

    def _complete(self, partition: Partition, task: str, assignment: Assignment) -> bool:
        """No rank is waited for: the rows are consumed. Returns whether some were only shown and are back."""
        table = self._rows.table
        rows = table.alive(assignment.held)
        marked = np.isin(rows, assignment.consumed)
        assignment.held = table.handle(rows[marked])
        table.task(task).consumed[rows[marked]] = 1
        self._unreserve(partition, task, rows)
        return not bool(marked.all())

    def _unreserve(self, partition: Partition, task: str, rows: Int64s) -> None:
        self._rows.table.task(task).reserved[rows] = False
        partition.give_back(task, rows)

    def undo(self, record: DrawRecord) -> None:
        """The answer never arrived: what it took is ready again."""
        partition = self._rows.partitions[record.partition]
        task = record.draw.task_name
        rows = self._rows.table.alive(record.consumed)
        self._rows.table.task(task).consumed[rows] = 0
        partition.give_back(task, rows)
        assignment, split = record.assignment, record.split
        if assignment is None or split is None:
            return
        was_complete = not assignment.missing
        self.assignments.unserve(partition.name, record.draw, split, assignment)
        if was_complete and assignment.missing:
            self._reserve(partition, task, self._rows.table.alive(assignment.held))
        self._break_slices(partition, task, assignment)

    def after_clear(self, partition: Partition) -> None:
        """Rows of the partition are gone: settle the assignments that had them."""
        for task, assignment in self.assignments.of_partition(partition.name):
            self._break_slices(partition, task, assignment)
        self.assignments.forget_cleared(partition.name)

    def _break_slices(self, partition: Partition, task: str, assignment: Assignment) -> None:
        """A slice that lost rows before its rank came is not delivered any more: the rest of it is given back."""
        table = self._rows.table
        missing = assignment.missing
        for rank in missing:
            part = assignment.slice_of(rank)
            rest = table.alive(part)
            if len(rest) < len(part.rows):
                assignment.broken.add(rank)
                held = table.alive(assignment.held)
                assignment.held = table.handle(np.setdiff1d(held, rest))
                self._unreserve(partition, task, np.intersect1d(held, rest))
        if missing and not assignment.missing:
            self._complete(partition, task, assignment)

    def reset(self, name: str, task: str | None) -> int:
        """Forget what a task, or every task, consumed and reserved in a partition; returns how many rows it has."""
        partition = self._rows.partitions.get(name)
        if partition is None:
            return 0
        rows = partition.rows()
        self.assignments.forget(name, task)
        for known in [known for known in partition.accounts if task in (None, known)]:
            column = self._rows.table.task(known)
            column.consumed[rows] = 0
            column.reserved[rows] = False
            partition.give_back(known, rows)
        return len(rows)
