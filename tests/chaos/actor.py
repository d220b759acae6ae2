"""A client that makes one operation and dies at a step of it."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from tests.chaos.armed import KINDS, Tripwire, arm_messages
from tests.chaos.operations import OPERATIONS, Place, completed
from tests.chaos.roles import Order
from transfer_queue import TransferQueueClient
from transfer_queue.client import storing
from transfer_queue.metadata import ZMQServerInfo

CLIENT_KINDS = (*[kind for kind in KINDS if not kind.startswith("journal")], "write-before", "write-after")


def act(order: Order) -> None:
    """Make the operation of an order in this process, which dies at the step that the order names."""
    operation = OPERATIONS[order.first["operation"]]
    wire = Tripwire(Path(order.control), order.name)
    arm_messages(wire)
    _arm_writing(wire)
    place = Place(order.first["partition"], Path(order.first["folder"]))
    with TransferQueueClient(order.name, ZMQServerInfo.from_record(order.controller)) as client:
        prepared = operation.prepare(client, place)
        path = Path(order.control) / f"trip-{order.name}"
        partial = path.with_suffix(".new")
        partial.write_text(json.dumps({"kind": order.first["kind"], "number": order.first["number"]}))
        os.rename(partial, path)
        completed(client, lambda: operation.act(client, place, prepared))
        path.unlink(missing_ok=True)


def _arm_writing(wire: Tripwire) -> None:
    """Step before and after the bytes of a put are written and sealed."""
    fill = storing.fill_block

    @functools.wraps(fill)
    def filling(*args: Any, **kwargs: Any) -> Any:
        wire.step("write-before")
        filled = fill(*args, **kwargs)
        wire.step("write-after")
        return filled

    storing.fill_block = filling
