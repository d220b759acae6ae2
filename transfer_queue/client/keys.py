"""Keys: putting, getting, listing and clearing samples by name. A key is a sample that has one.

n keys of a call
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase, is_tensor_collection

from transfer_queue.client import columns, transfer
from transfer_queue.client.answers import delta_of, listing_of
from transfer_queue.client.arguments import (
    cursor_of,
    data_seconds,
    distinct_names,
    key_names,
    partition_str,
    sendable,
    timeout_seconds,
    versions_of,
)
from transfer_queue.client.core import ClientCore, changed
from transfer_queue.client.parsing import DataParser, parsed
from transfer_queue.client.steps import Call, Operation
from transfer_queue.client.writing import new_rows, put_rows
from transfer_queue.config import layout_in_force
from transfer_queue.errors import InvalidArgument, KeyNotFound, StaleSampleError, UnknownName, WrongType
from transfer_queue.messages import Clear, Drawn, GetKeys, Int64s, Keys, Locate, Location, Put, PutDone
from transfer_queue.metadata import KVBatchMeta, KVDelta
from transfer_queue.metadata.values import copy_tag
from transfer_queue.storage.block import EncodedColumn

if TYPE_CHECKING:
    Tag = Mapping[str, Any]

log = logging.getLogger("transfer_queue")

_SHOWN = 10
_TRIES = 100  # of a get whose rows go on being cleared or written


# ---------------------------------------------------------------- putting


def kv_put(
    core: ClientCore,
    key: str,
    partition_id: str,
    fields: Mapping[str, Any] | TensorDict | None = None,
    tag: Tag | None = None,
    data_parser: DataParser | None = None,
    *,
    policy_version: int | None = None,
    timeout: float | None = None,
) -> Operation[KVBatchMeta]:
    """Put columns and tag entries of one key, which is made if it is not there; both become visible together.

    In a dict, a tensor is the row itself; any other value is one object. The tag merges with the one that is there.
    `data_parser` changes the columns before they are stored, `policy_version` is that of the policy that generated the
    row, see `put`. Returns the key with its whole tag and the names of all its columns. What raises leaves nothing
    behind.
    """
    if not isinstance(key, str):
        raise WrongType(f"key must be a str, not {key!r}")
    if fields is None and tag is None:
        raise InvalidArgument("nothing to put: give fields, a tag, or both")
    data = None if fields is None else _one_row(fields)
    tags = None if tag is None else [tag]
    versions = versions_of(policy_version)
    return (yield from _put(core, (key,), partition_str(partition_id), data, tags, data_parser, versions, timeout))


def kv_batch_put(
    core: ClientCore,
    keys: Sequence[str],
    partition_id: str,
    fields: TensorDict | None = None,
    tags: Sequence[Tag] | None = None,
    data_parser: DataParser | None = None,
    *,
    policy_version: int | Sequence[int] | None = None,
    timeout: float | None = None,
) -> Operation[KVBatchMeta]:
    """The same for n keys: `fields` has batch size [n], `tags` n dicts, `policy_version` one int or n.

    Returns all of them, in this order.
    """
    names = key_names(keys, one=False, distinct=True)
    if fields is None and tags is None:
        raise InvalidArgument("nothing to put: give fields, tags, or both")
    if fields is not None and not (isinstance(fields, TensorDictBase) or is_tensor_collection(fields)):
        raise WrongType(f"fields must be a TensorDict, not {type(fields).__name__}")
    if fields is not None and (not fields.batch_size or fields.batch_size[0] != len(names)):
        raise InvalidArgument(f"fields has batch size {list(fields.batch_size)}, there are {len(names)} keys")
    versions = versions_of(policy_version)
    return (yield from _put(core, names, partition_str(partition_id), fields, tags, data_parser, versions, timeout))


def _put(
    core: ClientCore,
    keys: tuple[str, ...],
    partition: str,
    data: Any,
    tags: Sequence[Tag] | None,
    data_parser: DataParser | None,
    versions: Int64s | None,
    timeout: float | None,
) -> Operation[KVBatchMeta]:
    timeout_s = data_seconds(timeout)
    if versions is not None and versions.ndim and len(versions) != len(keys):
        raise InvalidArgument(f"{len(versions)} policy versions for {len(keys)} keys: give one for all, or one per key")
    given = None if tags is None else _tags(tags, len(keys))
    if data is not None and data_parser is not None:
        data = parsed(data, data_parser)
    encoded: list[EncodedColumn] = []
    if data is not None and len(data.keys()):
        _, encoded = columns.encode(data, allow_pickle=core.allow_pickle)
    request = new_rows(partition, None, len(keys)) | {"keys": keys, "tags": given, "tell": True}
    request["versions"] = None if versions is None else np.broadcast_to(versions, len(keys)).copy()
    return (yield from put_rows(core, request, encoded, timeout_s, _as_put))


def _as_put(message: Put, done: PutDone) -> KVBatchMeta:
    keys = list(message.keys or ())
    tags = [copy_tag("tag", tag) for tag in done.tags or [None] * len(keys)]
    return KVBatchMeta(keys=keys, tags=tags, partition_id=done.partition_id, fields=sorted(done.fields or ()))


def _one_row(fields: Any) -> Any:
    if isinstance(fields, TensorDictBase) or is_tensor_collection(fields):
        if not fields.batch_size:
            return fields.unsqueeze(0)
        if fields.batch_size[0] != 1:
            raise InvalidArgument(f"fields has {fields.batch_size[0]} rows for one key: use kv_batch_put")
        return fields
    if not isinstance(fields, Mapping):
        raise InvalidArgument(f"fields must be a dict or a TensorDict, not {type(fields).__name__}")
    return {name: _row(name, value) for name, value in fields.items()}


def _row(name: str, value: Any) -> Any:
    """A column of one row. What is no tensor is one object, also a list or an array."""
    if isinstance(value, torch.Tensor):
        if value.is_nested:
            raise InvalidArgument(f"field {name!r} is a nested tensor, which is several rows: use kv_batch_put")
        return value.unsqueeze(0)
    if isinstance(value, NonTensorData):
        return [value.data]
    if is_tensor_collection(value):
        raise InvalidArgument(f"field {name!r} is a {type(value).__name__}: put its entries as fields of their own")
    return [value]


# ---------------------------------------------------------------- getting


def kv_batch_get(
    core: ClientCore,
    keys: Sequence[str] | str,
    partition_id: str,
    select_fields: Sequence[str] | str | None = None,
    *,
    layout: str | None = None,
    strict: bool | None = None,
    timeout: float | None = None,
) -> Operation[TensorDict]:
    """Read n keys, which may repeat, into a `TensorDict` [n] in their order. `select_fields` None: what all have.

    Keys that are not there, and columns that not all have, are left out with a warning. Columns that none has are left
    out. If that leaves no key (`KeyNotFound`) or no column (`UnknownName`), or with `strict` for any that is missing,
    raises with their names; both errors are a `ValueError`. `layout` as for `get_data`.
    """
    names = key_names(keys, one=True, distinct=False)
    chosen = None if select_fields is None else distinct_names("select_fields", select_fields)
    where = partition_str(partition_id)
    layout = layout_in_force(layout, core.layout)
    strict = core.defaults.strict if strict is None else bool(strict)
    deadline, tries = time.monotonic() + data_seconds(timeout), _TRIES
    while True:
        left_s = max(deadline - time.monotonic(), 0.0)
        found: Drawn = yield Call(core.controller, _locate(names, where, chosen), left_s)
        wanted = _present(found, names, chosen, strict)
        try:
            parts = yield from transfer.load(core.transfer, _within(found, wanted), wanted, left_s) if wanted else ()
        except StaleSampleError:  # cleared, or written anew, since the controller was asked: what is there now?
            tries -= 1
            if not (tries and left_s):
                raise
            continue
        return columns.decode(parts or {}, len(found.indexes), layout=layout, allow_pickle=core.allow_pickle)


def kv_batch_get_by_meta(
    core: ClientCore,
    meta: KVBatchMeta,
    select_fields: Sequence[str] | str | None = None,
    *,
    layout: str | None = None,
    strict: bool | None = None,
    timeout: float | None = None,
) -> Operation[TensorDict]:
    """The same for the keys of a meta, by default with the fields that it names."""
    if not isinstance(meta, KVBatchMeta):
        raise WrongType(f"meta must be a KVBatchMeta, not {type(meta).__name__}")
    if meta.partition_id is None:
        raise InvalidArgument("meta has no partition_id: it names no keys of a queue")
    chosen = None if select_fields is None else distinct_names("select_fields", select_fields)
    unknown = [name for name in chosen or () if meta.fields is not None and name not in meta.fields]
    if unknown:
        raise UnknownName(f"select_fields {unknown} not found among the fields of this meta: {meta.fields}")
    if chosen is None:
        chosen = tuple(meta.fields or ()) or None
    how: dict[str, Any] = {"layout": layout, "strict": strict, "timeout": timeout}
    return (yield from kv_batch_get(core, list(meta.keys), meta.partition_id, chosen, **how))


def _locate(keys: tuple[str, ...], partition: str, fields: tuple[str, ...] | None) -> Locate:
    rows: dict[str, Any] = {"global_step": None, "indexes": None, "generations": None, "keys": keys}
    return Locate(partition_id=partition, fields=fields, allow_missing=True, **rows)


def _present(found: Drawn, keys: tuple[str, ...], chosen: tuple[str, ...] | None, strict: bool) -> tuple[str, ...]:
    """The fields to read; warns of what is left out, raises if nothing is left."""
    there = set(found.keys or ())
    missing = [key for key in dict.fromkeys(keys) if key not in there]
    if missing and (strict or not len(found.indexes)):
        raise KeyNotFound(
            f"{len(missing)} of {len(set(keys))} keys not found in partition {found.partition_id!r}: "
            f"{missing[:_SHOWN]}",
            keys=missing,
        )
    how_many = {name: int((place.blocks != 0).sum()) for place in found.locations for name in place.fields}
    fields = found.fields if chosen is None else chosen
    complete = tuple(name for name in fields if how_many.get(name) == len(found.indexes))
    partial = [name for name in fields if 0 < how_many.get(name, 0) < len(found.indexes)]
    if chosen is None and not complete:
        raise UnknownName(f"keys {list(keys[:_SHOWN])} of partition {found.partition_id!r} have no column in common")
    absent = [name for name in fields if name not in complete]
    if absent and (strict or not complete):
        raise UnknownName(
            f"fields {absent} not found in all {len(found.indexes)} rows of partition {found.partition_id!r}",
            fields=absent,
        )
    if missing:
        log.warning("%d keys are not in partition %r: %s", len(missing), found.partition_id, missing[:_SHOWN])
    if partial:
        log.warning("fields %s are left out: only some of %d rows have them", partial, len(found.indexes))
    return complete


def _within(found: Drawn, wanted: tuple[str, ...]) -> list[Location]:
    """Where these fields lie."""
    within = []
    for place in found.locations:
        names = tuple(name for name in place.fields if name in wanted)
        if names:
            within.append(Location(fields=names, blocks=place.blocks, slots=place.slots))
    return within


# ---------------------------------------------------------------- listing, clearing


def kv_list(
    core: ClientCore, partition_id: str | None = None, *, since: str | None = None, timeout: float | None = None
) -> Operation[dict[str, dict[str, dict[str, Any]]] | KVDelta]:
    """`{partition: {key: tag}}` of one moment, partitions and keys in order of creation; the dicts are the caller's.

    With `since`, a cursor, a `KVDelta`: what changed after it, in that order. `since=""` begins with everything, and
    so does a cursor that is too old, or from before a restart or the load of a checkpoint.
    """
    name = None if partition_id is None else partition_str(partition_id)
    request = GetKeys(partition_id=name, since=cursor_of(since))
    reply: Keys = yield Call(core.controller, request, timeout_seconds(timeout))
    return listing_of(reply) if since is None else delta_of(reply)


def kv_clear(
    core: ClientCore, keys: Sequence[str] | str, partition_id: str, *, timeout: float | None = None
) -> Operation[None]:
    """Remove keys with all that they have; those that are not there, or come twice, are no error."""
    where, timeout_s = partition_str(partition_id), timeout_seconds(timeout)
    names = key_names(keys, one=True, distinct=False, least=0)
    if names:
        request = Clear(partition_id=where, global_step=None, indexes=None, generations=None, keys=names)
        yield from changed(core, request, timeout_s)


# ---------------------------------------------------------------- arguments


def _tags(tags: Any, count: int) -> tuple[dict[str, Any] | None, ...] | None:
    if not isinstance(tags, list | tuple):
        raise WrongType(f"tags must be a list of dicts, one per key, not {type(tags).__name__}")
    wrong = [tag for tag in tags if not isinstance(tag, Mapping)]
    if wrong:
        raise WrongType(f"a tag must be a dict, not {wrong[0]!r:.200}")
    if len(tags) != count:
        raise InvalidArgument(f"{len(tags)} tags for {count} keys: give one per key")
    return tuple(sendable(tag) for tag in tags) if any(tags) else None
