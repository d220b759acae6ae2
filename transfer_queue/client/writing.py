"""Putting rows and removing them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from transfer_queue.client import columns, transfer
from transfer_queue.client.answers import fields_of, locations_of, meta_of
from transfer_queue.client.arguments import (
    DEFAULT_TIMEOUT_S,
    Tags,
    address,
    agreed_rows,
    check_handle,
    group_of,
    names_of,
    partition_name,
    tags_of,
    timeout_seconds,
    whole_number,
)
from transfer_queue.client.core import ClientCore
from transfer_queue.client.sharing import Sharing
from transfer_queue.client.steps import Call, Notify, Operation
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, InvalidArgument, TransferQueueError
from transfer_queue.messages import (
    AbortBlocks,
    AbortGroup,
    Clear,
    ColumnSpec,
    Done,
    Drawn,
    Location,
    Put,
    PutDone,
    ResetConsumption,
    SealGroup,
    SetTags,
)
from transfer_queue.metadata import BatchMeta
from transfer_queue.storage.block import EncodedColumn

if TYPE_CHECKING:
    from tensordict import TensorDict

Data: TypeAlias = "TensorDict | Mapping[str, Any]"


def put(
    core: ClientCore,
    data: Data | None = None,
    metadata: BatchMeta | None = None,
    partition_id: str | int | None = None,
    *,
    global_step: int | None = None,
    keys: Sequence[str] | None = None,
    tags: Tags | None = None,
    group_ids: Sequence[int | str] | None = None,
    group_size: int | None = None,
    shared_fields: Sequence[str] | None = None,
    timeout: float | None = None,
) -> Operation[BatchMeta]:
    """Write rows of fields; what was put is visible to everyone, whole, when this returns.

    Without `metadata` the rows are new, or those that have one of the `keys` already. With `metadata` the fields are
    added to its rows, and it is updated in place and returned. `data` is a `TensorDict` or a mapping of tensors (dense
    or nested), NumPy arrays or lists, one entry per row. `group_ids` tells which rows belong together, `group_size` how
    many rows a group will have (default: the controller's `num_n_samples`); `tags` are small dicts that travel with
    the metadata and merge with those that are there.

    `shared_fields` have one value for all rows of a group in this put: it is stored once. They may come with an entry
    per row, of which that of the group's first row is stored, or with an entry per group, in the order in which the
    groups first appear. With `metadata` the groups are those that it knows of its rows.

    Raises, with nothing visible: `StaleSampleError` if rows of `metadata` were cleared, `CapacityExceeded` if there is
    no room until the timeout, `InvalidArgument` for rows that disagree in length or a changed dtype, shared fields
    without groups or with entries of several forms in one group, `UnknownName` for a shared field that is not in
    `data`, `EncodeError`.
    """
    timeout_s = timeout_seconds(timeout)
    if metadata is not None:
        check_handle(metadata, partition_id, global_step, keys, group_ids)
    groups = None if group_ids is None else tuple(group_of(group) for group in group_ids)
    sharing = _sharing(shared_fields, groups, metadata)
    num_rows, encoded = _encoded(core, data, sharing)
    if metadata is None:
        partition, step = address(partition_id, global_step)
        count = agreed_rows(data=num_rows, keys=keys, tags=tags, group_ids=group_ids)
        request = new_rows(partition, step, count)
    else:
        count = agreed_rows(data=num_rows, metadata=metadata, tags=tags)
        request = same_rows(metadata)
        metadata.update_custom_meta(tags)
        tags = metadata.changed_tags()
    request = request | {
        "keys": None if keys is None else names_of("keys", keys),
        "tags": tags_of(tags),
        "group_ids": groups,
        "group_size": group_size,
    }
    return (yield from put_rows(core, request, encoded, timeout_s, metadata))


def set_custom_meta(core: ClientCore, metadata: BatchMeta) -> Operation[None]:
    """Merge the tag entries changed in this meta into the rows."""
    changed = tags_of(metadata.changed_tags())
    if changed is not None:
        request = SetTags(indexes=metadata.indexes, generations=metadata.generations, tags=changed)
        yield Call(core.controller, request, DEFAULT_TIMEOUT_S)
        metadata.mark_tags_sent()


def seal_group(core: ClientCore, group_id: int | str, partition_id: str | int) -> Operation[None]:
    """The group gets no more rows: it is complete with those it has."""
    yield Call(
        core.controller, SealGroup(partition_id=partition_name(partition_id), group_id=group_id), DEFAULT_TIMEOUT_S
    )


def abort_group(
    core: ClientCore, group_id: int | str, partition_id: str | int, reason: str = "group_aborted"
) -> Operation[int]:
    """Drop all rows of the group, accounted under `reason`; later rows for it are refused. Returns their number."""
    request = AbortGroup(partition_id=partition_name(partition_id), group_id=group_id, reason=reason)
    done: Done = yield Call(core.controller, request, DEFAULT_TIMEOUT_S)
    return done.count


def clear(core: ClientCore, global_step: int) -> Operation[int]:
    """Remove all samples of a step; its window may be used by a later step. Returns their number."""
    return (yield from _clear(core, *address(None, global_step)))


def clear_partition(core: ClientCore, partition_id: str) -> Operation[int]:
    """Remove a partition with all its samples; an unknown one is no error. Returns the number of samples."""
    return (yield from _clear(core, *address(partition_id, None)))


def clear_samples(core: ClientCore, metadata: BatchMeta) -> Operation[int]:
    """Remove the rows of the meta. Raises `StaleSampleError`, removing nothing, if any of them is gone already."""
    if len(metadata) == 0:
        return 0
    request = Clear(partition_id=None, global_step=None, indexes=metadata.indexes, generations=metadata.generations)
    done: Done = yield Call(core.controller, request, DEFAULT_TIMEOUT_S)
    return done.count


def reset_consumption(core: ClientCore, partition_id: str | int, task_name: str | None = None) -> Operation[bool]:
    """Give back what the task (None: every task) consumed or reserved in the partition; data stays."""
    partition, step = address(partition_id, None)
    request = ResetConsumption(partition_id=partition, global_step=step, task_name=task_name)
    yield Call(core.controller, request, DEFAULT_TIMEOUT_S)
    return True


# ---------------------------------------------------------------- inside


def _encoded(
    core: ClientCore, data: Data | None, sharing: Sharing | None
) -> tuple[int | None, Sequence[EncodedColumn]]:
    """The number of rows, None if there is no data, and the columns."""
    if data is None and sharing is None:
        return None, ()
    return columns.encode({} if data is None else data, allow_pickle=core.allow_pickle, sharing=sharing)


def _sharing(
    shared_fields: Sequence[str] | None, group_ids: Sequence[int | str] | None, metadata: BatchMeta | None
) -> Sharing | None:
    """Which rows share what; groups of one id in two partitions are two."""
    fields = () if shared_fields is None else names_of("shared_fields", shared_fields)
    if not fields:
        return None
    if group_ids is not None:
        return Sharing.of(fields, group_ids)
    if metadata is None:
        raise InvalidArgument("shared_fields are shared by the rows of a group: give group_ids as well")
    known = metadata.group_ids or [None] * len(metadata)
    without = [row for row, group in zip(metadata.global_indexes, known, strict=True) if group is None]
    if without:
        raise InvalidArgument(
            f"shared_fields are shared by the rows of a group, but {len(without)} of {len(metadata)} rows of metadata "
            f"have no group_id (global indexes {', '.join(map(str, without[:10]))})"
        )
    return Sharing.of(fields, list(zip(metadata.partition_ids, known, strict=True)))


def put_rows(
    core: ClientCore,
    request: dict[str, Any],
    encoded: Sequence[Any] | None,
    timeout_s: float,
    metadata: BatchMeta | None = None,
) -> Operation[BatchMeta]:
    """Store the columns, then commit; a put that raised leaves no space behind."""
    count = request["num_rows"]
    specs = tuple(column.spec for column in encoded or ())
    block, unit = 0, None
    if encoded:
        unit, block = yield from transfer.store(core.transfer, encoded, count, timeout_s)
    message = Put(**request, block_id=block, columns=specs, timeout_s=timeout_s)
    try:
        done: PutDone = yield Call(core.controller, message, timeout_s)
    except (ConnectionLost, DeadlineExceeded):
        raise  # it may have been applied: the block stays until that is settled
    except TransferQueueError:
        if unit is not None:
            yield Notify(unit, AbortBlocks(blocks=np.array([block], dtype=np.int64)))
        raise
    names = tuple(spec.name for spec in specs)
    written = Location(fields=names, blocks=np.full(count, block, np.int64), slots=np.arange(count, dtype=np.int64))
    locations = (written,) if names else ()
    if metadata is None:
        return _handle(request, done, specs, locations)
    metadata.mark_tags_sent()
    metadata.add_columns(fields_of(specs), locations_of(locations), done.generations)
    return metadata


def _handle(
    request: dict[str, Any], done: PutDone, specs: tuple[ColumnSpec, ...], locations: tuple[Location, ...]
) -> BatchMeta:
    """The put rows, as a draw of them would describe them."""
    drawn = Drawn(
        partition_id=done.partition_id,
        indexes=done.indexes,
        generations=done.generations,
        fields=tuple(spec.name for spec in specs),
        columns=specs,
        locations=locations,
        produced=None,
        keys=request["keys"],
        tags=request["tags"],
        group_ids=request["group_ids"],
        extra_info={},
    )
    return meta_of(drawn)


def new_rows(partition: str | None, step: int | None, count: Any) -> dict[str, Any]:
    return {
        "partition_id": partition,
        "global_step": step,
        "num_rows": whole_number("batch_size", count),
        "indexes": None,
        "generations": None,
        "keys": None,
        "tags": None,
        "group_ids": None,
        "group_size": None,
    }


def same_rows(metadata: BatchMeta) -> dict[str, Any]:
    rows = new_rows(None, None, len(metadata))
    return rows | {"indexes": metadata.indexes, "generations": metadata.generations}


def _clear(core: ClientCore, partition: str | None, step: int | None) -> Operation[int]:
    request = Clear(partition_id=partition, global_step=step, indexes=None, generations=None)
    done: Done = yield Call(core.controller, request, DEFAULT_TIMEOUT_S)
    return done.count
