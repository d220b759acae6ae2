"""Describing rows: where their fields lie, what they look like, what is known of them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, KeyNotFound, UnknownName, nearest
from transfer_queue.ledger.partition import Partition, merged_spec
from transfer_queue.ledger.rows import Rows
from transfer_queue.messages import ANY_GENERATION, ColumnSpec, Drawn, Locate, Location

Int64s: TypeAlias = NDArray[np.int64]


class Lookup:
    """Turns rows into `Drawn` replies."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def locate(self, request: Locate) -> Drawn:
        """Rows by handle, by key or the whole partition, with the fields asked for."""
        name, rows = self._find(request)
        owners = [partition for partition, _ in self._rows.owners(rows)]
        fields = self._fields(request, rows, owners)
        produced = self._rows.table.produced(rows, fields)
        if not produced.all() and not request.allow_missing:
            self._raise_missing(rows, fields)
        return self.describe(name, rows, fields, owners, None if produced.all() else produced.astype(np.int64))

    def describe(
        self,
        name: str,
        rows: Int64s,
        fields: tuple[str, ...],
        owners: list[Partition],
        produced: Int64s | None = None,
        extra_info: dict[str, Any] | None = None,
        lease: tuple[int, float] | None = None,
    ) -> Drawn:
        """Everything a handle on these rows carries. `lease`: its token, and the seconds it lasts."""
        table = self._rows.table
        indexes = rows.tolist() if table.keys or table.tags else []
        grouped = any(len(partition.groups) for partition in owners) and (table.group[rows] >= 0).any()
        return Drawn(
            partition_id=name,
            indexes=rows,
            generations=table.generation[rows],
            fields=fields,
            columns=self._columns(fields, owners),
            locations=self._locations(rows, fields),
            produced=produced,
            keys=tuple(table.keys.get(row) for row in indexes) if table.keys else None,
            tags=tuple(table.tags.get(row) for row in indexes) if table.tags else None,
            group_ids=self._group_ids(rows) if grouped else None,
            extra_info=extra_info or {},
            lease_token=None if lease is None else lease[0],
            lease_s=None if lease is None else lease[1],
        )

    def _find(self, request: Locate) -> tuple[str, Int64s]:
        if request.indexes is not None:
            generations = request.generations
            if generations is None:
                generations = np.full_like(request.indexes, ANY_GENERATION)
            self._rows.table.check_fresh(request.indexes, generations)
            if request.generations is None and request.partition_id is not None:
                self._check_owner(request.indexes, request.partition_id)
            return request.partition_id or "", request.indexes
        name = self._rows.name(request.partition_id, request.global_step)
        partition = self._rows.partitions.get(name)
        if request.keys is None:
            return name, np.empty(0, np.int64) if partition is None else partition.rows()
        known = {} if partition is None else partition.keys
        missing = [key for key in request.keys if key not in known]
        if missing and not request.allow_missing:
            raise KeyNotFound(
                f"{len(missing)} of {len(request.keys)} keys are not in partition {name!r}: {missing[:10]}"
                f"{nearest(missing[0], known)}",
                keys=missing,
            )
        return name, np.array([known[key] for key in request.keys if key in known], dtype=np.int64)

    def _check_owner(self, rows: Int64s, name: str) -> None:
        """Rows named by numbers alone are those of one partition."""
        elsewhere = [partition.name for partition, _ in self._rows.owners(rows) if partition.name != name]
        if elsewhere:
            raise UnknownName(f"of {len(rows)} samples some are not in partition {name!r}, but in {elsewhere[:10]}")

    def _fields(self, request: Locate, rows: Int64s, owners: list[Partition]) -> tuple[str, ...]:
        known = {name: None for partition in owners for name in partition.fields}
        if request.fields is None:
            return tuple(name for name in known if self._rows.table.produced(rows, (name,)).all())
        unknown = [name for name in request.fields if name not in known]
        if unknown and len(rows) and not request.allow_missing:
            where = ", ".join(repr(partition.name) for partition in owners)
            text = f"no field {unknown[0]!r} in partition {where}{nearest(unknown[0], known)}"
            raise UnknownName(text, fields=unknown)
        return request.fields

    def _raise_missing(self, rows: Int64s, fields: tuple[str, ...]) -> None:
        for name in fields:
            lacking = rows[~self._rows.table.produced(rows, (name,))]
            if len(lacking):
                raise InvalidArgument(
                    f"field {name!r} is not produced for {len(lacking)} of {len(rows)} samples "
                    f"(global indexes {', '.join(map(str, lacking[:10].tolist()))})",
                    field=name,
                    indexes=lacking.tolist(),
                )

    def _columns(self, fields: tuple[str, ...], owners: list[Partition]) -> tuple[ColumnSpec, ...]:
        specs = []
        for name in fields:
            known = [partition.fields[name].spec for partition in owners if name in partition.fields]
            if known:
                spec = known[0]
                for other in known[1:]:
                    spec = merged_spec(spec, other)
                specs.append(spec)
        return tuple(specs)

    def _locations(self, rows: Int64s, fields: tuple[str, ...]) -> tuple[Location, ...]:
        """Fields that lie together share one entry; block 0 where a row lacks the field."""
        found: dict[tuple[int, int], list[tuple[list[str], Int64s, NDArray[np.int32]]]] = {}  # by the first row's place
        for name in fields:
            column = self._rows.table.columns.get(name)
            if column is None:
                continue
            blocks, slots = column.block.take(rows), column.slot.take(rows)
            alike = found.setdefault((int(blocks[0]), int(slots[0])) if len(rows) else (0, 0), [])
            for names, others, other_slots in alike:
                if np.array_equal(blocks, others) and np.array_equal(slots, other_slots):
                    names.append(name)
                    break
            else:
                alike.append(([name], blocks, slots))
        return tuple(
            Location(fields=tuple(names), blocks=blocks, slots=slots.astype(np.int64))
            for alike in found.values()
            for names, blocks, slots in alike
        )

    def _group_ids(self, rows: Int64s) -> tuple[Any, ...]:
        found: list[Any] = [None] * len(rows)
        for partition, positions in self._rows.owners(rows):
            for position in positions.tolist():
                found[position] = partition.group_id(int(rows[position]))
        return tuple(found)
