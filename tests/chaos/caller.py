"""A client whose calls are written down before they are made and when they have ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.chaos.sidelog import OK, SideLog
from transfer_queue import TransferQueueClient
from transfer_queue.errors import ConnectionLost, InvalidArgument, TransferQueueError
from transfer_queue.metadata import BatchMeta

MOST_RESENDS = 4
NOTHING_OPEN = "NothingOpen"  # the error left no outcome open: the call changed nothing

_CHANGES = frozenset({"put", "score", "draw", "ack", "release", "clear"})


class Caller:
    """Logs each call; one that broke off is asked for again under its request id, up to four times."""

    def __init__(self, client: TransferQueueClient, log: SideLog) -> None:
        self.client = client
        self.log = log

    def call(self, op: str, function: Callable[..., Any], *args: Any, timeout_s: float, **facts: Any) -> Any:
        """Call `function(*args)`, which waits at most `timeout_s`. Returns and raises what it does."""
        number = self.log.begin(op, timeout_s, **facts)
        try:
            result = function(*args)
        except ConnectionLost as error:
            self._failed(number, error)
            if op not in _CHANGES:
                raise
            result = self._resend(op, number, error, timeout_s)
        except TransferQueueError as error:
            self._failed(number, error)
            raise
        else:
            self.log.end(number, OK, **_facts_of(result))
        return result

    def _resend(self, op: str, first: int, error: ConnectionLost, timeout_s: float) -> Any:
        for _ in range(MOST_RESENDS):
            number = self.log.begin(op, timeout_s, of=first)
            try:
                result = self.client.resend(error)
            except InvalidArgument as nothing:
                if "left no outcome open" not in nothing.message:
                    self._failed(number, nothing)
                    raise
                self.log.end(number, NOTHING_OPEN)
                raise error from None
            except ConnectionLost as again:
                self._failed(number, again)
                error = again
            except TransferQueueError as outcome:
                self._failed(number, outcome)
                raise
            else:
                self.log.end(number, OK, **_facts_of(result))
                return result
        raise error

    def _failed(self, number: int, error: TransferQueueError) -> None:
        self.log.end(number, type(error).__name__, message=error.message)


def _facts_of(result: Any) -> dict[str, Any]:
    if isinstance(result, BatchMeta):
        return {
            "keys": result.keys,
            "rows": list(zip(result.indexes.tolist(), result.generations.tolist(), strict=True)),
            "token": result.lease_token,
            "deliveries": result.extra_info.get("deliveries"),
            "replayed": bool(result.extra_info.get("replayed")),
        }
    return {"count": result} if isinstance(result, int) else {}
