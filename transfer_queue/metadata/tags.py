"""The tags of the rows of a meta, and which of their entries changed since they were fetched.

A tag travels back to the controller as the entries that changed here: those named in an update, and those that
differ from what was fetched. So a late writer reverts nothing that it did not touch.

Until a caller looks at the tags they are what was fetched and what changed, two lists whose dicts are never written
to: metas are cut, joined and pickled without touching a dict. From then on the caller's own dicts count, and changes
are told by comparing.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeAlias

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.metadata.columns import Rows, pick
from transfer_queue.metadata.values import copy_tag, same_value

Tag: TypeAlias = "dict[str, Any]"
Entries: TypeAlias = "Sequence[Mapping[str, Any] | None]"  # per row; None: no entries

_ALL = slice(None)


class Tags:
    """`size` tags. What is given is taken over, not copied, and never written to; None: nothing."""

    __slots__ = ("_changes", "_fetched", "_live", "size")

    def __init__(self, size: int, fetched: Entries | None = None, changes: Entries | None = None) -> None:
        self.size = size
        self._fetched = fetched
        self._changes = changes
        self._live: list[Tag] | None = None  # the caller's dicts; with them, `_changes` only names entries

    def rows(self) -> list[Tag]:
        """The tags, of which the caller may change entries in place."""
        if self._live is None:
            self._live = [self.row(row) for row in range(self.size)]
        return self._live

    def row(self, row: int) -> Tag:
        """Return a copy of one tag."""
        return copy_tag("tag", self._current(row))

    def assign(self, tags: Entries | None) -> None:
        """Replace all tags; None empties them. Entries that are equal to the fetched ones do not count as changed."""
        if tags is None:
            self._live, self._changes = [{} for _ in range(self.size)], None
        else:
            self._live = self._copies(tags)

    def update(self, tags: Entries) -> None:
        """Merge entries into the tags. They count as changed also when they are equal to the fetched ones."""
        changes = self._copies(tags)
        for tag, change in zip(self._live or (), changes, strict=self._live is not None):
            tag.update(change)
        self._changes = _merged(self._changes, changes)

    def changed(self) -> list[Tag | None]:
        """Per row the entries that changed, as copies; None where nothing did. A removed entry is no change."""
        _, changes = self._parts()
        rows = changes or [None] * self.size
        return [None if entries is None else copy_tag("tag", entries) for entries in rows]

    def mark_sent(self, sent: Entries | None) -> None:
        """These entries have reached the queue: changed is what was changed to something else since."""
        if sent is None:
            return
        entries = self._copies(sent)
        fetched, changes = self._parts()
        self._fetched = _merged(fetched, entries)
        if changes is not None:
            self._changes = _some([_apart(*row) for row in zip(changes, entries, strict=True)])

    def take(self, rows: Rows) -> Tags:
        size = len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows)
        return Tags(size, *self._parts(rows))

    @classmethod
    def concat(cls, pieces: Sequence[Tags]) -> Tags:
        sizes = [piece.size for piece in pieces]
        fetched, changes = zip(*(piece._parts() for piece in pieces), strict=True)
        return cls(sum(sizes), _join(fetched, sizes), _join(changes, sizes))

    def merge(self, other: Tags) -> None:
        """Merge the tags of another handle on the same rows; its entries win, except over changes still to be sent."""
        theirs, their_changes = other._parts()
        if their_changes is None and (theirs is None or theirs is self._fetched):
            return
        fetched, changes = self._parts()
        self._fetched, self._changes = _merged(fetched, theirs), _merged(changes, their_changes)
        self._live = None

    def __eq__(self, other: object) -> bool:
        """Equal tags; what was changed since when does not count."""
        if not isinstance(other, Tags):
            return NotImplemented
        rows = range(self.size)
        return self.size == other.size and all(same_value(self._current(row), other._current(row)) for row in rows)

    __hash__ = None  # type: ignore[assignment]  # compared by content

    def __reduce__(self) -> tuple[Any, ...]:
        return Tags, (self.size, *self._parts())

    def _current(self, row: int) -> Mapping[str, Any]:
        """One tag as it is; not to be written to."""
        if self._live is not None:
            return self._live[row]
        fetched = None if self._fetched is None else self._fetched[row]
        change = None if self._changes is None else self._changes[row]
        return {**(fetched or {}), **change} if change else fetched or {}

    def _parts(self, rows: Rows = _ALL) -> tuple[Entries | None, Entries | None]:
        """What was fetched and what changed of these rows, neither to be written to."""
        fetched, changes = _pick(self._fetched, rows), _pick(self._changes, rows)
        if self._live is None:
            return fetched, changes
        live = pick(self._checked(self._live), rows)
        if changes is None and fetched is not None and _all_untouched(live, fetched):
            return fetched, None
        none = [None] * len(live)
        told = [_told(*row) for row in zip(live, fetched or none, changes or none, strict=True)]
        return _some([was for was, _ in told]), _some([change for _, change in told])

    def _copies(self, tags: Entries) -> list[Tag]:
        return [copy_tag(f"custom_meta[{row}]", tag) for row, tag in enumerate(self._checked(tags))]

    def _checked(self, tags: Sequence[Any]) -> Sequence[Any]:
        if isinstance(tags, str | bytes | Mapping) or not hasattr(tags, "__len__"):
            raise WrongType(f"custom_meta must be a list of dicts, one per sample, not {type(tags).__name__}")
        if len(tags) != self.size:
            raise InvalidArgument(f"custom_meta has {len(tags)} entries for {self.size} samples: give one per sample")
        return tags


def _pick(entries: Entries | None, rows: Rows) -> Entries | None:
    if entries is None or (isinstance(rows, slice) and rows == _ALL):
        return entries
    return pick(entries, rows)


def _some(entries: list[Any]) -> list[Any] | None:
    """None if no row has any."""
    return None if entries.count(None) == len(entries) else entries


def _join(columns: Sequence[Entries | None], sizes: Sequence[int]) -> Entries | None:
    if all(column is None for column in columns):
        return None
    return [entry for column, size in zip(columns, sizes, strict=True) for entry in column or [None] * size]


def _merged(older: Entries | None, newer: Entries | None) -> Entries | None:
    """Row by row; the newer entries win."""
    if older is None or newer is None:
        return older if newer is None else _some([entries or None for entries in newer])
    return [{**(was or {}), **now} if now else was for was, now in zip(older, newer, strict=True)]


def _told(tag: Any, fetched: Mapping[str, Any] | None, named: Mapping[str, Any] | None) -> tuple[Any, Tag | None]:
    """Tell a tag of the caller apart: what it still has of the fetched entries, and what changed."""
    if not named and _untouched(tag, fetched):
        return fetched, None
    live, before, names = copy_tag("the custom_meta of a sample", tag), fetched or {}, named or {}
    change = {key: value for key, value in live.items() if key in names or _differs(value, key, before)}
    kept = fetched if before.keys() <= live.keys() else {key: value for key, value in before.items() if key in live}
    return kept, change or None


def _all_untouched(tags: Sequence[Any], fetched: Sequence[Any]) -> bool:
    """What `_untouched` says of every row, at half the cost; no if any of them is no dict."""
    try:
        if list(map(len, tags)) != list(map(len, fetched)):
            return False
        values = (chain.from_iterable(map(dict.values, column)) for column in (tags, fetched))
        same_values = all(map(operator.is_, *values))
    except TypeError:
        return False
    return same_values and list(chain.from_iterable(tags)) == list(chain.from_iterable(fetched))


def _untouched(tag: Any, fetched: Mapping[str, Any] | None) -> bool:
    """Surely as fetched: the very same values. Quick, and wrong only about equal values in other objects."""
    if not tag or not fetched:
        return not fetched and type(tag) is dict and not tag
    if type(tag) is not dict or list(tag) != list(fetched):
        return False
    return all(map(operator.is_, tag.values(), fetched.values()))


def _apart(change: Mapping[str, Any] | None, sent: Tag) -> Tag | None:
    """The changed entries that are not what was sent."""
    return {key: value for key, value in (change or {}).items() if _differs(value, key, sent)} or None


def _differs(value: Any, key: str, before: Mapping[str, Any]) -> bool:
    return key not in before or not same_value(value, before[key], exact=True)
