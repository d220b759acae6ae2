"""What the controller says, as metas and listings."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from transfer_queue.messages import ColumnSpec, Drawn, Keys, Location
from transfer_queue.metadata import BatchMeta, FieldLocation, FieldSchema, KVDelta
from transfer_queue.metadata.values import copy_tags

_NESTED = ("ragged", "shaped")
_DENSE = "dense"


def meta_of(drawn: Drawn, asked_s: float = 0.0) -> BatchMeta:
    """The rows of a reply as a handle. `asked_s`: when the request was sent, from where a lease surely lasts."""
    return BatchMeta.from_columns(
        partition_id=drawn.partition_id,
        indexes=drawn.indexes,
        generations=drawn.generations,
        fields=fields_of(drawn.columns),
        produced=drawn.produced,
        locations=locations_of(drawn.locations),
        keys=drawn.keys,
        tags=drawn.tags,
        group_ids=drawn.group_ids,
        extra_info=drawn.extra_info,
        lease_token=drawn.lease_token,
        lease_deadline_s=None if drawn.lease_s is None else asked_s + drawn.lease_s,
    )


def fields_of(columns: Iterable[ColumnSpec]) -> dict[str, FieldSchema]:
    """Descriptions of fields, as metas carry them."""
    return {
        spec.name: FieldSchema(
            dtype=spec.dtype,
            shape=spec.shape if spec.layout == _DENSE else None,
            is_nested=spec.layout in _NESTED,
            is_non_tensor=spec.dtype is None,
        )
        for spec in columns
    }


def locations_of(locations: Iterable[Location]) -> tuple[FieldLocation, ...]:
    return tuple(FieldLocation(location.fields, location.blocks, location.slots) for location in locations)


def delta_of(reply: Keys) -> KVDelta:
    removed: dict[str, list[str]] = {}
    for name, key in zip(reply.removed_from, reply.removed, strict=True):
        removed.setdefault(name, []).append(key)
    return KVDelta(reply.cursor, listing_of(reply), removed, reply.full)


def listing_of(reply: Keys) -> dict[str, dict[str, dict[str, Any]]]:
    entries = zip(reply.keys, copy_tags("tag", reply.tags), strict=True)
    counts = zip(reply.partitions, reply.counts.tolist(), strict=True)
    return {name: dict(itertools.islice(entries, count)) for name, count in counts}
