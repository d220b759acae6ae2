"""What storage units say of themselves, asked again when somebody wants to know and the last answer is old."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeAlias

from transfer_queue.errors import TransferQueueError
from transfer_queue.messages import GetUnitStats, Report, UnitInfo
from transfer_queue.wire.peer import AnyPeer, Pending

UnitReport: TypeAlias = Mapping[str, Any]

_PATIENCE_S = 0.25
_TIMEOUT_S = 2.0


class UnitReports:
    """Calls `ask` in a thread, at most once at a time and once every `interval_s`. Thread-safe."""

    def __init__(self, ask: Callable[[], dict[str, UnitReport | None]], interval_s: float) -> None:
        self._ask = ask
        self._interval_s = interval_s
        self._lock = threading.Lock()
        self._beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transfer_queue unit reports")
        self._asked: Future[None] | None = None
        self._asked_at = 0.0
        self._latest: dict[str, UnitReport | None] = {}

    def latest(self) -> dict[str, UnitReport | None]:
        """By unit id what it said last, None if it did not answer. Waits a quarter of a second for a newer answer."""
        with self._lock:
            now = time.monotonic()
            if self._asked is None or (self._asked.done() and now - self._asked_at >= self._interval_s):
                self._asked, self._asked_at = self._beside.submit(self._refresh), now
            asked = self._asked
        done, _ = wait([asked], _PATIENCE_S)
        for each in done:
            each.result()
        return self._latest

    def close(self) -> None:
        """Wait for the answers that are under way. May be called twice."""
        self._beside.shutdown(cancel_futures=True)

    def _refresh(self) -> None:
        self._latest = self._ask()


def ask_units(units: Iterable[UnitInfo], connect: Callable[[UnitInfo], AnyPeer]) -> dict[str, UnitReport | None]:
    """Ask units how they are, all at once; None for those that do not answer within 2 s.

    `connect` makes connections whose requests get no time beyond what they ask for.
    """
    deadline = time.monotonic() + _TIMEOUT_S
    found: dict[str, UnitReport | None] = {}
    with contextlib.ExitStack() as stack:
        asked: list[tuple[str, Pending]] = []
        for info in units:
            found[info.unit_id] = None
            with contextlib.suppress(TransferQueueError):
                peer = stack.enter_context(contextlib.closing(connect(info)))
                asked.append((info.unit_id, peer.begin(GetUnitStats())))
        for unit_id, pending in asked:
            with contextlib.suppress(TransferQueueError):
                reply = pending.result(max(deadline - time.monotonic(), 0.0))
                assert isinstance(reply, Report)
                found[unit_id] = reply.entries
    return found
