"""A client that makes one operation and dies at a step of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.chaos.armed import KINDS, Tripwire, arm_messages
from tests.chaos.operations import OPERATIONS, Place, completed
from tests.chaos.roles import Order
from transfer_queue import TransferQueueClient
from transfer_queue.client import checkpoint_files, storing
from transfer_queue.metadata import ZMQServerInfo

CLIENT_KINDS = (*[kind for kind in KINDS if not kind.startswith("journal")], "write-before", "write-after")

FILE_KINDS = ("file-before", "file-after")


def act(order: Order) -> None:
    """Make the operation of an order in this process, which dies at the step that the order names."""
    operation = OPERATIONS[order.first["operation"]]
    wire = Tripwire(Path(order.control), order.name)
    arm_messages(wire)
    _arm_around(wire, "write", [(storing, "fill_block")])
    _arm_around(wire, "file", _FILE_CALLS)
    place = Place(order.first["partition"], Path(order.first["folder"]))
    with TransferQueueClient(order.name, ZMQServerInfo.from_record(order.controller)) as client:
        prepared = operation.prepare(client, place)
        path = Path(order.control) / f"trip-{order.name}"
        partial = path.with_suffix(".new")
        partial.write_text(json.dumps({"kind": order.first["kind"], "number": order.first["number"]}))
        os.rename(partial, path)
        completed(client, lambda: operation.act(client, place, prepared))
        path.unlink(missing_ok=True)


# All by which a checkpoint comes to be on the disk: folders, files, syncing, and the names in the end.
_FILE_CALLS: list[tuple[Any, str]] = [
    (Path, "mkdir"),
    (Path, "rename"),
    (shutil, "rmtree"),
    (checkpoint_files, "sync_tree"),
    (checkpoint_files.CheckpointWriter, "add"),
    (checkpoint_files.CheckpointWriter, "finish"),
]


def _arm_around(wire: Tripwire, kind: str, places: list[tuple[Any, str]]) -> None:
    """Step before and after each call of these functions."""

    def stepping(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            wire.step(f"{kind}-before")
            result = function(*args, **kwargs)
            wire.step(f"{kind}-after")
            return result

        return stepped

    for owner, name in places:
        setattr(owner, name, stepping(getattr(owner, name)))
