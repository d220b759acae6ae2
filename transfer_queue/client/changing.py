"""Changes that bring no data: tags, groups, versions, and removing rows."""

from __future__ import annotations

import logging

from transfer_queue.client.arguments import address, partition_name, tags_of, whole_number
from transfer_queue.client.core import ClientCore, changed
from transfer_queue.client.steps import Operation
from transfer_queue.messages import AbortGroup, Clear, ResetConsumption, SealGroup, SetTags, SetVersion
from transfer_queue.metadata import BatchMeta

log = logging.getLogger("transfer_queue")


def set_custom_meta(core: ClientCore, metadata: BatchMeta) -> Operation[None]:
    """Merge the tag entries changed in this meta into the rows."""
    tags = tags_of(metadata.changed_tags())
    if tags is not None:
        request = SetTags(indexes=metadata.indexes, generations=metadata.generations, tags=tags)
        yield from changed(core, request)
        metadata.mark_tags_sent(tags)


def set_policy_version(core: ClientCore, version: int) -> Operation[int]:
    """The policy has this version from now on, 0 at first; what is put says of which version it is (`policy_version`).

    With `limits.max_staleness`, samples whose version is lower by more than that are not handed out any more: they are
    dropped as "stale", those that somebody has when they come back, and `audit()` counts them by producer and by their
    tag "source". Samples that every task of the partition consumed stay until they are cleared. Returns how many were
    dropped now. Setting the same version again changes nothing; a lower one raises `InvalidArgument`.
    """
    return (yield from changed(core, SetVersion(version=whole_number("version", version, least=0))))


def seal_group(core: ClientCore, group_id: int | str, partition_id: str | int) -> Operation[None]:
    """The group gets no more rows: it is complete with those it has."""
    yield from changed(core, SealGroup(partition_id=partition_name(partition_id), group_id=group_id))


def abort_group(
    core: ClientCore, group_id: int | str, partition_id: str | int, reason: str = "group_aborted"
) -> Operation[int]:
    """Drop all rows of the group, accounted under `reason`; later rows for it are refused. Returns their number.

    The last 16384 aborted groups of a partition are remembered.
    """
    request = AbortGroup(partition_id=partition_name(partition_id), group_id=group_id, reason=reason)
    return (yield from changed(core, request))


def clear(core: ClientCore, global_step: int) -> Operation[int]:
    """Remove all samples of a step; its window may be used by a later step. Returns their number."""
    return (yield from _clear(core, *address(None, global_step)))


def clear_partition(core: ClientCore, partition_id: str) -> Operation[int]:
    """Remove a partition with all its samples; an unknown one is no error. Returns the number of samples."""
    return (yield from _clear(core, *address(partition_id, None)))


def clear_samples(core: ClientCore, metadata: BatchMeta) -> Operation[int]:
    """Remove the rows of the meta; those that are gone already are left out. Returns the number of those removed."""
    if len(metadata) == 0:
        return 0
    request = Clear(partition_id=None, global_step=None, indexes=metadata.indexes, generations=metadata.generations)
    count = yield from changed(core, request)
    if count < len(metadata):
        log.debug("%d of %d samples to clear were gone already", len(metadata) - count, len(metadata))
    return count


def reset_consumption(core: ClientCore, partition_id: str | int, task_name: str | None = None) -> Operation[bool]:
    """Give back what the task (None: every task) consumed or reserved in the partition; data stays."""
    partition, step = address(partition_id, None)
    yield from changed(core, ResetConsumption(partition_id=partition, global_step=step, task_name=task_name))
    return True


def _clear(core: ClientCore, partition: str | None, step: int | None) -> Operation[int]:
    return (yield from changed(core, Clear(partition_id=partition, global_step=step, indexes=None, generations=None)))
