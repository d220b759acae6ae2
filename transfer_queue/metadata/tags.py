"""The tags of the rows of a meta, and which of their entries changed since they were fetched.

A tag travels back to the controller as the entries that changed here: those named in an update, and those that
differ from what was fetched. So a late writer reverts nothing that it did not touch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.metadata.columns import Rows, pick
from transfer_queue.metadata.values import copy_tag, same_value

Tag = dict[str, Any]


class Tags:
    """`size` tags. `fetched` is taken over, not copied, and never written to; None: nothing was fetched."""

    __slots__ = ("_fetched", "_live", "_named", "size")

    def __init__(self, size: int, fetched: Sequence[Mapping[str, Any] | None] | None = None) -> None:
        self.size = size
        self._fetched = fetched
        self._live: list[Tag] | None = None  # made at the first access; None: as fetched
        self._named: list[set[str]] | None = None  # entries that an update named, whatever their value

    def rows(self) -> list[Tag]:
        """The tags, of which the caller may change entries in place."""
        if self._live is None:
            self._live = [copy_tag("tag", tag) for tag in self._fetched or [None] * self.size]
        return self._live

    def row(self, row: int) -> Tag:
        """Return a copy of one tag."""
        source: Sequence[Mapping[str, Any] | None] | None = self._fetched if self._live is None else self._live
        return copy_tag("tag", None if source is None else source[row])

    def assign(self, tags: Sequence[Mapping[str, Any] | None] | None) -> None:
        """Replace all tags; None empties them. Entries that are equal to the fetched ones do not count as changed."""
        if tags is None:
            self._live, self._named = [{} for _ in range(self.size)], None
            return
        self._live = [copy_tag(f"custom_meta[{row}]", tag) for row, tag in enumerate(self._checked(tags))]

    def update(self, tags: Sequence[Mapping[str, Any] | None]) -> None:
        """Merge entries into the tags. They count as changed also when they are equal to the fetched ones."""
        changes = [copy_tag(f"custom_meta[{row}]", tag) for row, tag in enumerate(self._checked(tags))]
        if self._named is None:
            self._named = [set() for _ in range(self.size)]
        for live, named, change in zip(self.rows(), self._named, changes, strict=True):
            live.update(change)
            named.update(change)

    def changed(self) -> list[Tag | None]:
        """Per row the entries that changed, as copies; None where nothing did. A removed entry is no change."""
        if self._live is None:
            return [None] * self.size
        fetched = self._fetched or [None] * self.size
        named = self._named or [set()] * self.size
        return [_changes(*row) for row in zip(self._live, fetched, named, strict=True)]

    def mark_sent(self) -> None:
        """From now on changes count against the tags as they are."""
        if self._live is not None:
            self._fetched, self._named = [copy_tag("tag", tag) for tag in self._live], None

    def take(self, rows: Rows) -> Tags:
        if isinstance(rows, slice) and rows == slice(None):
            part = Tags(self.size, self._fetched)
        else:
            part = Tags(len(range(self.size)[rows]) if isinstance(rows, slice) else len(rows))
            part._fetched = None if self._fetched is None else pick(self._fetched, rows)
        if self._live is not None:
            part._live = [copy_tag("tag", tag) for tag in pick(self._live, rows)]
        if self._named is not None:
            part._named = [set(names) for names in pick(self._named, rows)]
        return part

    @classmethod
    def concat(cls, pieces: Sequence[Tags]) -> Tags:
        joined = cls(sum(piece.size for piece in pieces))
        if any(piece._fetched is not None for piece in pieces):
            joined._fetched = [tag for piece in pieces for tag in piece._fetched or [None] * piece.size]
        if any(piece._live is not None for piece in pieces):
            joined._live = [copy_tag("tag", tag) for piece in pieces for tag in piece.rows()]
        if any(piece._named is not None for piece in pieces):
            joined._named = [set(names) for piece in pieces for names in piece._named or [set()] * piece.size]
        return joined

    def merge(self, other: Tags) -> None:
        """Merge the tags of another handle on the same rows; its entries win, except over changes still to be sent."""
        if other._live is None and (other._fetched is None or other._fetched is self._fetched):
            return
        none = [None] * self.size
        fetched = _merged(self._fetched or none, other._fetched or none)
        changes = _merged(self.changed(), other.changed())
        self._live = [{**copy_tag("tag", tag), **change} for tag, change in zip(fetched, changes, strict=True)]
        self._fetched, self._named = fetched, [set(change) for change in changes]

    def __eq__(self, other: object) -> bool:
        """Equal tags; what was changed since when does not count."""
        if not isinstance(other, Tags):
            return NotImplemented
        return self.size == other.size and all(same_value(self.row(i), other.row(i)) for i in range(self.size))

    __hash__ = None  # type: ignore[assignment]  # compared by content

    def _checked(self, tags: Sequence[Mapping[str, Any] | None]) -> Sequence[Mapping[str, Any] | None]:
        if isinstance(tags, str | bytes | Mapping) or not hasattr(tags, "__len__"):
            raise WrongType(f"custom_meta must be a list of dicts, one per sample, not {type(tags).__name__}")
        if len(tags) != self.size:
            raise InvalidArgument(f"custom_meta has {len(tags)} entries for {self.size} samples: give one per sample")
        return tags


def _merged(older: Sequence[Mapping[str, Any] | None], newer: Sequence[Mapping[str, Any] | None]) -> list[Tag]:
    return [{**(was or {}), **(now or {})} for was, now in zip(older, newer, strict=True)]


def _changes(live: Tag, fetched: Mapping[str, Any] | None, named: set[str]) -> Tag | None:
    before: Mapping[str, Any] = fetched or {}
    changes = {key: value for key, value in live.items() if key in named or _differs(value, key, before)}
    return copy_tag("tag", changes) if changes else None


def _differs(value: Any, key: str, before: Mapping[str, Any]) -> bool:
    return key not in before or type(value) is not type(before[key]) or not same_value(value, before[key])
