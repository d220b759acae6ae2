"""Where the rows of a meta lie in the storage units, as far as it is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transfer_queue.metadata.columns import Int64s, Packed, Rows, pack, unpack


@dataclass(frozen=True, slots=True, eq=False)
class FieldLocation:
    """Row i of each named field is slot `slots[i]` of block `blocks[i]`."""

    fields: tuple[str, ...]
    blocks: Int64s  # [B]
    slots: Int64s  # [B]

    def take(self, rows: Rows) -> FieldLocation:
        return FieldLocation(self.fields, self.blocks[rows], self.slots[rows])

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.fields, pack(self.blocks), pack(self.slots))


Locations = tuple[FieldLocation, ...]  # a field is named at most once; one that is not named has no known location


def _rebuild(fields: tuple[str, ...], blocks: Packed, slots: Packed) -> FieldLocation:
    return FieldLocation(fields, unpack(blocks), unpack(slots))


def take(locations: Locations, rows: Rows) -> Locations:
    return tuple(location.take(rows) for location in locations)


def only(locations: Locations, fields: Iterable[str]) -> Locations:
    """Keep what is known of these fields."""
    wanted = set(fields)
    kept = ((location, tuple(name for name in location.fields if name in wanted)) for location in locations)
    return tuple(FieldLocation(names, location.blocks, location.slots) for location, names in kept if names)


def without(locations: Locations, fields: Iterable[str]) -> Locations:
    gone = set(fields)
    return only(locations, (name for location in locations for name in location.fields if name not in gone))


def concat(pieces: Sequence[Locations]) -> Locations:
    """Put rows behind each other. Only fields that are located in every piece keep a location."""
    by_field = [{name: location for location in piece for name in location.fields} for piece in pieces]
    together: dict[tuple[int, ...], list[str]] = {}
    for name in by_field[0]:
        if all(name in piece for piece in by_field):
            together.setdefault(tuple(id(piece[name]) for piece in by_field), []).append(name)
    joined = []
    for names in together.values():
        parts = [piece[names[0]] for piece in by_field]
        blocks = np.concatenate([part.blocks for part in parts])
        joined.append(FieldLocation(tuple(names), blocks, np.concatenate([part.slots for part in parts])))
    return tuple(joined)
