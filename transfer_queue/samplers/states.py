"""What samplers keep: `states[partition_id][task_name][dp_rank][batch_index]` is the batch of a rank.

Whatever else users put there is left alone.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

States: TypeAlias = dict[Any, Any]
Batch: TypeAlias = tuple[list[int], list[int]]


def states_of(sampler: object) -> States:
    """The states of a sampler, also of a class that did not call `super().__init__()`."""
    states: States = vars(sampler).setdefault("_states", {})
    return states


def ranks_of(states: Any, partition_id: Any, task_name: Any) -> dict[Any, Any]:
    """What is kept for the ranks of a task: {dp_rank: {batch_index: …}}; empty if there is nothing."""
    for key in (partition_id, task_name):
        states = states.get(key) if isinstance(states, dict) else None
    return states if isinstance(states, dict) else {}


def kept_of(states: Any, partition_id: Any, task_name: Any, batch_index: Any) -> dict[Any, Any]:
    """What is kept under one batch index: {dp_rank: …}."""
    ranks = ranks_of(states, partition_id, task_name)
    return {rank: kept[batch_index] for rank, kept in ranks.items() if isinstance(kept, dict) and batch_index in kept}


def keep(states: States, at: tuple[Any, Any, Any, Any], value: Any) -> None:
    """Keep a value at (partition_id, task_name, dp_rank, batch_index)."""
    *path, last = at
    for key in path:
        states = states.setdefault(key, {})
    states[last] = value


def forget(states: Any, at: tuple[Any, Any, Any, Any]) -> None:
    """Forget what is kept there, and every dict on the way that is empty then. Nothing there: no-op."""
    path = []
    for key in at:
        if not isinstance(states, dict) or key not in states:
            return
        path.append((states, key))
        states = states[key]
    for within, key in reversed(path):
        del within[key]
        if within:
            return


def batch_of(value: Any) -> Batch | None:
    """A kept value as (handed out, marked consumed) if it is such a pair, or one list of indexes."""
    pair = value if _is_pair(value) else (value, value)
    lists = [_indexes(each) for each in pair]
    return None if lists[0] is None or lists[1] is None else (lists[0], lists[1])


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and not isinstance(value[0], int | np.integer)


def _indexes(value: Any) -> list[int] | None:
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        return value.tolist()  # type: ignore[no-any-return]  # whole numbers, by its dtype
    if isinstance(value, list | tuple) and all(type(each) is int or isinstance(each, np.integer) for each in value):
        return [int(each) for each in value]
    return None
