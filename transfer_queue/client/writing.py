"""Putting rows and removing them."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from transfer_queue.client import columns
from transfer_queue.client.answers import fields_of, locations_of, meta_of
from transfer_queue.client.arguments import (
    Tags,
    address,
    agreed_rows,
    check_handle,
    data_seconds,
    group_of,
    names_of,
    one_of,
    tags_of,
    versions_of,
    whole_number,
)
from transfer_queue.client.core import ClientCore
from transfer_queue.client.outcomes import concluded
from transfer_queue.client.parsing import DataParser, parsed
from transfer_queue.client.sharing import Sharing
from transfer_queue.client.steps import Call, Notify, Operation, Wait
from transfer_queue.client.storing import renounce, store
from transfer_queue.client.transfer import refresh
from transfer_queue.errors import BlockLost, ConnectionLost, DeadlineExceeded, InvalidArgument, TransferQueueError
from transfer_queue.messages import (
    AbortBlocks,
    Admit,
    Admitted,
    Drawn,
    Int64s,
    Location,
    Put,
    PutDone,
    Settle,
    Settled,
    Withdraw,
)
from transfer_queue.metadata import BatchMeta
from transfer_queue.storage.block import BlockPlan, EncodedColumn, plan_block
from transfer_queue.wire.peer import AnyPeer

if TYPE_CHECKING:
    from tensordict import TensorDict

T = TypeVar("T")
Data: TypeAlias = "TensorDict | Mapping[str, Any]"

_SETTLE_S = 1.0
_PAUSE_S = 0.1  # before a put whose block was lost is tried a third time


def put(
    core: ClientCore,
    data: Data | None = None,
    metadata: BatchMeta | None = None,
    partition_id: str | int | None = None,
    data_parser: DataParser | None = None,
    *,
    global_step: int | None = None,
    keys: Sequence[str] | None = None,
    tags: Tags | None = None,
    group_ids: Sequence[int | str] | None = None,
    group_size: int | None = None,
    shared_fields: Sequence[str] | None = None,
    policy_version: int | Sequence[int] | None = None,
    custom_meta: Tags | None = None,
    is_last: bool = False,
    timeout: float | None = None,
) -> Operation[BatchMeta]:
    """Write rows of fields; what was put is visible to everyone, whole, when this returns.

    Without `metadata` the rows are new, or those that have one of the `keys` already. With `metadata` the fields are
    added to its rows, and it is updated in place and returned. `data` is a `TensorDict` or a mapping of tensors (dense
    or nested), NumPy arrays or lists, one entry per row. `group_ids` tells which rows belong together, `group_size` how
    many rows a group will have (default: the controller's `num_n_samples`); `tags` are small dicts that travel with
    the metadata and merge with those that are there; `custom_meta` is another name of theirs.

    `shared_fields` have one value for all rows of a group in this put: it is stored once. They may come with an entry
    per row, of which that of the group's first row is stored, or with an entry per group, in the order in which the
    groups first appear. With `metadata` the groups are those that it knows of its rows.

    `policy_version` is that of the policy that generated the rows, one for all or one per row. A row gets it once, with
    `metadata` also later. With `limits.max_staleness`, rows that are too old already are dropped at once, and counted.

    `data_parser` gets `{field: column}`, where columns that are no dense tensors are lists, and returns it with the
    same fields and lengths, changed as it likes; that is what is stored. It runs here, before anything is sent.

    With `is_last` the partition takes no new rows from now on (`PartitionSealed`), only fields of those that are there.
    Draws that it cannot serve any more are answered without rows, with `extra_info["end_of_stream"]`, and in
    `extra_info["left"]` how many a smaller draw may still get.

    With a leased `metadata` the put is refused with `LeaseExpired` once the lease is over: whoever draws the samples
    then writes them.

    If a storage unit loses the data before it is put, the data is stored anew, until the timeout.

    Raises, with nothing visible: `StaleSampleError` if rows of `metadata` were cleared, `CapacityExceeded` if there is
    no room until the timeout, `BlockLost` if the data was lost again and again, `InvalidArgument` for rows that
    disagree in length or a changed dtype, shared fields without groups or with entries of several forms in one group,
    `UnknownName` for a shared field that is not in `data`, `EncodeError`.
    """
    timeout_s = data_seconds(timeout)
    if metadata is not None:
        check_handle(metadata, partition_id, global_step, keys, group_ids)
    groups = None if group_ids is None else tuple(group_of(group) for group in group_ids)
    sharing = _sharing(shared_fields, groups, metadata)
    tags = one_of("tags", tags, "custom_meta", custom_meta)
    versions = versions_of(policy_version)
    per_row = None if versions is None or versions.ndim == 0 else versions
    if data_parser is not None and data is not None:
        data = parsed(data, data_parser)
    num_rows, encoded = _encoded(core, data, sharing)
    if metadata is None:
        partition, step = address(partition_id, global_step)
        count = agreed_rows(data=num_rows, keys=keys, tags=tags, group_ids=group_ids, policy_version=per_row)
        request = new_rows(partition, step, count)
    else:
        count = agreed_rows(data=num_rows, metadata=metadata, tags=tags, policy_version=per_row)
        request = same_rows(metadata)
        metadata.update_custom_meta(tags)
        tags = metadata.changed_tags()
    request = request | {
        "keys": None if keys is None else names_of("keys", keys),
        "tags": tags_of(tags),
        "group_ids": groups,
        "group_size": group_size,
        "versions": None if versions is None else np.broadcast_to(versions, count).copy(),
        "is_last": bool(is_last),
    }
    finish = put_handle if metadata is None else functools.partial(_extended, metadata)
    return (yield from put_rows(core, request, encoded, timeout_s, finish))


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
    finish: Callable[[Put, PutDone], T],
) -> Operation[T]:
    """Store the columns, then commit; a put that raised leaves no space behind. Returns what `finish` makes of it.

    If the storage unit loses what was stored before that is committed, all of it is done again: once at least, and
    until the deadline.
    """
    request = request | {"columns": tuple(column.spec for column in encoded or ())}
    deadline = time.monotonic() + timeout_s
    plan = plan_block(encoded, request["num_rows"], checked=core.transfer.checksums) if encoded else None
    again = False
    while True:
        try:
            return (yield from _put_once(core, request, plan, deadline, finish))
        except BlockLost as error:
            if again and not _left_s(deadline):
                raise
            lost = error.details.get("block")
        yield from renounce(core.transfer, lost, _left_s(deadline))
        if again:
            yield Wait(Future(), _PAUSE_S)
        again = True


def _put_once(
    core: ClientCore,
    request: dict[str, Any],
    plan: BlockPlan | None,
    deadline: float,
    finish: Callable[[Put, PutDone], T],
) -> Operation[T]:
    rest: dict[str, Any] = {"block_id": 0}
    unit = None
    if plan is not None:
        admission = yield from _admission(core, request, plan.size_bytes, _left_s(deadline))
        try:
            unit, block = yield from store(core.transfer, plan, _left_s(deadline))
        except BaseException:
            if admission is not None:
                yield Notify(core.controller, Withdraw(admission=admission))
            raise
        rest = {"block_id": block, "size_bytes": plan.size_bytes, "admission": admission}
    message = Put(**request, **rest, timeout_s=_left_s(deadline))
    return (yield from concluded(core.outcomes, lambda request_id: _commit(core, message, unit, finish, request_id)))


def _admission(core: ClientCore, request: dict[str, Any], size_bytes: int, timeout_s: float) -> Operation[int | None]:
    """Wait until there is room under the limits for large new rows, before they take up memory."""
    if core.transfer.stale:
        yield from refresh(core.transfer, timeout_s)
    least = core.transfer.admit_from_bytes
    if least is None or size_bytes <= least or request["indexes"] is not None:
        return None
    ask = Admit(
        partition_id=request["partition_id"],
        global_step=request["global_step"],
        num_rows=request["num_rows"],
        size_bytes=size_bytes,
        timeout_s=timeout_s,
        keys=request["keys"],
    )
    admitted: Admitted = yield Call(core.controller, ask, timeout_s)
    return admitted.admission


def _left_s(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.0)


def _commit(
    core: ClientCore,
    message: Put,
    unit: AnyPeer | None,
    finish: Callable[[Put, PutDone], T],
    request_id: int | None,
) -> Operation[T]:
    block = np.array([message.block_id], dtype=np.int64)
    try:
        done: PutDone = yield Call(core.controller, message, message.timeout_s, request_id)
    except (ConnectionLost, DeadlineExceeded):
        raise  # it may have been applied: the block stays until that is settled
    except TransferQueueError:
        if unit is not None:
            yield Notify(unit, AbortBlocks(blocks=block))
        if message.admission is not None:
            yield Notify(core.controller, Withdraw(admission=message.admission))
        raise
    except BaseException:  # interrupted: it may have been applied
        if unit is not None:
            yield from settle(core, unit, block)
        raise
    if unit is not None:
        unit.unput.discard(message.block_id)
    return finish(message, done)


def settle(core: ClientCore, unit: AnyPeer, block: Int64s) -> Operation[None]:
    """Give the block up unless its put was applied; the controller refuses it from now on."""
    with contextlib.suppress(TransferQueueError):  # the interrupt is what the caller is to see
        settled: Settled = yield Call(core.controller, Settle(blocks=block), _SETTLE_S)
        if not settled.committed.any():
            yield Notify(unit, AbortBlocks(blocks=block))
        unit.unput.difference_update(block.tolist())


def put_handle(message: Put, done: PutDone) -> BatchMeta:
    """The put rows, as a draw of them would describe them."""
    drawn = Drawn(
        partition_id=done.partition_id,
        indexes=done.indexes,
        generations=done.generations,
        fields=tuple(spec.name for spec in message.columns),
        columns=message.columns,
        locations=_written(message),
        produced=None,
        keys=message.keys,
        tags=message.tags,
        group_ids=message.group_ids,
        extra_info={},
    )
    return meta_of(drawn)


def _extended(metadata: BatchMeta, message: Put, done: PutDone) -> BatchMeta:
    """The handle that the rows were named by, which knows now what was put."""
    metadata.mark_tags_sent(message.tags)
    metadata.add_columns(fields_of(message.columns), locations_of(_written(message)), done.generations)
    return metadata


def _written(message: Put) -> tuple[Location, ...]:
    names, count = tuple(spec.name for spec in message.columns), message.num_rows
    blocks = np.full(count, message.block_id, np.int64)
    return (Location(fields=names, blocks=blocks, slots=np.arange(count, dtype=np.int64)),) if names else ()


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
        "lease_token": None,
    }


def same_rows(metadata: BatchMeta) -> dict[str, Any]:
    rows = new_rows(None, None, len(metadata))
    if metadata.is_leased and metadata.lease_token is None:
        raise InvalidArgument(
            "metadata has rows of several leases, or with and without one, which end apart: put the rows of each "
            "lease by themselves (metadata.rows_by_lease() tells them)"
        )
    named = {"indexes": metadata.indexes, "generations": metadata.generations, "lease_token": metadata.lease_token}
    return rows | named
