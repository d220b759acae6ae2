"""Rows set apart for the ranks of a data-parallel draw, until each rank is done with its slice."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.ledger.assignments import Assignment, Assignments
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.table import RowTable

Int64s: TypeAlias = NDArray[np.int64]


class Reserving:
    """Keeps the reserved column of the table and the ready sets in step with the assignments."""

    def __init__(self, table: RowTable, assignments: Assignments) -> None:
        self._table = table
        self._assignments = assignments

    def reserve(self, partition: Partition, task: str, rows: Int64s) -> None:
        column = self._table.task(task)
        column.consumed[rows] = 0
        column.reserved[rows] = True
        partition.take(task, rows)

    def unreserve(self, partition: Partition, task: str, rows: Int64s) -> None:
        """Consumed rows stay consumed, the others are ready again."""
        self._table.task(task).reserved[rows] = False
        partition.give_back(task, rows)

    def complete(self, partition: Partition, task: str, assignment: Assignment) -> bool:
        """No rank is waited for: the rows are consumed. Returns whether some were only shown and are back."""
        rows = self._table.alive(assignment.held)
        marked = np.isin(rows, assignment.consumed)
        assignment.held = self._table.handle(rows[marked])
        self._table.task(task).consumed[rows[marked]] = 1
        self.unreserve(partition, task, rows)
        return not bool(marked.all())

    def break_slices(self, partition: Partition, task: str, assignment: Assignment) -> None:
        """A slice that no rank has is not delivered if rows of it are gone, or too old: the rest goes back."""
        missing = assignment.missing
        for rank in missing:
            if rank in assignment.leased:
                continue
            part = assignment.slice_of(rank)
            rest = self._table.alive(part)
            if len(rest) < len(part.rows) or self._table.outdated(rest).any():
                assignment.broken.add(rank)
                held = self._table.alive(assignment.held)
                undone = np.setdiff1d(np.intersect1d(held, rest), np.fromiter(assignment.acked, np.int64))
                assignment.held = self._table.handle(np.setdiff1d(held, undone))
                self.unreserve(partition, task, undone)
        if missing and not assignment.missing:
            self.complete(partition, task, assignment)

    def give_up(self, partition: Partition, task: str, assignment: Assignment) -> None:
        """Nobody will ask for this batch, which has one slice, any more: if no rank got it, it is ready again."""
        if assignment.missing:
            assignment.broken.add(0)
            self.unreserve(partition, task, self._table.alive(assignment.held))

    def after_clear(self, partition: Partition) -> None:
        """Rows of the partition are gone: settle the assignments that had them."""
        for task, assignment in self._assignments.of_partition(partition.name):
            self.break_slices(partition, task, assignment)
        self._assignments.forget_cleared(partition.name)
