"""Checks of what callers pass, at the edge: wrong types and values end here, with what to give instead."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from transfer_queue import environment
from transfer_queue.errors import InvalidArgument, WrongType
from transfer_queue.metadata import BatchMeta
from transfer_queue.wire.values import Packing

Tags: TypeAlias = "Sequence[Mapping[str, Any] | None]"

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 60.0

_ALWAYS_SENDABLE = frozenset((str, int, float, bool, type(None)))


def address(partition_id: str | int | None, global_step: int | None) -> tuple[str | None, int | None]:
    """(partition, step), exactly one of them given; an int in place of a partition is a step."""
    if isinstance(partition_id, int) and not isinstance(partition_id, bool) and global_step is None:
        partition_id, global_step = None, partition_id
    if (partition_id is None) == (global_step is None):
        raise InvalidArgument("give exactly one of partition_id and global_step")
    if partition_id is not None and not isinstance(partition_id, str):
        raise WrongType(f"partition_id must be a str, not {partition_id!r}")
    if global_step is not None and (isinstance(global_step, bool) or not isinstance(global_step, int)):
        raise WrongType(f"global_step must be an int, not {global_step!r}")
    return partition_id, global_step


def partition_name(partition_id: str | int) -> str:
    name, step = address(partition_id, None)
    return f"step_{step}" if name is None else name


def timeout_seconds(timeout: float | None) -> float:
    if timeout is None:
        return DEFAULT_TIMEOUT_S
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise WrongType(f"timeout must be a number of seconds, not {timeout!r}")
    if timeout < 0 or math.isnan(timeout):
        raise InvalidArgument(f"timeout must not be negative, not {timeout!r}")
    return float(timeout)


def data_seconds(timeout: float | None) -> float:
    """How long data is waited for: what the call says, else what TQ_SIMPLE_STORAGE_SEND_RECV_TIMEOUT does."""
    if timeout is None:
        return environment.seconds("TQ_SIMPLE_STORAGE_SEND_RECV_TIMEOUT") or DEFAULT_TIMEOUT_S
    return timeout_seconds(timeout)


def lease_seconds(lease: float | None) -> float | None:
    if lease is None:
        return None
    if isinstance(lease, bool) or not isinstance(lease, int | float):
        raise WrongType(f"lease must be a number of seconds, not {lease!r}")
    if not 0 < lease < math.inf:
        raise InvalidArgument(f"lease must be a finite number of seconds above 0, not {lease!r}")
    return float(lease)


def mapping_of(what: str, value: Mapping[str, Any] | None) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise WrongType(f"{what} must be a dict, not {value!r}")
    return dict(value or {})


def one_of(name: str, value: T | None, other_name: str, other: T | None) -> T | None:
    """The one of two names of the same argument that was given."""
    if value is not None and other is not None:
        raise InvalidArgument(f"{name} and {other_name} are two names of one argument: give one of them")
    return other if value is None else value


def names_of(what: str, names: Sequence[str], distinct: bool = True) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise WrongType(f"{what} must be a list of str, not {names!r}")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise WrongType(f"{what} must be a list of str; {wrong[0]!r} is not one")
    if distinct and len(set(names)) < len(names):
        repeated = sorted(name for name, count in Counter(names).items() if count > 1)
        raise InvalidArgument(f"{what} names something twice: {repeated[:10]}")
    return tuple(map(str, names))


def whole_number(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise WrongType(f"{name} must be an int, not {value!r}")
    if value < least:
        raise InvalidArgument(f"{name} must be at least {least}, not {value}")
    return int(value)


def agreed_rows(**sized: Any) -> int:
    """The number of rows that all of the given arguments have."""
    sizes = {
        name: value if isinstance(value, int) else len(value) for name, value in sized.items() if value is not None
    }
    if not sizes:
        raise InvalidArgument("nothing to put: give data, keys or tags")
    if len(set(sizes.values())) > 1:
        raise InvalidArgument("rows disagree: " + ", ".join(f"{name} has {size}" for name, size in sizes.items()))
    count = next(iter(sizes.values()))
    if count < 1:
        raise InvalidArgument("a put needs at least one row")
    return count


def check_meta(metadata: Any) -> None:
    if not isinstance(metadata, BatchMeta):
        raise WrongType(f"metadata must be a BatchMeta, not {type(metadata).__name__}")


def check_handle(metadata: Any, partition: Any, step: Any, keys: Any, group_ids: Any) -> None:
    check_meta(metadata)
    if keys is not None or group_ids is not None:
        raise InvalidArgument("keys and group_ids are given when rows are inserted, not with metadata")
    if step is not None:
        raise InvalidArgument("metadata names the rows already; do not give global_step as well")
    if isinstance(partition, str) and metadata and set(metadata.partition_ids) != {partition}:
        raise InvalidArgument(f"metadata is of partition {metadata.partition_ids[0]!r}, not {partition!r}")


def group_of(group: Any) -> int | str:
    if isinstance(group, bool) or not isinstance(group, int | str | np.integer):
        raise WrongType(f"a group_id is an int or str, not {group!r}")
    return group if isinstance(group, str) else int(group)


def versions_of(policy_version: int | Sequence[int] | None) -> NDArray[np.int64] | None:
    """int64, [n] if there is one per row and [] if there is one for all."""
    if policy_version is None:
        return None
    try:
        versions = np.asarray(policy_version)
    except ValueError:  # lists of several lengths
        versions = np.empty((0, 0))
    if versions.dtype.kind not in "iu" or versions.ndim > 1:
        raise WrongType(f"policy_version must be an int, or a list with one per row, not {policy_version!r:.200}")
    if versions.size and versions.min() < 0:
        raise InvalidArgument(f"policy_version must not be negative, not {int(versions.min())}")
    return versions.astype(np.int64)


def tags_of(tags: Tags | None) -> tuple[dict[str, Any] | None, ...] | None:
    if tags is None:
        return None
    wrong = [tag for tag in tags if tag is not None and not isinstance(tag, Mapping)]
    if wrong:
        raise WrongType(f"a tag must be a dict or None, not {wrong[0]!r}")
    found = tuple(sendable(tag) if tag else None for tag in tags)
    return found if any(tag for tag in found) else None


def sendable(tag: Mapping[str, Any]) -> dict[str, Any]:
    """The tag. Raises `EncodeError` for a value that other processes cannot get, also where there are none yet."""
    entries = dict(tag)
    if not _ALWAYS_SENDABLE.issuperset(map(type, entries.values())):
        Packing(allow_tensors=False).pack(entries)
    return entries


# ---------------------------------------------------------------- keys


def key_names(keys: Any, *, one: bool, distinct: bool, least: int = 1) -> tuple[str, ...]:
    """`one`: a single key may come as a str."""
    if one and isinstance(keys, str):
        keys = [keys]
    if not isinstance(keys, list | tuple):
        raise WrongType(f"keys must be a list of str{' or a str' if one else ''}, not {keys!r:.200}")
    names = names_of("keys", keys, distinct)
    if len(names) < least:
        raise InvalidArgument("keys must not be empty")
    return names


def distinct_names(what: str, names: Any) -> tuple[str, ...]:
    listed = [names] if isinstance(names, str) else list(names) if isinstance(names, set | frozenset) else names
    return tuple(dict.fromkeys(names_of(what, listed, distinct=False)))


def partition_str(partition_id: Any) -> str:
    if not isinstance(partition_id, str):
        raise WrongType(f"partition_id must be a str, not {partition_id!r}")
    return str(partition_id)


def cursor_of(since: Any) -> str | None:
    if since is not None and not isinstance(since, str):
        raise WrongType(f"since must be a cursor, as a KVDelta has it, not {since!r:.200}")
    return since
