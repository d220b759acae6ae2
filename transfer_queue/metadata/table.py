"""The columns behind a `BatchMeta`, and how rows are cut and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.metadata import leases as holds
from transfer_queue.metadata import locations as places
from transfer_queue.metadata.columns import Coded, Int64s, Rows, pack, pick, unpack
from transfer_queue.metadata.leases import Leases
from transfer_queue.metadata.locations import Locations
from transfer_queue.metadata.schema import FieldSchema
from transfer_queue.metadata.tags import Tags

UNKNOWN_GENERATION = -1


@dataclass(slots=True, eq=False)
class Table:
    """B rows. Columns are shared between tables and replaced, never written to; `status` and `tags` are its own."""

    indexes: Int64s  # [B]
    generations: Int64s  # [B], -1 where unknown
    partitions: Coded[str]  # [B]
    status: NDArray[np.int8]  # [B]
    tags: Tags  # [B]
    fields: dict[str, FieldSchema] = field(default_factory=dict)  # sorted by name
    locations: Locations = ()
    keys: list[str | None] | None = None  # [B]
    group_ids: list[int | str | None] | None = None  # [B]
    backend_meta: list[Any] | None = None  # [B]
    leases: Leases | None = None

    def __len__(self) -> int:
        return len(self.indexes)

    def take(self, rows: Rows) -> Table:
        return Table(
            indexes=self.indexes[rows],
            generations=self.generations[rows],
            partitions=self.partitions.take(rows),
            status=self.status[rows].copy(),
            tags=self.tags.take(rows),
            fields={name: schema.take(rows) for name, schema in self.fields.items()},
            locations=places.take(self.locations, rows),
            keys=None if self.keys is None else pick(self.keys, rows),
            group_ids=None if self.group_ids is None else pick(self.group_ids, rows),
            backend_meta=None if self.backend_meta is None else pick(self.backend_meta, rows),
            leases=None if self.leases is None else self.leases.take(rows),
        )

    def only(self, names: set[str]) -> Table:
        """The same rows with these fields."""
        part = self.take(slice(None))
        part.fields = {name: schema for name, schema in part.fields.items() if name in names}
        part.locations = places.only(part.locations, part.fields)
        return part

    @classmethod
    def concat(cls, pieces: Sequence[Table], validate: bool) -> Table:
        """One behind the other. With `validate`, fields and dtypes must agree; else the fields that all have stay."""
        first, sizes = pieces[0], [len(piece) for piece in pieces]
        if validate:
            _check_fields_agree(pieces)
        fields = {
            name: FieldSchema.concat([piece.fields[name] for piece in pieces], sizes)
            for name in first.fields
            if all(name in piece.fields for piece in pieces)
        }
        located = [places.only(piece.locations, fields) for piece in pieces]
        return cls(
            indexes=np.concatenate([piece.indexes for piece in pieces]),
            generations=np.concatenate([piece.generations for piece in pieces]),
            partitions=Coded.concat([piece.partitions for piece in pieces]),
            status=np.concatenate([piece.status for piece in pieces]),
            tags=Tags.concat([piece.tags for piece in pieces]),
            fields=fields,
            locations=places.concat(located),
            keys=_join([piece.keys for piece in pieces], sizes),
            group_ids=_join([piece.group_ids for piece in pieces], sizes),
            backend_meta=_join([piece.backend_meta for piece in pieces], sizes),
            leases=holds.concat([piece.leases for piece in pieces], sizes),
        )

    def merge(self, other: Table) -> None:
        """Take over fields and tags of another handle on the same rows. `other` wins; a row is ready if both say so."""
        generations = self._common_generations(other)
        self.tags.merge(other.tags)
        self.generations = generations
        self.status = np.minimum(self.status, other.status)
        self.replace_fields(other.fields, other.locations)
        self.keys = _prefer(other.keys, self.keys)
        self.group_ids = _prefer(other.group_ids, self.group_ids)
        self.backend_meta = _prefer(other.backend_meta, self.backend_meta)
        self.leases = self.leases if other.leases is None else other.leases

    def replace_fields(self, newer: Mapping[str, FieldSchema], locations: Locations) -> None:
        joined = {**self.fields, **newer}
        self.fields = {name: joined[name] for name in sorted(joined)}
        self.locations = places.without(self.locations, newer) + locations

    def _common_generations(self, other: Table) -> Int64s:
        """Check that both name the same rows in the same order; return the generations known to either."""
        if not np.array_equal(self.indexes, other.indexes):
            raise InvalidArgument(
                f"global_indexes do not match: {self.indexes.tolist()[:8]} and {other.indexes.tolist()[:8]} "
                f"({len(self)} and {len(other)} samples): select or reorder one like the other"
            )
        if self.partitions != other.partitions:
            raise InvalidArgument(
                f"partition_ids do not match: {self.partitions.rows()[:8]} and {other.partitions.rows()[:8]}"
            )
        known = np.where(other.generations == UNKNOWN_GENERATION, self.generations, other.generations)
        stale = self.indexes[(self.generations != UNKNOWN_GENERATION) & (self.generations != known)].tolist()
        if stale:
            raise StaleSampleError(
                f"samples {stale[:16]} were cleared between the two handles: get both again", indexes=stale
            )
        return known

    def same_rows(self, other: Table) -> bool:
        """Both say the same of the same rows; where those lie does not count."""
        return (
            np.array_equal(self.indexes, other.indexes)
            and np.array_equal(self.generations, other.generations)
            and np.array_equal(self.status, other.status)
            and self.partitions == other.partitions
            and self.fields == other.fields
            and self.tags == other.tags
        )

    def __getstate__(self) -> tuple[Any, ...]:
        status = pack(self.status.astype(np.int64))
        rest = (self.fields, self.locations, self.keys, self.group_ids, self.backend_meta, self.leases)
        return pack(self.indexes), pack(self.generations), self.partitions, status, self.tags, rest

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        indexes, generations, self.partitions, status, self.tags, rest = state
        self.indexes, self.generations = unpack(indexes), unpack(generations)
        self.status = unpack(status).astype(np.int8)
        self.fields, self.locations, self.keys, self.group_ids, self.backend_meta, self.leases = rest


def _check_fields_agree(pieces: Sequence[Table]) -> None:
    first = pieces[0]
    for number, piece in enumerate(pieces):
        if piece.fields.keys() != first.fields.keys():
            apart = sorted(piece.fields.keys() ^ first.fields.keys())
            raise InvalidArgument(
                f"field_names mismatch: piece 0 has {list(first.fields)}, piece {number} has {list(piece.fields)} "
                f"(not in both: {apart}): select the same fields of both first"
            )
        for name, schema in piece.fields.items():
            if schema.dtype != first.fields[name].dtype:
                raise InvalidArgument(
                    f"dtype mismatch in field {name!r}: piece 0 has {first.fields[name].dtype}, "
                    f"piece {number} has {schema.dtype}"
                )


def _join(columns: Sequence[list[Any] | None], sizes: Sequence[int]) -> list[Any] | None:
    if all(column is None for column in columns):
        return None
    return [value for column, size in zip(columns, sizes, strict=True) for value in column or [None] * size]


def _prefer(newer: list[Any] | None, older: list[Any] | None) -> list[Any] | None:
    if newer is None or older is None:
        return older if newer is None else newer
    return [was if now is None else now for was, now in zip(older, newer, strict=True)]
