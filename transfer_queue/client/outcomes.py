"""Calls whose outcome is open, because the connection broke after their last request was sent."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

from transfer_queue.client.steps import Operation
from transfer_queue.errors import ConnectionLost

R = TypeVar("R")
Ending: TypeAlias = Callable[[int | None], Operation[Any]]  # of the request id, if it was sent before

_MOST_OPEN = 256


class OpenOutcomes:
    """How to end such calls, by request id: the last 256 of this process. Thread-safe."""

    def __init__(self) -> None:
        self._endings: OrderedDict[int, Ending] = OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<OpenOutcomes: {len(self._endings)}>"

    def keep(self, request_id: int, ending: Ending) -> None:
        self._leave_to_parent()
        with self._lock:
            self._endings[request_id] = ending
            if len(self._endings) > _MOST_OPEN:
                self._endings.popitem(last=False)

    def take(self, request_id: int | None) -> Ending | None:
        """None: the outcome of this request is not open."""
        self._leave_to_parent()
        with self._lock:
            return None if request_id is None else self._endings.pop(request_id, None)

    def _leave_to_parent(self) -> None:
        """After a fork: request ids belong to the parent's connections, and the lock may be held for ever."""
        if os.getpid() != self._pid:
            self._pid, self._lock, self._endings = os.getpid(), threading.Lock(), OrderedDict()


def concluded(
    outcomes: OpenOutcomes, ending: Callable[[int | None], Operation[R]], request_id: int | None = None
) -> Operation[R]:
    """Run the end of a call: the one request that changes something, and what is done with its reply.

    `ending` gets the id of the request if it is not sent for the first time. If its outcome stays open it is kept, so
    that it can be run again.
    """
    try:
        return (yield from ending(request_id))
    except ConnectionLost as error:
        number = error.details.get("request_id")
        if number is not None:
            outcomes.keep(number, ending)
        raise
