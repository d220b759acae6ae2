"""Making the state of a checkpoint fit for a queue that has gone on since, or for another one.

Rows, consumption, groups, samplers and counters are those of the cut, and so is how often each row was given back.
Blocks have new ids, because their bytes were written anew. Every slot begins a new life, so that handles from before,
on either side, are stale. Leases are over: their rows are ready again, which does not count as given back, and slices
of data-parallel ranks wait for their rank. Draws cannot be undone any more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger.state import State
from transfer_queue.ledger.table import FREE

Int64s: TypeAlias = NDArray[np.int64]
_Renew: TypeAlias = Callable[[Any], tuple[Int64s, Int64s]]

_DEAD = -2  # a generation that no row ever has


def restorable(state: State, live: State, old: Int64s, new: Int64s) -> State:
    """Return the state to load in place of `live`. `state` is used up; block `old[i]` of it is `new[i]` now.

    Raises `InvalidArgument` if the queue has other step windows than the one that was saved, or a block is missing.
    """
    theirs, ours = len(state["rows"]["windows"]), len(live["rows"]["windows"])
    if theirs != ours:
        raise InvalidArgument(
            f"the checkpoint has {theirs} step windows, this queue {ours}: start it with the same num_global_batch"
        )
    table, saved = state["rows"]["table"], state["rows"]["table"]["generation"]
    alive = table["partition"] != FREE
    renewed = _renewed(saved, live["rows"]["table"]["generation"])
    table["generation"], state["rows"]["beyond"] = renewed[: len(saved)], renewed[len(saved) :]

    def renew(handle: Any) -> tuple[Int64s, Int64s]:
        rows, generations = handle
        same = alive[rows] & (saved[rows] == generations)
        return rows, np.where(same, table["generation"][rows], _DEAD)

    _end_leases(state, live)
    for assignment in state["pool"]:
        assignment["chosen"], assignment["held"] = renew(assignment["chosen"]), renew(assignment["held"])
        assignment["tokens"] = [[], []]
    state["draws"] = []
    _rename_blocks(state, live, old, new)
    return state


def _renewed(saved: Int64s, live: Int64s) -> Int64s:
    """Above every generation that either side has given out."""
    renewed = np.zeros(max(len(saved), len(live)), np.int64)
    renewed[: len(saved)] = saved
    renewed[: len(live)] = np.maximum(renewed[: len(live)], live)
    return renewed + 1


def _end_leases(state: State, live: State) -> None:
    """Rows under a lease go back, as if released; tokens are never used twice."""
    tasks = {task["name"]: task for task in state["rows"]["table"]["tasks"]}
    accounts = _accounts(state)
    turns = {tuple(key): (count, set(returned.tolist())) for *key, count, returned in state["assignments"]["turns"]}
    for head, rows, _, marked, settled, assignment, rank in state["leases"]["open"]:
        still = settled == 0
        _, _, partition, task, _, _ = head
        released = accounts[partition, task]
        released["released"] = released.get("released", 0) + int(still.sum())
        if assignment < 0:
            reserved = tasks[task]["reserved"] = np.array(tasks[task]["reserved"])
            reserved[rows[0][still & marked]] = False
        elif state["pool"][assignment]["key"][0] == "counted":  # a rank that names no group gets its slice again
            turns[partition, task, rank][1].add(state["pool"][assignment]["key"][2])
    state["assignments"]["turns"] = [
        (*key, count, np.array(sorted(returned), np.int64)) for key, (count, returned) in turns.items()
    ]
    state["leases"] = {
        "open": [],
        "ended": live["leases"]["ended"],
        "next_token": max(state["leases"]["next_token"], live["leases"]["next_token"]),
    }


def _accounts(state: State) -> dict[tuple[str, str], dict[str, int]]:
    """The lease counters of each (partition, task)."""
    return {
        (partition["name"], account[0]): account[3]
        for partition in state["rows"]["partitions"]
        for account in partition["accounts"]
    }


def _rename_blocks(state: State, live: State, old: Int64s, new: Int64s) -> None:
    order = np.argsort(old)
    known, renamed = old[order], new[order]

    def rename(blocks: Int64s) -> Int64s:
        at = np.searchsorted(known, blocks).clip(max=max(len(known) - 1, 0))
        found = blocks == 0 if len(known) == 0 else (blocks == 0) | (known[at] == blocks)
        if not found.all():
            missing = np.unique(blocks[~found])[:5].tolist()
            raise InvalidArgument(f"the checkpoint has no bytes of blocks {missing}, which its state needs")
        return np.where(blocks == 0, 0, renamed[at]) if len(known) else blocks

    table, blocks = state["rows"]["table"], state["rows"]["blocks"]
    table["columns"] = [
        (name, number, ready, rename(block), slot) for name, number, ready, block, slot in table["columns"]
    ]
    blocks["blocks"] = rename(blocks["blocks"])
    blocks["refused"] = live["rows"]["blocks"]["refused"]
    blocks["orders"] = live["rows"]["blocks"]["orders"]
    usage = state["usage"]
    if usage is not None:
        names = rename(np.array([block for block, *_ in usage["blocks"]], np.int64)).tolist()
        usage["blocks"] = [(name, *rest) for name, (_, *rest) in zip(names, usage["blocks"], strict=True)]
