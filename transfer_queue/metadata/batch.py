"""A handle on samples × fields: what `get_meta` returns, `get_data` reads and `put` updates.

Inside, a meta is a table: one array or coded column per property, one entry per row. Lists and dicts are made
where a caller asks for them, so a meta of many rows is cut, joined and pickled at the cost of a few array copies.

A row is named by its global index and generation; generation -1 means "whichever sample lives there now", and is
what metas have that were written by hand. Locations say where rows lie in the storage units as far as that is
known; a field without one is looked up by the client.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, WrongType, nearest
from transfer_queue.metadata import checks
from transfer_queue.metadata import extra_info as extras
from transfer_queue.metadata import locations as places
from transfer_queue.metadata.columns import Coded, Int64s
from transfer_queue.metadata.custom_meta import HasCustomMeta
from transfer_queue.metadata.leased import HasLeases
from transfer_queue.metadata.leases import Leases
from transfer_queue.metadata.locations import FieldLocation, Locations
from transfer_queue.metadata.rows import Sample, Samples, table_of
from transfer_queue.metadata.schema import (
    FieldSchema,
    Shape,
    UnknownField,
    check_fields,
    schema_of,
    torch_dtype,
)
from transfer_queue.metadata.table import UNKNOWN_GENERATION, Table
from transfer_queue.metadata.tags import Tags
from transfer_queue.metadata.values import same_value


class BatchMeta(HasCustomMeta, HasLeases, extras.HasExtraInfo):
    """B samples × their fields. Everything is optional; given containers are copied; attributes are assignable.

    production_status  int8 [B], writable: all fields of the row are produced; zeros if not given
    custom_meta        one tag (dict) per row; entries changed here are what the next put or `set_custom_meta` sends
    field_schema       {field: {dtype, shape, is_nested, is_non_tensor[, per_sample_shapes]}}, shapes of rows
    samples            rows of other metas, instead of the arguments that describe rows
    """

    def __init__(
        self,
        global_indexes: Iterable[int] = (),
        partition_ids: Iterable[str] = (),
        field_schema: Mapping[str, Mapping[str, Any]] | None = None,
        production_status: Any = None,
        extra_info: Mapping[str, Any] | None = None,
        custom_meta: Sequence[Mapping[str, Any] | None] | None = None,
        _custom_backend_meta: Sequence[Any] | None = None,
        *,
        samples: Iterable[Sample] | None = None,
    ) -> None:
        indexes = checks.as_indexes(global_indexes)
        size = len(indexes)
        self._table = Table(
            indexes=indexes,
            generations=np.full(size, UNKNOWN_GENERATION, np.int64),
            partitions=checks.as_partitions(partition_ids, size),
            status=checks.as_status(production_status, size),
            tags=Tags(size),
            fields=check_fields(field_schema, size),
            backend_meta=checks.as_rows("_custom_backend_meta", _custom_backend_meta, size),
        )
        self._extra_info = extras.checked(extra_info)
        self.update_custom_meta(custom_meta)
        rows = [] if samples is None else list(samples)
        if rows and size:
            raise InvalidArgument(f"give samples ({len(rows)}) or global_indexes ({size}), not both")
        if rows:
            self._table = table_of(rows)

    @classmethod
    def from_columns(
        cls,
        *,
        partition_id: str,
        indexes: Int64s,
        generations: Int64s,
        fields: Mapping[str, FieldSchema],
        produced: NDArray[Any] | None = None,
        locations: Sequence[FieldLocation] = (),
        keys: Sequence[str | None] | None = None,
        tags: Sequence[Mapping[str, Any] | None] | None = None,
        group_ids: Sequence[int | str | None] | None = None,
        extra_info: Mapping[str, Any] | None = None,
        lease_token: int | None = None,
        lease_deadline_s: float | None = None,
    ) -> BatchMeta:
        """Make a meta of what the controller said. Arrays and tags are taken over unchecked and must not be changed.

        `produced` [B] 0/1; None: all 1. `tags` are the state that changes are told from.
        """
        size = len(indexes)
        status = np.empty(size, np.int8) if produced is None else np.array(produced, np.int8)
        if produced is None:
            status.fill(1)
        table = Table(
            indexes=indexes,
            generations=generations,
            partitions=Coded.constant(partition_id, size),
            status=status,
            tags=Tags(size, tags),
            fields={name: fields[name] for name in sorted(fields)},
            locations=tuple(locations),
            keys=None if keys is None else list(keys),
            group_ids=None if group_ids is None else list(group_ids),
            leases=None if lease_token is None else Leases.of(lease_token, lease_deadline_s, size),
        )
        return cls._of(table, extras.checked(extra_info))

    @classmethod
    def empty(cls, extra_info: Mapping[str, Any] | None = None) -> BatchMeta:
        return cls(extra_info=extra_info)

    @classmethod
    def _of(cls, table: Table, extra_info: dict[str, Any]) -> BatchMeta:
        meta = cls.__new__(cls)
        meta._table, meta._extra_info = table, extra_info
        return meta

    # ------------------------------------------------------------ rows

    @property
    def size(self) -> int:
        return len(self._table)

    def __len__(self) -> int:
        return self.size

    @property
    def global_indexes(self) -> list[int]:
        """A new list at each access. Assigning other indexes forgets generations, locations, keys, groups and lease."""
        return list(self._table.indexes.tolist())

    @global_indexes.setter
    def global_indexes(self, values: Iterable[int]) -> None:
        indexes = checks.as_indexes(values)
        checks.check_length("global_indexes", len(indexes), self.size)
        table = self._table
        if not np.array_equal(indexes, table.indexes):
            table.indexes, table.generations = indexes, np.full(self.size, UNKNOWN_GENERATION, np.int64)
            table.locations, table.keys, table.group_ids, table.leases = (), None, None, None

    @property
    def partition_ids(self) -> list[str]:
        """A new list at each access, one entry per row."""
        return self._table.partitions.rows()

    @partition_ids.setter
    def partition_ids(self, values: Iterable[str]) -> None:
        self._table.partitions = checks.as_partitions(values, self.size)

    @property
    def partitions(self) -> tuple[str, ...]:
        """The distinct partitions of the rows, by first appearance."""
        return tuple(self._table.partitions.first_rows())

    @property
    def indexes(self) -> Int64s:
        """Global indexes as an array [B]; not to be written to."""
        return self._table.indexes

    @property
    def generations(self) -> Int64s:
        """[B], -1 where it is not known; not to be written to."""
        return self._table.generations

    @property
    def keys(self) -> list[str | None] | None:
        """Per row its key, or None; None if no row is known to have one."""
        return None if self._table.keys is None else list(self._table.keys)

    @property
    def group_ids(self) -> list[int | str | None] | None:
        """Per row its group, or None; None if no row is known to have one."""
        return None if self._table.group_ids is None else list(self._table.group_ids)

    @property
    def backend_meta(self) -> list[Any] | None:
        """Per row what a storage backend noted about it; None if nothing was noted."""
        return None if self._table.backend_meta is None else list(self._table.backend_meta)

    @property
    def samples(self) -> Samples:
        """Read-only rows."""
        return Samples(self._table)

    # ------------------------------------------------------------ status and fields

    @property
    def production_status(self) -> NDArray[np.int8]:
        return self._table.status

    @production_status.setter
    def production_status(self, status: Any) -> None:
        self._table.status = checks.as_status(status, self.size)

    @property
    def is_ready(self) -> bool:
        """There is at least one row, and all fields of all rows are produced."""
        return self.size > 0 and bool((self._table.status == 1).all())

    @property
    def field_names(self) -> list[str]:
        """Sorted."""
        return list(self._table.fields)

    @property
    def field_schema(self) -> dict[str, dict[str, Any]]:
        """New dicts at each access: to change a column, assign the whole."""
        return {name: schema.as_dict() for name, schema in self._table.fields.items()}

    @field_schema.setter
    def field_schema(self, field_schema: Mapping[str, Mapping[str, Any]] | None) -> None:
        self._table.fields = check_fields(field_schema, self.size)
        self._table.locations = places.only(self._table.locations, self._table.fields)

    @property
    def schemas(self) -> Mapping[str, FieldSchema]:
        """The columns as they are kept, sorted by name; not to be written to."""
        return self._table.fields

    @property
    def locations(self) -> Locations:
        """Where fields lie, as far as it is known for all rows."""
        return self._table.locations

    def get_dtypes(self, field: str) -> list[Any]:
        return [torch_dtype(self._field(field).dtype)] * self.size

    def get_shapes(self, field: str) -> list[Shape | None]:
        """The shape of each row; None where it is not known or the row is no tensor."""
        return self._field(field).shapes(self.size)

    def _field(self, name: str) -> FieldSchema:
        fields = self._table.fields
        if name not in fields:
            raise UnknownField(f"no field {name!r} in this meta{nearest(str(name), fields)}")
        return fields[name]

    def add_fields(self, data: Any, set_all_ready: bool = True) -> BatchMeta:
        """Take over the columns of a TensorDict [B], replacing those of the same name, in place. Nothing is stored."""
        added = schema_of(data)
        if added:
            checks.check_length("data", data.batch_size[0] if data.batch_size else 0, self.size)
            self._table.replace_fields(added, ())
            if set_all_ready:
                self._table.status[:] = 1
        return self

    def add_columns(
        self,
        fields: Mapping[str, FieldSchema],
        locations: Sequence[FieldLocation] = (),
        generations: Int64s | None = None,
    ) -> None:
        """Take over fields that a put wrote for all rows, in place; with a field, all rows are ready."""
        self._table.replace_fields(fields, tuple(locations))
        if generations is not None:
            self._table.generations = generations
        if fields:
            self._table.status[:] = 1

    # ------------------------------------------------------------ cutting

    def __getitem__(self, rows: Any) -> BatchMeta:
        """One row (also negative) or a slice of rows, as a meta."""
        if isinstance(rows, slice):
            return self._cut(rows)
        try:
            row = operator.index(rows)
        except TypeError:
            raise WrongType(f"a meta is indexed by int or slice, not {type(rows).__name__} {rows!r}") from None
        if not -self.size <= row < self.size:
            raise IndexError(f"row {row} of a meta of {self.size} samples")
        return self._cut(slice(row % self.size, row % self.size + 1))

    def select_fields(self, names: Iterable[str]) -> BatchMeta:
        """The same rows with these fields; names that the meta does not have are dropped."""
        return self._of(self._table.only(set(checks.as_names("field names", names))), dict(self._extra_info))

    def select_samples(self, positions: Iterable[int]) -> BatchMeta:
        """The rows at these positions, in this order, repeats included."""
        return self._cut(checks.as_positions(positions, self.size))

    def chunk(self, chunks: int) -> list[BatchMeta]:
        """Cut into exactly `chunks` contiguous pieces; the first `size % chunks` are one longer, some may be empty."""
        return [self._cut(rows) for rows in checks.as_pieces(chunks, self.size)]

    def chunk_by_partition(self) -> list[BatchMeta]:
        """Cut into one piece per partition, by first appearance; rows keep their order."""
        partitions = self._table.partitions
        codes, firsts = partitions.codes, partitions.first_rows().values()
        return [self._cut(np.flatnonzero(codes == codes[first])) for first in firsts]

    def _cut(self, rows: slice | Int64s) -> BatchMeta:
        return self._of(self._table.take(rows), dict(self._extra_info))

    def reorder(self, positions: Iterable[int]) -> None:
        """Put the rows into this order, in place; `positions` name every row once."""
        self._table = self._table.take(checks.as_order(positions, self.size))

    # ------------------------------------------------------------ joining

    @classmethod
    def concat(cls, data: Iterable[BatchMeta | None], validate: bool = True) -> BatchMeta:
        """Put rows behind each other; empty metas and None are skipped.

        With `validate` all must have the same fields with the same dtypes, and agree where they share `extra_info`;
        without, the fields that all have are kept, as the first has them.
        """
        pieces = checks.filled(BatchMeta, data)
        if not pieces:
            return cls()
        extra_info = extras.join([piece._extra_info for piece in pieces], validate)
        return cls._of(Table.concat([piece._table for piece in pieces], validate), extra_info)

    def union(self, other: BatchMeta) -> BatchMeta:
        """Join the fields of two metas on the same rows: where both have something, `other` wins; ready if both are."""
        if not checks.has_rows(BatchMeta, other):
            return self.copy()
        if not self:
            return other.copy()
        joined = self.copy()
        joined._table.merge(other._table)
        joined._extra_info.update(other._extra_info)
        return joined

    def copy(self) -> BatchMeta:
        """A deep copy."""
        table = self._table.take(slice(None))
        table.backend_meta = copy.deepcopy(table.backend_meta)
        return self._of(table, copy.deepcopy(self._extra_info))

    def __deepcopy__(self, memo: dict[int, Any]) -> BatchMeta:
        return self.copy()

    def __eq__(self, other: object) -> bool:
        """The same rows, fields, status, tags and `extra_info`."""
        if not isinstance(other, BatchMeta):
            return NotImplemented
        return self._table.same_rows(other._table) and same_value(self._extra_info, other._extra_info)

    __hash__ = None  # type: ignore[assignment]  # compared by content

    def __repr__(self) -> str:
        if not self:
            return "<BatchMeta: empty>"
        shown = ", ".join(self.field_names) or "none"
        leases = self._table.leases
        leased = "" if leases is None else f", lease {'+'.join(map(str, leases.tokens.first_rows()))}"
        ready = int((self._table.status == 1).sum())
        return f"<BatchMeta {'+'.join(self.partitions)}: {self.size} samples, {ready} ready, fields {shown}{leased}>"
