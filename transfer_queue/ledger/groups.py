"""Groups of rows in one partition, and which of them are complete for one ready set."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.ledger.bits import OrderedBits

Int64s: TypeAlias = NDArray[np.int64]

REMEMBERED = 1 << 14
"""How many aborted groups of a partition are remembered: a row that comes for an earlier one begins a new group."""


@dataclass
class Group:
    """Rows that belong together. Complete when `expected` rows are there, or when sealed."""

    group_id: Hashable
    number: int
    expected: int
    ordinals: Int64s
    sealed: bool = False

    @property
    def size(self) -> int:
        return len(self.ordinals)


class GroupTable:
    """The groups of a partition that were declared by id, numbered in order of appearance."""

    def __init__(self) -> None:
        self._by_id: dict[Hashable, Group] = {}
        self._by_number: dict[int, Group] = {}
        self.aborted: dict[Hashable, None] = {}  # the last ones, in the order in which they were aborted
        self.holes: Int64s = np.empty(0, dtype=np.int64)  # ordinals dropped from groups by position, ascending
        self.next_number = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __getitem__(self, number: int) -> Group:
        return self._by_number[number]

    @property
    def lowest(self) -> int:
        """The smallest number in use (the next one if none is)."""
        return next(iter(self._by_number), self.next_number)

    def get(self, group_id: Hashable) -> Group | None:
        return self._by_id.get(group_id)

    def values(self) -> list[Group]:
        return list(self._by_id.values())

    def check(self, ids: Sequence[Hashable], expected: int, declared: bool) -> None:
        """Raise if rows of these groups may not be added. `declared`: the caller named the expected size."""
        distinct, counts = _distinct(ids)
        for group_id, count in zip(distinct, counts, strict=True):
            if group_id in self.aborted:
                raise StaleSampleError(f"group {group_id!r} was aborted; nothing can be added to it")
            group = self._by_id.get(group_id)
            if group is None and count > expected:
                raise InvalidArgument(f"group {group_id!r} gets {count} rows at once, its size is {expected}")
            if group is not None and group.size + count > group.expected and not group.sealed:
                raise InvalidArgument(
                    f"group {group_id!r} of {group.expected} rows has {group.size}; {count} more do not fit"
                )
            if group is not None and declared and group.expected != expected and not group.sealed:
                raise InvalidArgument(f"group {group_id!r} has group_size {group.expected}, this put says {expected}")
            if group is not None and group.sealed:
                raise InvalidArgument(f"group {group_id!r} is sealed with {group.expected} rows; nothing can be added")

    def add(self, ids: Sequence[Hashable], ordinals: Int64s, expected: int) -> Int64s:
        """Add one row per entry; return the group number of each row. `check` comes first."""
        distinct, _ = _distinct(ids)
        number_of = {}
        for group_id in distinct:
            group = self._by_id.get(group_id)
            if group is None:
                group = Group(group_id, self.next_number, expected, np.empty(0, dtype=np.int64))
                self._by_id[group_id] = self._by_number[self.next_number] = group
                self.next_number += 1
            number_of[group_id] = group.number
        numbers = np.fromiter((number_of[group_id] for group_id in ids), dtype=np.int64, count=len(ids))
        order = np.argsort(numbers, kind="stable")
        found, starts = np.unique(numbers[order], return_index=True)
        for number, rows in zip(found.tolist(), np.split(ordinals[order], starts[1:]), strict=True):
            group = self._by_number[number]
            group.ordinals = np.concatenate([group.ordinals, rows])
        return numbers

    def seal(self, group_id: Hashable) -> Group:
        group = self._known(group_id)
        group.sealed = True
        group.expected = group.size
        return group

    def abort(self, group_id: Hashable) -> Group:
        group = self._known(group_id)
        self.aborted[group_id] = None
        if len(self.aborted) > REMEMBERED:
            del self.aborted[next(iter(self.aborted))]
        return group

    def leave_out(self, ordinals: Int64s) -> None:
        """These rows, which have no group id, were dropped: the groups of their positions settle without them."""
        self.holes = np.union1d(self.holes, ordinals)

    def forget_holes(self, before: int) -> None:
        """Ordinals below this one are not used any more."""
        self.holes = self.holes[np.searchsorted(self.holes, before) :]

    def by_position(self, first: int, size: int) -> Int64s:
        """Ordinals of the group of `size` positions from `first` on."""
        ordinals = np.arange(first, first + size)
        return ordinals if len(self.holes) == 0 else np.setdiff1d(ordinals, self.holes, assume_unique=True)

    def sizes_by_position(self, blocks: Int64s, size: int) -> Int64s:
        """[n]: rows of the groups number `blocks` of `size` positions each; -1 for one that has none left."""
        if len(self.holes) == 0:
            return np.full(len(blocks), size)
        missing = np.searchsorted(self.holes, (blocks + 1) * size) - np.searchsorted(self.holes, blocks * size)
        return np.where(missing < size, size - missing, -1)

    def load(self, groups: list[Group], aborted: list[Hashable], next_number: int, holes: Int64s) -> None:
        """Become a table with these groups, in order of their numbers."""
        self.holes = holes
        self._by_id = {group.group_id: group for group in groups}
        self._by_number = {group.number: group for group in groups}
        self.aborted, self.next_number = dict.fromkeys(aborted), next_number

    def remove(self, numbers: Int64s, ordinals: Int64s) -> None:
        """Forget cleared rows; a group without rows is forgotten with its last one."""
        for number in np.unique(numbers).tolist():
            group = self._by_number[number]
            group.ordinals = np.setdiff1d(group.ordinals, ordinals[numbers == number], assume_unique=True)
            if group.size == 0:
                del self._by_number[number], self._by_id[group.group_id]

    def _known(self, group_id: Hashable) -> Group:
        group = self._by_id.get(group_id)
        if group is None:
            raise StaleSampleError(f"no group {group_id!r} in this partition: never put, or cleared")
        return group


class GroupIndex:
    """Which groups are complete among the ready rows of one ready set, kept up to date row by row.

    Positional groups are blocks of `size` ordinals of rows without a group id. Group numbers are kept relative to the
    first one alive when the index is made, so that its length follows what lives, not what ever lived.
    """

    def __init__(self, table: GroupTable, size: int, first_ordinal: int) -> None:
        self._table = table
        self.size = size
        self._offset = {"declared": table.lowest, "positional": first_ordinal // size}
        self._ready_of = {"declared": np.zeros(0, np.int32), "positional": np.zeros(0, np.int32)}
        self._complete = {"declared": OrderedBits(), "positional": OrderedBits()}

    @property
    def total(self) -> int:
        """Number of complete groups."""
        return self._complete["declared"].total + self._complete["positional"].total

    def change(self, ordinals: Int64s, numbers: Int64s, step: int) -> None:
        """Rows became ready (step 1) or stopped being ready (step -1). `numbers`: their declared groups, or -1."""
        declared = numbers >= 0
        if declared.any():
            self._count("declared", numbers[declared], step)
        if not declared.all():
            self._count("positional", ordinals[~declared] // self.size, step)

    def recheck(self, group: Group) -> None:
        """The expected size of a declared group changed."""
        self._count("declared", np.array([group.number], dtype=np.int64), 0)

    def recheck_positions(self, ordinals: Int64s) -> None:
        """The groups by position that had these rows have fewer now."""
        self._count("positional", np.unique(ordinals // self.size), 0)

    def leads(self, ordinals: Int64s, numbers: Int64s) -> NDArray[np.bool_]:
        """[n] bool: the row is the first one of a complete group. `numbers`: the declared groups, or -1."""
        declared = numbers >= 0
        firsts = np.where(declared, 0, ordinals - ordinals % self.size)
        if len(self._table.holes):
            starts = [self._table.by_position(start, self.size)[:1] for start in firsts[~declared].tolist()]
            firsts[~declared] = [int(start[0]) if len(start) else -1 for start in starts]
        firsts[declared] = [self._table[number].ordinals[0] for number in numbers[declared].tolist()]
        complete = np.where(
            declared,
            self._complete["declared"].contains(numbers - self._offset["declared"]),
            self._complete["positional"].contains(ordinals // self.size - self._offset["positional"]),
        )
        leading: NDArray[np.bool_] = complete & (firsts == ordinals)
        return leading

    def first(self, count: int) -> tuple[int, list[Int64s]]:
        """The first `count` complete groups, or all there are, as lists of ordinals in order of their first row."""
        declared = self._complete["declared"].first(count) + self._offset["declared"]
        found = [self._table[number].ordinals for number in declared.tolist()]
        blocks = self._complete["positional"].first(count) + self._offset["positional"]
        if len(blocks):
            if len(self._table.holes):
                found.extend(self._table.by_position(block * self.size, self.size) for block in blocks.tolist())
            else:
                found.extend(blocks[:, None] * self.size + np.arange(self.size))
            found.sort(key=lambda rows: int(rows[0]))
        return min(count, len(found)), found[:count]

    def _count(self, kind: str, groups: Int64s, step: int) -> None:
        numbers, times = np.unique(groups, return_counts=True)
        touched = numbers - self._offset[kind]
        ready = self._room(kind, int(touched[-1]) + 1)
        ready[touched] += (times * step).astype(np.int32)
        if kind == "positional":
            complete = ready[touched] == self._table.sizes_by_position(numbers, self.size)
        else:
            members = [self._table[number] for number in numbers.tolist()]
            expected = np.array([g.expected if g.size == g.expected else -1 for g in members], dtype=np.int64)
            complete = ready[touched] == expected
        self._complete[kind].add(touched[complete])
        self._complete[kind].discard(touched[~complete])

    def _room(self, kind: str, length: int) -> NDArray[np.int32]:
        counts = self._ready_of[kind]
        if length > len(counts):
            grown = np.zeros(max(length, 2 * len(counts), 64), dtype=np.int32)
            grown[: len(counts)] = counts
            self._ready_of[kind] = counts = grown
        return counts


def _distinct(ids: Sequence[Hashable]) -> tuple[list[Hashable], list[int]]:
    counts: dict[Hashable, int] = {}
    for group_id in ids:
        counts[group_id] = counts.get(group_id, 0) + 1
    return list(counts), list(counts.values())
