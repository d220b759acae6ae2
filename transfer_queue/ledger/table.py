"""The status table: one line per row slot, arrays that double when needed."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import StaleSampleError

Int64s: TypeAlias = NDArray[np.int64]
_Array = TypeVar("_Array", bound=NDArray[Any])

FREE = -1
NO_GROUP = -1
ANY_GENERATION = -1
NO_VERSION = -1


@dataclass
class Column:
    """One field of every slot: is it there, and where. Block and slot are 0 where it is not."""

    number: int
    ready: NDArray[np.int8]  # [capacity] 0/1
    block: Int64s  # [capacity]
    slot: NDArray[np.int32]  # [capacity]

    def write(self, rows: Int64s | slice, slots: Int64s, block: int) -> None:
        """The cells of these rows are there, at these slots of a block."""
        self.ready[rows] = 1
        self.block[rows] = block
        self.slot[rows] = slots


@dataclass
class TaskColumn:
    """One task's view of every slot. Reserved rows belong to a draw that is not finished and count as neither."""

    consumed: NDArray[np.int8]  # [capacity] 0/1
    reserved: NDArray[np.bool_]  # [capacity]
    returns: dict[int, list[str]] = field(default_factory=dict)  # who gave a row back, or let its lease run out
    again: set[int] = field(default_factory=set)  # rows whose lease ran out and that nobody got since

    @property
    def blank(self) -> bool:
        """Nothing is consumed, reserved or known of any row."""
        return not (self.consumed.any() or self.reserved.any() or self.returns or self.again)

    def forget(self, rows: Int64s | slice, every: Iterable[int]) -> None:
        """The rows are gone. `every`: the same ones, one by one."""
        self.consumed[rows] = 0
        self.reserved[rows] = False
        if self.returns:
            for row in every:
                self.returns.pop(row, None)
            self.again.difference_update(every)


class Handle(NamedTuple):
    """Rows, and which of their slots' lives is meant."""

    rows: Int64s
    generations: Int64s


@dataclass
class RowTable:
    """Slots of rows. A slot is reused after its row was cleared; its generation tells the lives apart."""

    capacity: int = 0
    generation: Int64s = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    partition: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))
    ordinal: Int64s = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    group: Int64s = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    version: Int64s = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # of the policy that generated the row
    writer: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, dtype=np.int32))  # who said so, by number
    oldest: int = 0  # rows of lower versions are not handed out any more
    columns: dict[str, Column] = field(default_factory=dict)
    tasks: dict[str, TaskColumn] = field(default_factory=dict)
    keys: dict[int, str] = field(default_factory=dict)
    tags: dict[int, dict[str, Any]] = field(default_factory=dict)

    def grow(self, needed: int) -> None:
        """Make room for slots up to `needed`; amortised O(1) per slot."""
        if needed <= self.capacity:
            return
        size = max(needed, 2 * self.capacity, 1024)
        self.generation = _resized(self.generation, size, 0)
        self.partition = _resized(self.partition, size, FREE)
        self.ordinal = _resized(self.ordinal, size, 0)
        self.group = _resized(self.group, size, NO_GROUP)
        self.version = _resized(self.version, size, NO_VERSION)
        self.writer = _resized(self.writer, size, 0)
        for column in self.columns.values():
            column.ready = _resized(column.ready, size, 0)
            column.block = _resized(column.block, size, 0)
            column.slot = _resized(column.slot, size, 0)
        for task in self.tasks.values():
            task.consumed = _resized(task.consumed, size, 0)
            task.reserved = _resized(task.reserved, size, False)
        self.capacity = size

    def grow_by(self, generations: Int64s) -> None:
        """Make room for so many more slots, which had these generations in an earlier life."""
        if len(generations):
            size = self.capacity
            self.grow(size + len(generations))
            self.generation[size : size + len(generations)] = generations

    def column(self, name: str) -> Column:
        """The column of a field, made at its first appearance."""
        found = self.columns.get(name)
        if found is None:
            size = self.capacity
            found = Column(
                len(self.columns), np.zeros(size, np.int8), np.zeros(size, np.int64), np.zeros(size, np.int32)
            )
            self.columns[name] = found
        return found

    def task(self, name: str) -> TaskColumn:
        """The consumption status of a task, made at its first appearance."""
        found = self.tasks.get(name)
        if found is None:
            found = self.tasks[name] = TaskColumn(np.zeros(self.capacity, np.int8), np.zeros(self.capacity, np.bool_))
        return found

    def produced(self, rows: Int64s, fields: Collection[str]) -> NDArray[np.bool_]:
        """[n] bool: every named field of the row is there; an unknown field is nowhere."""
        there: NDArray[np.bool_] | None = None
        for name in fields:
            column = self.columns.get(name)
            if column is None:
                return np.zeros(len(rows), dtype=np.bool_)
            has = column.ready[rows].view(np.bool_)
            there = has if there is None else np.logical_and(there, has, out=there)
        return np.ones(len(rows), dtype=np.bool_) if there is None else there

    def available(self, rows: Int64s, fields: Collection[str], task: TaskColumn) -> NDArray[np.bool_]:
        """[n] bool: produced, neither consumed nor reserved by the task, and within the version window."""
        free: NDArray[np.bool_] = (task.consumed[rows] == 0) & ~task.reserved[rows]
        if self.oldest:
            free &= ~self.outdated(rows)
        return np.logical_and(self.produced(rows, fields), free)

    def outdated(self, rows: Int64s | slice = slice(None)) -> NDArray[np.bool_]:
        """[n] bool: the row has a version, and it is beyond the window. All slots by default; free ones have none."""
        versions = self.version[rows]
        beyond: NDArray[np.bool_] = (versions != NO_VERSION) & (versions < self.oldest)
        return beyond

    def fresh(self, rows: Int64s, generations: Int64s) -> NDArray[np.bool_]:
        """[n] bool: the slot still holds the row that the handle means."""
        if self.capacity == 0:
            return np.zeros(len(rows), dtype=np.bool_)
        inside = (rows >= 0) & (rows < self.capacity)
        safe = np.where(inside, rows, 0)
        same = (generations == ANY_GENERATION) | (self.generation[safe] == generations)
        alive: NDArray[np.bool_] = np.logical_and(inside & same, self.partition[safe] != FREE)
        return alive

    def handle(self, rows: Int64s) -> Handle:
        return Handle(rows, self.generation[rows])

    def alive(self, handle: Handle) -> Int64s:
        """The rows of a handle that were not cleared since it was made."""
        return handle.rows[self.fresh(*handle)]

    def check_fresh(self, rows: Int64s, generations: Int64s) -> None:
        """Raise `StaleSampleError` naming the rows that were cleared since the handle was made."""
        stale = rows[~self.fresh(rows, generations)]
        if len(stale):
            shown = ", ".join(map(str, stale[:10].tolist())) + (", …" if len(stale) > 10 else "")
            raise StaleSampleError(
                f"{len(stale)} of {len(rows)} samples were cleared since this handle was made "
                f"(global indexes {shown}); draw or look them up again",
                indexes=stale.tolist(),
            )


def _resized(array: _Array, size: int, fill: Any) -> _Array:
    grown = np.full(size, fill, dtype=array.dtype)
    grown[: len(array)] = array
    return grown  # type: ignore[return-value]  # same dtype as the array that came in
