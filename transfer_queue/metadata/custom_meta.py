"""The tags of a batch, as its users see them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from transfer_queue.metadata.table import Table


class HasCustomMeta:
    """`custom_meta`: the tag of each row."""

    _table: Table

    @property
    def custom_meta(self) -> list[dict[str, Any]]:
        """The tags, whose entries may be changed in place."""
        return self._table.tags.rows()

    @custom_meta.setter
    def custom_meta(self, tags: Sequence[Mapping[str, Any] | None] | None) -> None:
        self._table.tags.assign(tags)

    def update_custom_meta(self, tags: Sequence[Mapping[str, Any] | None] | None) -> None:
        """Merge one dict (or None) per row into the tags."""
        if tags is not None:
            self._table.tags.update(tags)

    def get_all_custom_meta(self) -> list[dict[str, Any]]:
        """Return a deep copy."""
        return copy.deepcopy(self.custom_meta)

    def clear_custom_meta(self) -> None:
        """Forget the tags here; what the queue stores keeps its entries."""
        self._table.tags.assign(None)

    def changed_tags(self) -> list[dict[str, Any] | None]:
        """Per row the tag entries that were changed here since the rows were fetched, else None."""
        return self._table.tags.changed()

    def mark_tags_sent(self, sent: Sequence[Mapping[str, Any] | None] | None) -> None:
        """These entries (of `changed_tags`) have reached the queue: they count as fetched from now on.

        What was changed while they were on their way still counts as changed. None: nothing was sent.
        """
        self._table.tags.mark_sent(sent)
