"""A handle on samples by their keys: what the key-value functions return and take."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transfer_queue.errors import InvalidArgument, UnknownName, WrongType
from transfer_queue.metadata import checks
from transfer_queue.metadata import extra_info as extras
from transfer_queue.metadata.columns import Rows, pick
from transfer_queue.metadata.values import copy_tag, same_value


@dataclass(eq=False, repr=False)
class KVBatchMeta(extras.HasExtraInfo):
    """n keys of one partition with their tags. Attributes are assignable; they are checked when the meta is made.

    tags        one dict per key, copied deeply
    fields      names of the columns that all keys have, as far as that is known; None: it is not
    extra_info  the caller's own entries, copied deeply, never None
    """

    keys: list[str] = field(default_factory=list)
    tags: list[dict[str, Any]] = field(default_factory=list)
    partition_id: str | None = None
    fields: list[str] | None = None
    # the property of the base class holds it; what mypy misses is that the property also takes None
    extra_info: dict[str, Any] = field(default_factory=dict)  # type: ignore[override]

    def __post_init__(self) -> None:
        self.keys = checks.as_names("keys", self.keys)
        checks.check_distinct("keys", self.keys)
        self.tags = _as_tags(self.tags, len(self.keys))
        if self.partition_id is not None and not isinstance(self.partition_id, str):
            raise WrongType(f"partition_id must be str or None, not {self.partition_id!r}")
        if self.fields is not None:
            self.fields = checks.as_names("fields", self.fields)
            checks.check_distinct("fields", self.fields)
        self.extra_info = copy.deepcopy(self.extra_info)

    @property
    def size(self) -> int:
        return len(self.keys)

    def __len__(self) -> int:
        return self.size

    def select_keys(self, keys: Iterable[str]) -> KVBatchMeta:
        """Only these keys, in this order."""
        wanted = checks.as_names("keys", keys)
        checks.check_distinct("keys", wanted)
        rows = {key: row for row, key in enumerate(self.keys)}
        unknown = [key for key in wanted if key not in rows]
        if unknown:
            raise UnknownName(
                f"{len(unknown)} of {len(wanted)} keys are not among the {self.size} of this meta: {unknown[:8]}"
            )
        return self._part(checks.as_positions([rows[key] for key in wanted], self.size))

    def chunk(self, chunks: int) -> list[KVBatchMeta]:
        """Cut into exactly `chunks` contiguous pieces; the first `size % chunks` are one longer, some may be empty."""
        return [self._part(rows) for rows in checks.as_pieces(chunks, self.size)]

    def reorder(self, positions: Iterable[int]) -> None:
        """Put the keys into this order, in place; `positions` name every key once."""
        order = checks.as_order(positions, self.size)
        self.keys, self.tags = pick(self.keys, order), pick(self._matching_tags(), order)

    @classmethod
    def concat(cls, data: Iterable[KVBatchMeta | None]) -> KVBatchMeta:
        """Put keys behind each other; empty metas and None are skipped.

        All must have the same partition and the same fields, and agree where they share `extra_info`; no key may come
        twice.
        """
        pieces = checks.filled(KVBatchMeta, data)
        if not pieces:
            return cls()
        first = pieces[0]
        for number, piece in enumerate(pieces):
            _check_alike("partition_id", first.partition_id, piece.partition_id, number)
            _check_alike("fields", _in_order(first.fields), _in_order(piece.fields), number)
        return cls(
            keys=[key for piece in pieces for key in piece.keys],
            tags=[tag for piece in pieces for tag in piece._matching_tags()],
            partition_id=first.partition_id,
            fields=first.fields,
            extra_info=extras.join([piece.extra_info for piece in pieces], validate=True),
        )

    def _part(self, rows: Rows) -> KVBatchMeta:
        tags = pick(self._matching_tags(), rows)
        return KVBatchMeta(pick(self.keys, rows), tags, self.partition_id, self.fields, self.extra_info)

    def _matching_tags(self) -> list[dict[str, Any]]:
        """The tags, one per key: both lists are assignable, so they may have come apart."""
        checks.check_length("tags", len(self.tags), self.size)
        return self.tags

    def __getstate__(self) -> dict[str, Any]:
        """Tags first: pickle refers to the names of their entries by number, and small numbers take fewer bytes."""
        return {"tags": self.tags, **vars(self)}

    def __eq__(self, other: object) -> bool:
        """The same keys in the same order, with the same tags, partition, fields and `extra_info`."""
        if not isinstance(other, KVBatchMeta):
            return NotImplemented
        return same_value(vars(self), vars(other))

    __hash__ = None  # type: ignore[assignment]  # compared by content

    def __repr__(self) -> str:
        partition = "no partition" if self.partition_id is None else self.partition_id
        shown = "not known" if self.fields is None else ", ".join(self.fields) or "none"
        return f"<KVBatchMeta {partition}: {self.size} keys, fields {shown}>"


def _as_tags(tags: Any, size: int) -> list[dict[str, Any]]:
    if isinstance(tags, str | bytes) or not hasattr(tags, "__len__") or hasattr(tags, "keys"):
        raise WrongType(f"tags must be a list of dicts, one per key, not {type(tags).__name__}")
    checks.check_length("tags", len(tags), size)
    return [copy_tag(f"tags[{row}]", tag) for row, tag in enumerate(tags)]


def _in_order(fields: list[str] | None) -> list[str] | None:
    return None if fields is None else sorted(fields)


def _check_alike(name: str, first: Any, other: Any, number: int) -> None:
    if first != other:
        raise InvalidArgument(f"{name} mismatch: piece 0 has {first!r}, piece {number} has {other!r}")
