"""One put: check everything, then apply everything."""

from __future__ import annotations

import dataclasses
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, PartitionSealed, WrongType
from transfer_queue.ledger.groups import GroupTable
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.rows import Rows, Writer
from transfer_queue.ledger.versions import Versions
from transfer_queue.messages import Admit, Put, PutDone, SetTags
from transfer_queue.metadata.values import copy_tag

Int64s: TypeAlias = NDArray[np.int64]
Positions: TypeAlias = list[tuple[Partition, Int64s]]  # which rows of a put are in which partition


class Putting:
    """Inserts rows and writes cells. All checks come before the first change."""

    def __init__(self, rows: Rows, num_n_samples: int, versions: Versions) -> None:
        self._rows = rows
        self._versions = versions
        self._num_n_samples = num_n_samples

    def check(self, put: Put) -> str:
        """Raise for a put that is wrong whatever the state; return the name of its partition ("" if rows are named)."""
        count = put.num_rows
        per_row = (("keys", put.keys), ("tags", put.tags), ("group_ids", put.group_ids), ("versions", put.versions))
        for name, values in per_row:
            if values is not None and len(values) != count:
                raise InvalidArgument(f"{len(values)} {name} for {count} rows")
        if put.tags is not None and not all(tag is None or isinstance(tag, dict) for tag in put.tags):
            raise WrongType("every tag must be a dict or None")
        if put.keys is not None and len(set(put.keys)) < count:
            repeated = sorted({key for key in put.keys if put.keys.count(key) > 1})
            raise InvalidArgument(f"keys given more than once: {repeated[:10]}")
        if len({spec.name for spec in put.columns}) < len(put.columns):
            raise InvalidArgument(f"fields given more than once: {[spec.name for spec in put.columns]}")
        if put.columns and not put.block_id:
            raise InvalidArgument("a put with fields must name the block that holds them")
        if put.group_size is not None and put.group_size < 1:
            raise InvalidArgument(f"group_size must be at least 1, not {put.group_size}")
        if put.indexes is not None:
            if put.generations is None or not len(put.indexes) == len(put.generations) == count:
                raise InvalidArgument("indexes and generations must have one entry per row")
            if put.keys is not None or put.group_ids is not None:
                raise InvalidArgument("keys and group_ids are given when rows are inserted, not with a handle on rows")
            return ""
        if count < 1:
            raise InvalidArgument("a put needs at least one row")
        return self._rows.name(put.partition_id, put.global_step)

    def apply(
        self, put: Put, name: str, client: str, now: float, at: Int64s | None = None
    ) -> tuple[PutDone, list[Partition]]:
        """Make the put visible, in the ready sets too; raises before it changes anything. `at`: its rows of old."""
        if put.block_id:
            self._rows.blocks.check_new(put.block_id)
        inserted = False
        if put.indexes is not None:
            assert put.generations is not None
            rows, touched = self._named_rows(put, put.indexes, put.generations)
        else:
            rows, touched, inserted = self._rows_of(put, name, client, at)
        writer = Writer(client, now)
        for partition, positions in touched:
            if inserted:
                self._rows.write_new(partition, rows, put.columns, put.block_id, writer)
            else:
                self._rows.write(partition, rows[positions], positions, put.columns, put.block_id, writer)
        if put.block_id:
            self._rows.blocks.commit(put.block_id, len(rows), len(put.columns))
            self._count(put, touched, client)
        if put.tags is not None:
            self._merge_tags(rows, put.tags)
        fields = tuple(spec.name for spec in put.columns)
        for partition, positions in touched:
            if inserted:
                partition.offer_new(rows, fields)
            else:
                partition.refresh(rows[positions], fields)
        if put.versions is not None:
            self._versions.give(rows, put.versions, client)
        for partition, positions in touched:
            if partition.keys and (put.keys is not None or put.columns or put.tags is not None):
                self._rows.feed.touch(partition, rows[positions])
        partitions = [partition for partition, _ in touched]
        for partition in partitions if put.is_last else ():
            partition.sealed = True
        return self._done(put, name, rows, partitions), partitions

    def set_tags(self, request: SetTags) -> None:
        """Merge tags into live rows."""
        if len(request.tags) != len(request.indexes):
            raise InvalidArgument(f"{len(request.tags)} tags for {len(request.indexes)} rows")
        self._rows.table.check_fresh(request.indexes, request.generations)
        self._merge_tags(request.indexes, request.tags)
        for partition, positions in self._rows.owners(request.indexes):
            if partition.keys:
                self._rows.feed.touch(partition, request.indexes[positions])

    def check_open(self, put: Put | Admit, name: str) -> None:
        """Raise for new rows of a partition whose last rows were put."""
        partition = self._rows.partitions.get(name)
        if partition is None or not partition.sealed or (isinstance(put, Put) and put.indexes is not None):
            return
        new = put.num_rows if put.keys is None else sum(key not in partition.keys for key in put.keys)
        if new:
            raise PartitionSealed(
                f"partition {name!r} takes no more rows, because its last ones were put (is_last); {new} more came. "
                "Clear the partition to begin it anew, or use another one"
            )

    def _done(self, put: Put, name: str, rows: Int64s, partitions: list[Partition]) -> PutDone:
        table = self._rows.table
        done = PutDone(partition_id=name, indexes=rows, generations=table.generation[rows])
        if not put.tell:
            return done
        known = {field: None for partition in partitions for field in partition.fields}
        fields = tuple(field for field in known if table.produced(rows, (field,)).all())
        tags = tuple(table.tags.get(row) for row in rows.tolist())
        return dataclasses.replace(done, tags=tags, fields=fields)

    def _named_rows(self, put: Put, rows: Int64s, generations: Int64s) -> tuple[Int64s, Positions]:
        self._rows.table.check_fresh(rows, generations)
        if len(np.unique(rows)) != len(rows):
            raise InvalidArgument("a handle with repeated rows cannot be written to; select distinct rows first")
        if put.versions is not None:
            self._versions.check(rows, put.versions)
        touched = self._rows.owners(rows)
        for partition, _ in touched:
            partition.check_columns(put.columns)
        return rows, touched

    def _count(self, put: Put, touched: Positions, client: str) -> None:
        if self._rows.usage is not None and put.columns and put.num_rows:
            cells = {partition.name: len(positions) * len(put.columns) for partition, positions in touched}
            self._rows.usage.commit(put.block_id, client, put.size_bytes, cells)

    def _rows_of(self, put: Put, name: str, client: str, at: Int64s | None) -> tuple[Int64s, Positions, bool]:
        """Rows by key, new where the key is new; without keys all are new. Last: whether all are."""
        known = self._rows.partitions.get(name)
        keys = put.keys or ()
        found = np.array([known.keys.get(key, -1) for key in keys] if known else [-1] * len(keys), dtype=np.int64)
        rows = found if put.keys is not None else np.full(put.num_rows, -1, dtype=np.int64)
        new = np.flatnonzero(rows < 0)
        self._check_groups(put, known, rows, new)
        if put.versions is not None:
            self._versions.check(rows[rows >= 0], put.versions[rows >= 0])
        if known is not None:
            known.check_columns(put.columns)
        if len(new):
            known, rows[new] = self._rows.insert(name, len(new), None if at is None else int(at[new[0]]))
            if self._rows.usage is not None:
                self._rows.usage.insert(name, client, rows[new])
        assert known is not None
        for position in new.tolist() if keys else ():
            known.keys[keys[position]] = int(rows[position])
            self._rows.table.keys[int(rows[position])] = keys[position]
        if put.group_ids is not None and len(new):
            ids = [put.group_ids[position] for position in new.tolist()]
            ordinals = self._rows.table.ordinal[rows[new]]
            self._rows.table.group[rows[new]] = known.groups.add(ids, ordinals, self._group_size(put))
        return rows, [(known, np.arange(len(rows)))], len(new) == len(rows)

    def _check_groups(self, put: Put, known: Partition | None, rows: Int64s, new: Int64s) -> None:
        if put.group_ids is None:
            return
        for position in np.flatnonzero(rows >= 0).tolist():
            assert known is not None
            current = known.group_id(int(rows[position]))
            if current != put.group_ids[position]:
                raise InvalidArgument(
                    f"sample {int(rows[position])} belongs to group {current!r} since it was inserted; "
                    f"it cannot move to {put.group_ids[position]!r}"
                )
        groups = GroupTable() if known is None else known.groups
        ids = [put.group_ids[position] for position in new.tolist()]
        groups.check(ids, self._group_size(put), put.group_size is not None)

    def _group_size(self, put: Put) -> int:
        return self._num_n_samples if put.group_size is None else put.group_size

    def _merge_tags(self, rows: Int64s, tags: tuple[dict[str, object] | None, ...]) -> None:
        for row, tag in zip(rows.tolist(), tags, strict=True):
            if tag:  # a tag that others may look at is replaced, never changed
                self._rows.table.tags[row] = {**self._rows.table.tags.get(row, {}), **copy_tag("tag", tag)}
