"""Waiting for keys: the request stays at the controller until a change answers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transfer_queue.client.answers import delta_of
from transfer_queue.client.arguments import (
    DEFAULT_TIMEOUT_S,
    cursor_of,
    distinct_names,
    key_names,
    partition_str,
    timeout_seconds,
    whole_number,
)
from transfer_queue.client.core import ClientCore
from transfer_queue.client.drivers import arun, run
from transfer_queue.client.steps import Call, Operation
from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.messages import WaitKeys
from transfer_queue.metadata import KVDelta


def kv_wait(
    core: ClientCore,
    partition_id: str,
    *,
    keys: Sequence[str] | str | None = None,
    fields: Sequence[str] | str | None = None,
    where: Mapping[str, Any] | None = None,
    count: int | None = None,
    since: str | None = None,
    timeout: float | None = None,
) -> Operation[KVDelta]:
    """Wait until keys of a partition are as described, and return those that are, in the order of a listing.

    keys     all of these; else as many as `count` (1) of those in the partition
    fields   they have these columns
    where    their tags match: `{entry: value}`, or a list of values of which it has one
    since    they changed after this cursor (""; from the beginning on). Without `keys` and `count`, the removal of a
             key ends the wait as well, and so does a cursor that cannot be followed any more: the result is `full` then
    timeout  seconds, None: 60, `math.inf`: for ever

    Nothing is polled: the request stays at the controller until a change answers it. Raises `GetMetaTimeout` that names
    what is pending.
    """
    if keys is not None and count is not None:
        raise InvalidArgument("give keys, all of which are waited for, or the count of others, not both")
    request = WaitKeys(
        partition_id=partition_str(partition_id),
        keys=None if keys is None else tuple(dict.fromkeys(key_names(keys, one=True, distinct=False))),
        fields=() if fields is None else distinct_names("fields", fields),
        where=_where(where),
        count=None if count is None else whole_number("count", count),
        since=cursor_of(since),
        timeout_s=timeout_seconds(timeout),
    )
    return delta_of((yield Call(core.controller, request, request.timeout_s)))


class KeyWatch:
    """The changes of a partition's keys, one `KVDelta` after the other, for `for` and for `async for`.

    `cursor` is that of the last one: a watch that begins there goes on where this one stopped. Raises `GetMetaTimeout`
    if nothing changes for `timeout` seconds; the watch may be asked again after that.
    """

    def __init__(
        self,
        core: ClientCore,
        partition_id: str,
        *,
        where: Mapping[str, Any] | None = None,
        since: str = "",
        timeout: float | None = None,
    ) -> None:
        self._core = core
        self._partition = partition_str(partition_id)
        self._where = _where(where)
        self._timeout = DEFAULT_TIMEOUT_S if timeout is None else timeout_seconds(timeout)
        self.cursor = cursor_of(since) or ""

    def __repr__(self) -> str:
        return f"<KeyWatch of partition {self._partition!r} at {self.cursor!r}>"

    def __iter__(self) -> KeyWatch:
        return self

    def __next__(self) -> KVDelta:
        return run(self._next())

    def __aiter__(self) -> KeyWatch:
        return self

    async def __anext__(self) -> KVDelta:
        return await arun(self._next())

    def _next(self) -> Operation[KVDelta]:
        how: dict[str, Any] = {"where": self._where, "since": self.cursor, "timeout": self._timeout}
        delta = yield from kv_wait(self._core, self._partition, **how)
        self.cursor = delta.cursor
        return delta


def _where(where: Any) -> dict[str, list[Any]]:
    if where is None:
        return {}
    if not isinstance(where, Mapping) or not all(isinstance(name, str) for name in where):
        raise WrongType(f"where must be a dict of tag entries and values, not {where!r:.200}")
    several = (list, tuple, set, frozenset)
    return {name: list(value) if isinstance(value, several) else [value] for name, value in where.items()}
