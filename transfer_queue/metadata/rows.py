"""Single rows of a meta, to look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from transfer_queue.errors import WrongType
from transfer_queue.metadata.columns import Coded
from transfer_queue.metadata.schema import FieldView
from transfer_queue.metadata.table import UNKNOWN_GENERATION, Table
from transfer_queue.metadata.tags import Tags


@dataclass(frozen=True, slots=True)
class Sample:
    """One row as it was when it was looked at; changing the dicts in it changes nothing elsewhere."""

    global_index: int
    partition_id: str
    production_status: int
    custom_meta: dict[str, Any]
    fields: dict[str, FieldView]
    generation: int = UNKNOWN_GENERATION


class Samples(Sequence[Sample]):
    """The rows of a table, each made when it is asked for. Equal to a list of the same rows."""

    __slots__ = ("_table",)

    def __init__(self, table: Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, row: int) -> Sample: ...
    @overload
    def __getitem__(self, row: slice) -> list[Sample]: ...
    def __getitem__(self, row: int | slice) -> Sample | list[Sample]:
        if isinstance(row, slice):
            return [self._sample(one) for one in range(len(self))[row]]
        return self._sample(range(len(self))[row])

    def _sample(self, row: int) -> Sample:
        table = self._table
        return Sample(
            global_index=int(table.indexes[row]),
            partition_id=table.partitions[row],
            production_status=int(table.status[row]),
            custom_meta=table.tags.row(row),
            fields={name: FieldView(schema, row) for name, schema in table.fields.items()},
            generation=int(table.generations[row]),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | Samples):
            return NotImplemented
        return len(other) == len(self) and all(one == another for one, another in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # compared by content

    def __repr__(self) -> str:
        return f"<{len(self)} samples>"


def table_of(samples: Sequence[Sample]) -> Table:
    """Put rows of any metas behind each other; there is at least one."""
    return Table.concat([_one_row(sample) for sample in samples], validate=True)


def _one_row(sample: Sample) -> Table:
    if not isinstance(sample, Sample):
        raise WrongType(f"samples must be rows of a BatchMeta, not {type(sample).__name__} {sample!r}")
    tags = Tags(1)
    tags.update([sample.custom_meta])
    return Table(
        indexes=np.array([sample.global_index], np.int64),
        generations=np.array([sample.generation], np.int64),
        partitions=Coded.of([sample.partition_id]),
        status=np.array([sample.production_status], np.int8),
        tags=tags,
        fields={name: view.column() for name, view in sample.fields.items()},
    )
