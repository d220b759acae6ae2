"""Getting rows: draws, look-ups, data.

B rows of a meta
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from transfer_queue import environment
from transfer_queue.client import columns, transfer
from transfer_queue.client.answers import meta_of
from transfer_queue.client.arguments import (
    DEFAULT_TIMEOUT_S,
    address,
    data_seconds,
    lease_seconds,
    mapping_of,
    names_of,
    partition_name,
    timeout_seconds,
    whole_number,
)
from transfer_queue.client.core import ClientCore, Defaults
from transfer_queue.client.outcomes import concluded
from transfer_queue.client.steps import Call, Operation
from transfer_queue.client.writing import new_rows, put_handle, put_rows
from transfer_queue.config import layout_in_force
from transfer_queue.errors import GetMetaTimeout, InvalidArgument, StaleSampleError, UnknownName, WrongType
from transfer_queue.messages import Draw, Drawn, ListPartitions, Locate, Location, Names
from transfer_queue.metadata import BatchMeta

_MODES = ("fetch", "insert", "force_fetch")


def get_meta(
    core: ClientCore,
    data_fields: Sequence[str],
    batch_size: int,
    partition_id: str | int | None = None,
    mode: str = "fetch",
    task_name: str | None = None,
    sampling_config: Mapping[str, Any] | None = None,
    *,
    global_step: int | None = None,
    get_n_samples: bool = False,
    sampler_params: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    lease: float | None = None,
) -> Operation[BatchMeta]:
    """Draw `batch_size` samples that have all `data_fields` and that the task did not consume yet.

    Addressed by `partition_id` or `global_step` (an int in the third place is a step). The task's sampler chooses;
    `sampler_params` (or `sampling_config`) goes to it: `dp_rank`, `dp_size`, `dp_group_id` split one choice over ranks,
    `sampler` names another sampler. With `get_n_samples` whole groups are drawn.

    Without `lease` the samples count as consumed by the task when this returns. With it they are held for so many
    seconds: `ack` consumes them, `release` gives them back, `renew` keeps them for longer; at the end of the lease, or
    when this process dies, they are handed out again. What is put with a leased meta is refused once the lease is over.

    mode      "fetch" as above; "force_fetch" all rows of the partition as they are, consuming nothing, with
              `production_status` per row; "insert" allocates `batch_size` new rows without data
    timeout   seconds to wait; 0: do not wait. `None`: TQ_CONTROLLER_GET_METADATA_TIMEOUT, or else what the queue was
              configured with, which is 60; with `polling_mode` 0

    Where the queue is configured with `polling_mode`, a draw that is not served in time returns an empty meta. So does,
    with `extra_info["end_of_stream"]`, one of a partition whose last rows were put and that has too few left. Otherwise
    raises `GetMetaTimeout` saying what is missing; `InvalidArgument` at once for a draw that can never be served.
    """
    partition, step = address(partition_id, global_step)
    timeout_s = timeout_seconds(timeout)
    fields = names_of("data_fields", data_fields)
    lease_s = lease_seconds(lease)
    if lease_s is not None and mode != "fetch":
        raise InvalidArgument(f"mode {mode!r} takes no lease: only samples that a draw hands out are leased")
    if mode == "insert":
        inserted = yield from put_rows(core, new_rows(partition, step, batch_size), None, timeout_s, put_handle)
        return _with_empty_fields(inserted, fields)
    if mode == "force_fetch":
        return meta_of((yield Call(core.controller, _whole_partition(partition, step, fields), timeout_s)))
    if mode != "fetch":
        raise InvalidArgument(f"unknown mode {mode!r} (known: {', '.join(_MODES)})")
    if not task_name:
        raise InvalidArgument("get_meta needs a task_name: consumption is tracked per task")
    draw = Draw(
        partition_id=partition,
        global_step=step,
        task_name=task_name,
        fields=fields,
        batch_size=whole_number("batch_size", batch_size),
        get_n_samples=bool(get_n_samples),
        sampler_params=mapping_of("sampling_config", sampling_config) | mapping_of("sampler_params", sampler_params),
        timeout_s=timeout_s if timeout is not None else _default_wait(core.defaults),
        lease_s=lease_s,
    )
    asked_s = time.monotonic()
    try:
        return (yield from concluded(core.outcomes, lambda request_id: _drawn(core, draw, asked_s, request_id)))
    except GetMetaTimeout:
        if not core.defaults.polling_mode:
            raise
        return BatchMeta.empty()


def get_data(
    core: ClientCore,
    metadata: BatchMeta,
    fields: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    copy: bool = True,
    *,
    layout: str | None = None,
    strict: bool | None = None,
    allow_missing: bool = False,
    verify: bool = False,
    timeout: float | None = None,
) -> Operation[Any]:
    """Read the fields of the meta (or the named ones) into a `TensorDict` [B], rows in the order of the meta.

    The result is writable and shares memory with nothing, whatever `copy` says. With `copy=False`, fields whose rows
    lie together on this host are private copy-on-write views of shared memory instead of copies; their space is not
    reused before they are garbage-collected. `layout`: "as_put" (dense stays dense, ragged becomes jagged), "jagged"
    or "dense"; `None`: TQ_LAYOUT, or else what the queue was configured with. Each field has memory of its own and
    pickles to its own size; a slice that PyTorch makes of it is a view, which takes the field along unless cloned.

    With `allow_missing` returns (data [n], mask): the n rows that have all the fields now, in order, and a bool tensor
    [B] that says which of the rows of the meta those are. Without it whatever is missing raises, as `strict` asks of
    reads by key; for a meta it changes nothing.

    With `verify` the bytes are compared with the checksums that they were written with: `DecodeError` names field and
    block that differ, or were written by a client without `checksums`.

    Raises `StaleSampleError` if rows were cleared, `UnknownName` or `InvalidArgument` for fields that do not exist or
    are not produced for all rows.
    """
    timeout_s = data_seconds(timeout)
    layout = layout_in_force(layout, core.layout)
    wanted = tuple(metadata.field_names) if fields is None else names_of("fields", fields)
    mask = None
    if allow_missing:
        mask = yield from _produced(core, metadata, wanted, timeout_s)
        metadata = metadata.select_samples(np.flatnonzero(mask))
    if len(metadata) and wanted:
        how = {"copy": copy, "verify": verify}
        found = yield from _load(core, metadata, wanted, timeout_s, how)
        data = columns.decode(found, len(metadata), layout=layout, allow_pickle=core.allow_pickle)
    else:
        data = columns.empty()
    data = data if device is None else data.to(device)
    return data if mask is None else (data, torch.from_numpy(mask))


def kv_retrieve_meta(
    core: ClientCore, keys: Sequence[str] | str, partition_id: str, create: bool = False
) -> Operation[BatchMeta]:
    """A handle on the rows with these keys, in key order, with the fields that all of them have.

    Missing keys are left out, or made (as rows without data) if `create`.
    """
    names = names_of("keys", [keys] if isinstance(keys, str) else keys, distinct=create)
    if not names:
        raise InvalidArgument("keys must not be empty")
    if create:
        request = new_rows(partition_name(partition_id), None, len(names)) | {"keys": names}
        yield from put_rows(core, request, None, DEFAULT_TIMEOUT_S, put_handle)
    request_rows = Locate(
        partition_id=partition_id,
        global_step=None,
        indexes=None,
        generations=None,
        keys=names,
        fields=None,
        allow_missing=True,
    )
    return meta_of((yield Call(core.controller, request_rows, DEFAULT_TIMEOUT_S)))


def kv_retrieve_keys(core: ClientCore, global_indexes: Sequence[int] | int, partition_id: str) -> Operation[list[str]]:
    """The keys of these rows, in order. Raises `UnknownName` for a row without one, or of another partition."""
    rows = np.atleast_1d(np.asarray(global_indexes))
    if len(rows) and rows.dtype.kind not in "iu":
        raise WrongType(f"global_indexes must be ints, not {global_indexes!r:.200}")
    rows = rows.astype(np.int64)
    if not len(rows):
        raise InvalidArgument("global_indexes must not be empty")
    request = Locate(partition_id=partition_id, global_step=None, indexes=rows, generations=None, keys=None, fields=())
    drawn: Drawn = yield Call(core.controller, request, DEFAULT_TIMEOUT_S)
    keys = drawn.keys or (None,) * len(rows)
    without = [int(row) for row, key in zip(rows, keys, strict=True) if key is None]
    if without:
        raise UnknownName(f"{len(without)} of {len(rows)} samples have no key in {partition_id!r}: {without[:10]}")
    return [key for key in keys if key is not None]


def get_partition_list(core: ClientCore) -> Operation[list[str]]:
    """Names of the partitions, in creation order."""
    names: Names = yield Call(core.controller, ListPartitions(), DEFAULT_TIMEOUT_S)
    return list(names.names)


# ---------------------------------------------------------------- inside


def _default_wait(defaults: Defaults) -> float:
    if defaults.polling_mode:
        return 0.0
    return environment.seconds("TQ_CONTROLLER_GET_METADATA_TIMEOUT") or defaults.get_meta_timeout_s


def _drawn(core: ClientCore, draw: Draw, asked_s: float, request_id: int | None) -> Operation[BatchMeta]:
    drawn: Drawn = yield Call(core.controller, draw, draw.timeout_s, request_id)
    return meta_of(drawn, asked_s)


def _locate(core: ClientCore, metadata: BatchMeta, fields: tuple[str, ...], timeout_s: float) -> Operation[Any]:
    drawn: Drawn = yield Call(core.controller, _rows_of(metadata, fields), timeout_s)
    return drawn.locations


def _rows_of(metadata: BatchMeta, fields: tuple[str, ...], allow_missing: bool = False) -> Locate:
    return Locate(
        partition_id=None,
        global_step=None,
        indexes=metadata.indexes,
        generations=metadata.generations,
        keys=None,
        fields=fields,
        allow_missing=allow_missing,
    )


def _produced(core: ClientCore, metadata: BatchMeta, fields: tuple[str, ...], timeout_s: float) -> Operation[Any]:
    """Which rows have all these fields now, [B] bool."""
    drawn: Drawn = yield Call(core.controller, _rows_of(metadata, fields, allow_missing=True), timeout_s)
    return np.ones(len(metadata), np.bool_) if drawn.produced is None else drawn.produced.astype(np.bool_)


def _load(
    core: ClientCore, metadata: BatchMeta, fields: tuple[str, ...], timeout_s: float, how: dict[str, bool]
) -> Operation[Any]:
    locations = _known_locations(metadata, fields)
    if locations is None:
        locations = yield from _locate(core, metadata, fields, timeout_s)
    try:
        return (yield from transfer.load(core.transfer, locations, fields, timeout_s, **how))
    except StaleSampleError:
        # A block is gone: because the rows were cleared (asking again says so), or because a field was written anew.
        locations = yield from _locate(core, metadata, fields, timeout_s)
        return (yield from transfer.load(core.transfer, locations, fields, timeout_s, **how))


def _known_locations(metadata: BatchMeta, fields: tuple[str, ...]) -> tuple[Location, ...] | None:
    """The meta's own knowledge of where these fields lie; None if it does not know all."""
    chosen = []
    for known in metadata.locations:
        names = tuple(name for name in known.fields if name in fields)
        if names:
            if not known.blocks.all():
                return None
            chosen.append(Location(fields=names, blocks=known.blocks, slots=known.slots))
    found = {name for location in chosen for name in location.fields}
    return tuple(chosen) if found.issuperset(fields) else None


def _whole_partition(partition: str | None, step: int | None, fields: tuple[str, ...]) -> Locate:
    return Locate(
        partition_id=partition,
        global_step=step,
        indexes=None,
        generations=None,
        keys=None,
        fields=fields,
        allow_missing=True,
    )


def _with_empty_fields(meta: BatchMeta, fields: tuple[str, ...]) -> BatchMeta:
    """A handle on rows of which nothing is produced yet."""
    meta.field_schema = {name: {} for name in fields}
    meta.production_status = np.zeros(len(meta), dtype=np.int8)
    return meta
