"""Which keys of a partition are as somebody wants them; kept up to date row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import WrongType
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.rows import Rows
from transfer_queue.messages import WaitKeys
from transfer_queue.metadata.values import same_value

Int64s: TypeAlias = NDArray[np.int64]

_PLAIN = frozenset((str, int, float, bool, type(None)))
_NO_TAG: dict[str, Any] = {}


@dataclass(frozen=True)
class Wish:
    """What a key has to be like: it has `fields`, its tag is as in `where`, it changed after number `since`."""

    fields: tuple[str, ...]
    where: tuple[tuple[str, tuple[Any, ...]], ...]
    since: int | None
    plain: bool = True  # all values of `where` can be compared and hashed

    @classmethod
    def of(cls, request: WaitKeys, since: int | None) -> Wish:
        wrong = [name for name, values in request.where.items() if not isinstance(values, list | tuple)]
        if wrong:
            raise WrongType(
                f"where[{wrong[0]!r}] must be the list of values to look for, not {request.where[wrong[0]]!r}"
            )
        where = tuple((name, tuple(values)) for name, values in request.where.items())
        plain = all(type(value) in _PLAIN for _, values in where for value in values)
        return cls(tuple(sorted(set(request.fields))), where, since, plain)

    def fits(self, tag: dict[str, Any]) -> bool:
        for name, wanted in self.where:
            if name not in tag:
                return False
            value = tag[name]
            if self.plain and type(value) in _PLAIN:
                if value not in wanted:
                    return False
            elif not any(same_value(value, one) for one in wanted):
                return False
        return True


@dataclass(eq=False)
class Match:
    """The rows that are as a wish has it, and who waits for more of them, by order of arrival."""

    wish: Wish
    rows: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)


class Matches:
    """All the matches of one partition. A change costs a look at the tag entries of its rows, not at every match."""

    def __init__(self, rows: Rows, name: str) -> None:
        self._rows = rows
        self._name = name
        self._by_wish: dict[Wish, Match] = {}
        self._all: dict[int, Match] = {}  # by id
        self._by_entry: dict[str, dict[Any, list[Match]]] = {}  # those that want this value of this tag entry first
        self._others: list[Match] = []

    def __bool__(self) -> bool:
        return bool(self._all)

    def find(self, wish: Wish) -> Match | None:
        """The match of an equal wish of somebody else."""
        return self._by_wish.get(wish) if wish.plain else None

    def fill(self, match: Match) -> None:
        """Look at every key."""
        partition = self._rows.partitions.get(self._name)
        if partition is None:
            match.rows = set()
        elif match.wish.since is None:
            every = np.fromiter(partition.keys.values(), np.int64, len(partition.keys))
            match.rows = set(self._fitting(match.wish, every))
        else:
            changed = self._rows.feed.changed_after(match.wish.since)
            match.rows = set(self._fitting(match.wish, changed[partition.owns(changed)]))

    def add(self, match: Match) -> None:
        """Keep it up to date from now on."""
        self._all[id(match)] = match
        if match.wish.plain:
            self._by_wish[match.wish] = match
        if not (match.wish.plain and match.wish.where):
            self._others.append(match)
            return
        name, values = match.wish.where[0]
        entries = self._by_entry.setdefault(name, {})
        for value in dict.fromkeys(values):
            entries.setdefault(value, []).append(match)

    def discard(self, match: Match) -> None:
        del self._all[id(match)]
        if match.wish.plain and self._by_wish.get(match.wish) is match:
            del self._by_wish[match.wish]
        if match in self._others:
            self._others.remove(match)
            return
        name, values = match.wish.where[0]
        for value in dict.fromkeys(values):
            self._by_entry[name][value].remove(match)
            if not self._by_entry[name][value]:
                del self._by_entry[name][value]
        if not self._by_entry[name]:
            del self._by_entry[name]

    def update(self, rows: set[int]) -> list[Match]:
        """These rows changed, or are gone; returns the matches that have more rows now."""
        for match in self._all.values():
            match.rows -= rows
        partition, table = self._rows.partitions.get(self._name), self._rows.table
        more: dict[int, Match] = {}
        if partition is None:
            return []
        for row in rows:
            if row in table.keys and table.partition[row] == partition.number:
                tag = table.tags.get(row, _NO_TAG)
                for match in self._candidates(tag):
                    if self._has(row, match.wish.fields) and match.wish.fits(tag):
                        match.rows.add(row)
                        more[id(match)] = match
        return list(more.values())

    def refill(self) -> list[Match]:
        """Nothing is as it was: no change is known, so that everything counts as new."""
        matches = list(self._all.values())
        for match in matches:
            self.discard(match)
            match.wish = dataclasses.replace(match.wish, since=None)
            self.fill(match)
            self.add(match)
        return matches

    def verified(self, match: Match) -> Int64s:
        """The rows of a match in the order of a listing, [n]; some may have lost a field since they were noted."""
        rows = np.fromiter(match.rows, np.int64, len(match.rows))
        rows = rows[self._rows.table.produced(rows, match.wish.fields)]
        return rows[np.argsort(self._rows.table.ordinal[rows], kind="stable")]

    def fits(self, wish: Wish, partition: Partition, key: str) -> bool:
        """Whether this key is there, and as the wish has it."""
        row = partition.keys.get(key)
        if row is None or (wish.since is not None and not self._rows.feed.has_changed(row, wish.since)):
            return False
        return bool(self._fitting(wish, np.array([row], np.int64)))

    def _candidates(self, tag: dict[str, Any]) -> Iterable[Match]:
        yield from self._others
        for name, value in tag.items():
            entries = self._by_entry.get(name)
            if entries:
                try:
                    yield from entries.get(value, ())
                except TypeError:  # not hashable, so it equals no plain value
                    continue

    def _has(self, row: int, fields: tuple[str, ...]) -> bool:
        columns = self._rows.table.columns
        return all(name in columns and columns[name].ready[row] for name in fields)

    def _fitting(self, wish: Wish, rows: Int64s) -> list[int]:
        """Those with a key, the fields and the tag."""
        table = self._rows.table
        if wish.fields:
            rows = rows[table.produced(rows, wish.fields)]
        keys, tags = table.keys, table.tags
        if not wish.where:
            return [row for row in rows.tolist() if row in keys]
        return [row for row in rows.tolist() if row in keys and wish.fits(tags.get(row, _NO_TAG))]
