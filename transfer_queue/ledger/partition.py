"""One partition: its rows in allocation order, its keys, groups, fields and ready sets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger.groups import Group, GroupTable
from transfer_queue.ledger.ready import ReadySet
from transfer_queue.ledger.table import NO_GROUP, RowTable
from transfer_queue.messages import ColumnSpec

Int64s: TypeAlias = NDArray[np.int64]

_COMPACT_FROM = 4096
_QUARANTINED = 100
_LARGEST_GROUP = 1 << 16  # a group by position may begin before the first row that is left


@dataclass
class FieldState:
    """What is known of a field while any row of the partition has it."""

    spec: ColumnSpec
    rows: int
    produced_at: float
    produced_by: str


@dataclass
class TaskAccount:
    """Counters of one task in one partition that the table alone cannot tell any more."""

    consumed_and_cleared: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    leases: Counter[str] = field(default_factory=Counter)  # rows granted, and how they were settled
    redelivered: int = 0  # rows handed out again after a lease had run out


class Partition:
    """Rows are ordered by allocation; a row's ordinal in that order is fixed until it is cleared."""

    def __init__(self, name: str, number: int, table: RowTable, step: int | None = None) -> None:
        self.name = name
        self.number = number
        self.step = step
        self.base = 0
        self.indexes: Int64s = np.empty(0, dtype=np.int64)
        self.length = 0  # ordinals handed out so far, minus base
        self.live = 0
        self._leading = 0  # length of the run of cleared ordinals at the start
        self.inserted = 0
        self.sealed = False  # no more rows come
        self.expected = 0  # rows that it was said to get when it began
        self.keys: dict[str, int] = {}
        self.groups = GroupTable()
        self.fields: dict[str, FieldState] = {}
        self.accounts: dict[str, TaskAccount] = {}
        self.dropped: Counter[str] = Counter()
        self.lost: dict[str, set[int]] = {}  # field -> rows whose data went with a storage unit
        self.quarantined: list[dict[str, Any]] = []
        self.stale: dict[str, Counter[str]] = {"by_producer": Counter(), "by_source": Counter()}  # rows dropped as such
        self.ready: dict[tuple[str, tuple[str, ...]], ReadySet] = {}
        self._table = table

    # ------------------------------------------------------------ rows

    def append(self, rows: Int64s) -> Int64s:
        """Give new rows the next ordinals."""
        needed = self.length + len(rows)
        if needed > len(self.indexes):
            grown = np.full(max(needed, 2 * len(self.indexes), 64), -1, dtype=np.int64)
            grown[: self.length] = self.indexes[: self.length]
            self.indexes = grown
        self.indexes[self.length : needed] = rows
        ordinals = np.arange(self.length, needed, dtype=np.int64) + self.base
        self.length = needed
        self.live += len(rows)
        self.inserted += len(rows)
        return ordinals

    def rows(self) -> Int64s:
        """Global indexes of all rows in allocation order."""
        alive = self.indexes[: self.length]
        return alive[alive >= 0]

    def ordinals(self, rows: Int64s) -> Int64s:
        """Ordinals of rows of this partition; anything for other numbers."""
        return self._table.ordinal.take(rows, mode="clip")

    def rows_at(self, ordinals: Int64s) -> Int64s:
        return self.indexes[ordinals - self.base]

    def owns(self, rows: Int64s) -> NDArray[np.bool_]:
        """[n] bool: the slot exists and holds a row of this partition."""
        inside = (rows >= 0) & (rows < self._table.capacity)
        own: NDArray[np.bool_] = inside & (self._table.partition.take(rows, mode="clip") == self.number)
        return own

    def group_numbers(self, positions: Int64s) -> Int64s:
        """Declared group of the rows at these positions (ordinal - base), -1 for none."""
        if len(self.groups) == 0:
            return np.full(len(positions), NO_GROUP, dtype=np.int64)
        return self._table.group[self.indexes[positions]]

    def remove(self, rows: Int64s, reason: str) -> None:
        """Forget rows and account for them; the table's arrays still hold their status."""
        ordinals = self.ordinals(rows)
        for ready in self.ready.values():
            ready.discard(ordinals)
        numbers = self._table.group[rows]
        if (numbers != NO_GROUP).any():
            declared = numbers != NO_GROUP
            self.groups.remove(numbers[declared], ordinals[declared])
        for index in rows.tolist() if self.keys else ():
            key = self._table.keys.pop(index, None)
            if key is not None:
                del self.keys[key]
        self._account(rows, reason)
        self._find_again(list(self.lost), rows)
        for name in [name for name, state in self.fields.items() if self._lose_field(name, state, rows)]:
            del self.fields[name]
        self.indexes[ordinals - self.base] = -1
        self.live -= len(rows)
        self._compact()

    def used(self, rows: Int64s) -> NDArray[np.bool_]:
        """[n] bool: every task that asked for rows of the partition consumed this one; False if none has asked."""
        done = np.full(len(rows), bool(self.accounts))
        for task in self.accounts:
            column = self._table.tasks.get(task)
            done &= False if column is None else column.consumed[rows] == 1
        return done

    def _lose_field(self, name: str, state: FieldState, rows: Int64s) -> bool:
        state.rows -= int(self._table.columns[name].ready[rows].sum())
        return state.rows == 0

    def _account(self, rows: Int64s, reason: str) -> None:
        self.dropped[reason] += len(rows)
        for task, account in self.accounts.items():
            consumed = int(self._table.task(task).consumed[rows].sum())
            account.consumed_and_cleared += consumed
            if len(rows) > consumed:
                account.dropped[reason] += len(rows) - consumed

    def _compact(self) -> None:
        """Drop the leading cleared ordinals once they are the larger part; amortised O(1) per row."""
        step = 64
        while self._leading < self.length and self.indexes[self._leading] < 0:
            ahead = self.indexes[self._leading : min(self._leading + step, self.length)] >= 0
            self._leading += int(ahead.argmax()) if ahead.any() else len(ahead)
            step *= 2
        if self.length < _COMPACT_FROM or self._leading <= self.length // 2:
            return
        self.indexes = self.indexes[self._leading : self.length].copy()
        self.base += self._leading
        self.length -= self._leading
        self._leading = 0
        self.groups.forget_holes(self.base - _LARGEST_GROUP)
        self.ready.clear()

    # ------------------------------------------------------------ groups

    def recheck_group(self, group: Group) -> None:
        """The group is complete with another number of rows than before."""
        for ready in self.ready.values():
            for index in ready.group_indexes():
                index.recheck(group)

    def recheck_positions(self, ordinals: Int64s) -> None:
        """Rows without a group id are gone, and the groups of their positions settle without them."""
        for ready in self.ready.values():
            for index in ready.group_indexes():
                index.recheck_positions(ordinals)

    def shrink_groups(self, rows: Int64s) -> list[Group]:
        """The rows will be dropped: their groups are complete without them. Returns the groups that go on."""
        loose = self.ordinals(rows[self._table.group[rows] == NO_GROUP])
        if len(loose):
            self.groups.leave_out(loose)
        numbers, counts = np.unique(self._table.group[rows], return_counts=True)
        shrunk = []
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number != NO_GROUP:
                group = self.groups[number]
                group.expected -= count
                if group.size > count:
                    shrunk.append(group)
        return shrunk

    def remember_quarantined(self, rows: Int64s) -> None:
        """Note what rows were that nobody could finish, before they are dropped; the last hundred are kept."""
        for row in rows.tolist():
            holders = {task: column.returns[row] for task, column in self._table.tasks.items() if row in column.returns}
            known = {"global_index": row, "generation": int(self._table.generation[row])}
            known |= {"key": self._table.keys.get(row), "group_id": self.group_id(row), "given_back_by": holders}
            self.quarantined.append(known)
        del self.quarantined[:-_QUARANTINED]

    # ------------------------------------------------------------ fields

    def check_columns(self, columns: Iterable[ColumnSpec]) -> None:
        """A field keeps its tensor dtype as long as any row of the partition has it."""
        for spec in columns:
            known = self.fields.get(spec.name)
            if known is not None and None not in (known.spec.dtype, spec.dtype) and known.spec.dtype != spec.dtype:
                raise InvalidArgument(
                    f"field {spec.name!r} of partition {self.name!r} holds {known.spec.dtype}, this put brings "
                    f"{spec.dtype}; convert it, or use another field name"
                )

    def lose_field(self, name: str, rows: Int64s) -> None:
        """The data of a field of these rows is gone; before the table's arrays say so."""
        ordinals = self.ordinals(rows)
        for ready in self.ready.values():
            if name in ready.fields:
                ready.discard(ordinals)
        self.lost.setdefault(name, set()).update(rows.tolist())
        if self._lose_field(name, self.fields[name], rows):
            del self.fields[name]

    def _find_again(self, fields: Iterable[str], rows: Int64s) -> None:
        """Rows whose data was lost got it anew, or are gone."""
        for name in fields:
            if name in self.lost:
                self.lost[name].difference_update(rows.tolist())
                if not self.lost[name]:
                    del self.lost[name]

    def add_column(self, spec: ColumnSpec, new_rows: int, now: float, client: str) -> None:
        """Rows got the field; the description keeps a shape only while all rows share it."""
        known = self.fields.get(spec.name)
        if known is None:
            self.fields[spec.name] = FieldState(spec, new_rows, now, client)
            return
        known.spec = merged_spec(known.spec, spec)
        known.rows += new_rows
        known.produced_at, known.produced_by = now, client

    # ------------------------------------------------------------ ready sets

    def ready_set(self, task: str, fields: tuple[str, ...]) -> ReadySet:
        """The ready set of a task and field set; made by one scan at its first use."""
        key = ready_key(task, fields)
        found = self.ready.get(key)
        if found is None:
            self.account(task)
            found = self.ready[key] = ReadySet(self, task, key[1])
            self._offer(found, self.rows())
        return found

    def refresh(self, rows: Int64s, fields: tuple[str, ...]) -> None:
        """The rows got these fields: tell the ready sets that ask for any of them."""
        if self.lost:
            self._find_again(fields, rows)
        changed = set(fields)
        for ready in self.ready.values():
            if not changed.isdisjoint(ready.fields):
                self._offer(ready, rows)

    def offer_new(self, rows: Int64s, fields: tuple[str, ...]) -> None:
        """The rows were inserted with these fields, in one run: tell the ready sets that ask for no others."""
        ordinals = self.ordinals(rows)
        for ready in self.ready.values():
            if ready.fields.issubset(fields):
                ready.add_new(ordinals)

    def take(self, task: str, rows: Int64s) -> None:
        """The rows are consumed or reserved by the task now."""
        ordinals = self.ordinals(rows)
        for ready in self.ready_of(task):
            ready.discard(ordinals)

    def give_back(self, task: str, rows: Int64s) -> None:
        """The rows are neither consumed nor reserved by the task any more."""
        for ready in self.ready_of(task):
            self._offer(ready, rows)

    def withhold(self, rows: Int64s) -> None:
        """No task gets these rows any more that has not got them yet."""
        ordinals = self.ordinals(rows)
        for ready in self.ready.values():
            ready.discard(ordinals)

    def ready_of(self, task: str) -> list[ReadySet]:
        return [ready for (name, _), ready in self.ready.items() if name == task]

    def _offer(self, ready: ReadySet, rows: Int64s) -> None:
        rows = rows[self._table.available(rows, ready.fields, self._table.task(ready.task))]
        ready.add(self.ordinals(rows))

    def account(self, task: str) -> TaskAccount:
        """The counters of a task; rows that went before it was first seen count as dropped for it."""
        found = self.accounts.get(task)
        if found is None:
            found = self.accounts[task] = TaskAccount()
            gone = self.inserted - self.live
            if gone:
                found.dropped["cleared_before_task"] = gone
        return found

    def group_id(self, row: int) -> Hashable | None:
        number = int(self._table.group[row])
        return None if number == NO_GROUP else self.groups[number].group_id

    def __repr__(self) -> str:
        tasks = ", ".join(sorted(self.accounts)) or "no task yet"
        return f"<Partition {self.name}: {self.live} samples, {len(self.fields)} fields, {tasks}>"


def ready_key(task: str, fields: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Names a ready set within a partition, whatever the order in which the fields were asked for."""
    return task, tuple(sorted(fields))


def merged_spec(known: ColumnSpec, new: ColumnSpec) -> ColumnSpec:
    """One description of a field for rows that came by several puts."""
    if (known.layout, known.dtype, known.shape) == (new.layout, new.dtype, new.shape):
        return known
    tensors = known.dtype is not None and known.dtype == new.dtype
    return ColumnSpec(
        name=new.name, layout="shaped" if tensors else "object", dtype=new.dtype if tensors else None, shape=None
    )
