"""Asking about the state: what is produced, what is consumed, what is missing.

What is asked here is answered at once, so `timeout` is how long an answer that was lost, or a controller that is being
started again, is waited for: 20 s by default, and 5 s for the way.

F fields · N rows of a partition
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from transfer_queue.client.arguments import (
    DEFAULT_TIMEOUT_S,
    address,
    names_of,
    partition_name,
    timeout_seconds,
    whole_number,
)
from transfer_queue.client.core import ClientCore
from transfer_queue.client.steps import Call, Operation
from transfer_queue.errors import WrongType
from transfer_queue.messages import (
    GetAdmission,
    GetAudit,
    GetExplanation,
    GetStatus,
    ListUnits,
    RegisterSampler,
    Report,
    Status,
    UnitInfo,
    Units,
)
from transfer_queue.metadata import Role, ZMQServerInfo

if TYPE_CHECKING:
    import torch

STATUS_TIMEOUT_S = 20.0


def get_production_status(
    core: ClientCore,
    data_fields: Sequence[str] | None,
    partition_id: str | int,
    *,
    timeout: float | None = None,
) -> Operation[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Indexes [N] int64, ascending, and int8 [N, F] 0/1, fields in the order in which the partition first got them.

    (None, None) for an unknown partition or field.
    """
    names = None if data_fields is None else names_of("data_fields", data_fields)
    status = yield from _status(core, partition_id, None, names, timeout)
    if not status.exists:
        return None, None
    produced = status.production.reshape(len(status.indexes), len(status.fields))
    if len(status.indexes) and not produced.any(axis=0).all():
        return None, None
    return _ascending(status, produced)


def get_consumption_status(
    core: ClientCore, task_name: str, partition_id: str | int, *, timeout: float | None = None
) -> Operation[tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Indexes [N] int64, ascending, and int8 [N] 0/1; (None, None) for an unknown partition."""
    status = yield from _status(core, partition_id, task_name, (), timeout)
    if not status.exists or status.consumption is None:
        return None, None
    return _ascending(status, status.consumption)


def check_production_status(
    core: ClientCore, data_fields: Sequence[str], partition_id: str | int, *, timeout: float | None = None
) -> Operation[bool]:
    """Whether the partition has rows, none are to come, and all of them have these fields.

    To come are those that TQ_PRE_ALLOC_SAMPLE_NUM said at the controller when the partition began, less those that
    came.
    """
    status = yield from _status(core, partition_id, None, names_of("data_fields", data_fields), timeout)
    return _is_whole(status) and bool(status.production.all())


def check_consumption_status(
    core: ClientCore, task_name: str, partition_id: str | int, *, timeout: float | None = None
) -> Operation[bool]:
    """Whether the partition has rows, none are to come (see `check_production_status`), and the task consumed them."""
    status = yield from _status(core, partition_id, task_name, (), timeout)
    return _is_whole(status) and status.consumption is not None and bool(status.consumption.all())


def check_production_completed(
    core: ClientCore, partition_id: str | int, *, timeout: float | None = None
) -> Operation[bool]:
    """Whether the last rows of the partition were put (`is_last`)."""
    status = yield from _status(core, partition_id, None, (), timeout)
    return status.sealed


def check_stream_drained(
    core: ClientCore, task_name: str, partition_id: str | int, *, timeout: float | None = None
) -> Operation[bool]:
    """Whether the last rows of the partition were put, and the task consumed all that are there."""
    status = yield from _status(core, partition_id, task_name, (), timeout)
    return status.sealed and status.consumption is not None and bool(status.consumption.all())


def audit(
    core: ClientCore, partition_id: str | int | None = None, *, timeout: float | None = None
) -> Operation[dict[str, Any]]:
    """Accounting per partition and task, `inserted = pending + reserved + consumed + dropped`, and what is missing.

    Where a journal is kept, "journal" has its number of records and, if the last snapshot failed, "snapshot_error".
    """
    partition = None if partition_id is None else partition_name(partition_id)
    report: Report = yield Call(core.controller, GetAudit(partition_id=partition), _seconds(timeout))
    return report.entries


def admission(
    core: ClientCore, partition_id: str | int | None = None, *, timeout: float | None = None
) -> Operation[dict[str, Any]]:
    """How much more may be put, so that a producer starts no more than that.

    Returns "policy_version"; "samples" and "bytes", None where nothing bounds them; and "bounded_by", the limit that
    decides (None: none does). They are the least of what the limits leave: the total, this producer, and the
    partition if one is named. With `limits.max_staleness` and `controller.global_batch_size` samples are bounded by

        (policy_version + max_staleness + 1) × global_batch_size × num_n_samples − samples with a version so far

    less those that were dropped: what is started then is not too old when its turn comes (the rule of AReaL's
    staleness control, inclusionAI/AReaL). Nothing is reserved: what is being generated is for the producer to count.
    """
    partition = None if partition_id is None else partition_name(partition_id)
    report: Report = yield Call(core.controller, GetAdmission(partition_id=partition), _seconds(timeout))
    return report.entries


def explain(
    core: ClientCore,
    partition_id: str | int,
    task_name: str,
    data_fields: Sequence[str],
    batch_size: int = 1,
    *,
    timeout: float | None = None,
) -> Operation[str]:
    """Why a draw like this is not served now: which rows miss which field, who produced last, who holds what."""
    partition, step = address(partition_id, None)
    request = GetExplanation(
        partition_id=partition,
        global_step=step,
        task_name=task_name,
        fields=names_of("data_fields", data_fields),
        batch_size=whole_number("batch_size", batch_size),
    )
    report: Report = yield Call(core.controller, request, _seconds(timeout))
    return str(report.entries["text"])


def register_sampler(core: ClientCore, /, task_name: str | None, sampler: str, **arguments: Any) -> Operation[None]:
    """Give a task (None: every task without its own) a sampler by its registered name."""
    if not isinstance(sampler, str):
        raise WrongType(
            f"a client registers samplers by name, not {sampler!r}; instances go through the controller actor's "
            "register_sampler"
        )
    request = RegisterSampler(task_name=task_name, sampler=sampler, arguments=arguments)
    yield Call(core.controller, request, DEFAULT_TIMEOUT_S)


def storage_infos(core: ClientCore, timeout: float = DEFAULT_TIMEOUT_S) -> Operation[dict[str, ZMQServerInfo]]:
    """Endpoints of the storage units, as `TransferQueueStorageUnit#<n>`; waits until there is at least one."""
    units: Units = yield Call(core.controller, ListUnits(timeout_s=timeout), timeout)
    return {f"TransferQueueStorageUnit#{number}": _endpoint(info) for number, info in enumerate(units.units)}


# ---------------------------------------------------------------- inside


def _is_whole(status: Status) -> bool:
    return len(status.indexes) > 0 and not status.to_come


def _endpoint(unit: UnitInfo) -> ZMQServerInfo:
    host, port = unit.address.removeprefix("tcp://").rsplit(":", 1)
    return ZMQServerInfo(
        Role.STORAGE,
        unit.unit_id,
        host.strip("[]"),
        {"request": int(port)},
        local_address=unit.local_address,
        folder=unit.folder,
        nonce=unit.nonce,
    )


def _status(
    core: ClientCore,
    partition_id: str | int,
    task_name: str | None,
    fields: tuple[str, ...] | None,
    timeout: float | None,
) -> Operation[Status]:
    partition, step = address(partition_id, None)
    request = GetStatus(partition_id=partition, global_step=step, task_name=task_name, fields=fields)
    status: Status = yield Call(core.controller, request, _seconds(timeout))
    return status


def _seconds(timeout: float | None) -> float:
    return STATUS_TIMEOUT_S if timeout is None else timeout_seconds(timeout)


def _ascending(status: Status, values: Any) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    order = np.argsort(status.indexes, kind="stable")
    return torch.from_numpy(status.indexes[order]), torch.from_numpy(values[order].astype(np.int8))
