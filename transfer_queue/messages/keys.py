"""Asking for keys and their tags, and waiting for them."""

from __future__ import annotations

from typing import Any

from transfer_queue.messages.base import Int64s, message


@message(52)
class GetKeys:
    """Reply: `Keys`, of one partition or (None) of all. `since` a cursor: only what changed after it."""

    partition_id: str | None
    since: str | None


@message(53)
class WaitKeys:
    """Wait for keys of a partition that have `fields`, tags as in `where`, and changed after `since`. Reply: `Keys`.

    All of `keys` have to, else so many as `count` (None: one). `where` has for a tag entry the list of values of which
    it has one. With `since` and neither `keys` nor `count`, a key that is removed ends the wait as well.
    """

    partition_id: str
    keys: tuple[str, ...] | None
    fields: tuple[str, ...]
    where: dict[str, Any]
    count: int | None
    since: str | None
    timeout_s: float


@message(78)
class Keys:
    """Keys with their tags, of P partitions one after the other; `tags` has None for an empty one.

    `cursor` names the moment. `full`: this is everything, not what changed. The i-th of the `removed` keys was one of
    partition `removed_from[i]`.
    """

    cursor: str
    full: bool
    partitions: tuple[str, ...]
    counts: Int64s  # [P]
    keys: tuple[str, ...]
    tags: tuple[dict[str, Any] | None, ...]
    removed: tuple[str, ...] = ()
    removed_from: tuple[str, ...] = ()
