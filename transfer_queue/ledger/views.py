"""What samplers may know about rows beside that they are ready: lazy views by global index."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.table import NO_GROUP, NO_VERSION, RowTable


class _ByIndex(Mapping[int, Any]):
    """A lazy view: global index → value, only of the rows that have one."""

    def __init__(self, partition: Partition, table: RowTable, look: Callable[[int], Any]) -> None:
        self._partition, self._table, self._look = partition, table, look

    def __getitem__(self, row: int) -> Any:
        own = 0 <= row < self._table.capacity and self._table.partition[row] == self._partition.number
        value = self._look(row) if own else None
        if value is None:
            raise KeyError(row)
        return value

    def __iter__(self) -> Iterator[int]:
        return (row for row in self._partition.rows().tolist() if self._look(row) is not None)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class RowViews:
    """The views of one partition."""

    NAMES = ("group_ids", "tags", "seqlens", "versions")

    def __init__(self, partition: Partition, table: RowTable) -> None:
        self.group_ids = _ByIndex(partition, table, partition.group_id)
        self.tags = _ByIndex(partition, table, lambda row: dict(table.tags[row]) if row in table.tags else None)
        self.seqlens = _ByIndex(partition, table, lambda row: table.tags.get(row, {}).get("seq_len"))
        self.versions = _ByIndex(partition, table, lambda row: _version(table, row))


def _version(table: RowTable, row: int) -> int | None:
    version = int(table.version[row])
    return None if version == NO_VERSION else version


class PartitionView:
    """A partition, as samplers that return pairs see it. Only valid during the call."""

    def __init__(self, partition: Partition, table: RowTable) -> None:
        self.partition_id = partition.name
        self._partition, self._table = partition, table

    def __repr__(self) -> str:
        return f"<PartitionView {self.partition_id}>"

    def get_custom_meta(self, indexes: Sequence[int]) -> dict[int, dict[str, Any]]:
        """{index: tag} of those that have one."""
        tags = RowViews(self._partition, self._table).tags if self._table.tags else {}
        return {index: tags[index] for index in indexes if index in tags}

    def get_group_ids(self, indexes: Sequence[int]) -> dict[int, Hashable]:
        """{index: group id} of the rows that were put with one."""
        if len(self._partition.groups) == 0:
            return {}
        rows = np.asarray(indexes, np.int64)
        declared = rows[self._partition.owns(rows)]
        declared = declared[self._table.group[declared] != NO_GROUP]
        return {row: self._partition.group_id(row) for row in declared.tolist()}
