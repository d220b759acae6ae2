"""What every connection to a server offers, over a socket (`channel.Peer`) or in process (`local.LocalPeer`)."""

from __future__ import annotations

from typing import Protocol

from transfer_queue.messages import Reply, Request


class Pending(Protocol):
    """A request under way. Ask for its result once."""

    @property
    def request_id(self) -> int: ...

    def result(self, timeout_s: float) -> Reply:
        """Wait for the reply, in the thread that began. `timeout_s` is what the request itself may wait for.

        Raises what the other side raised, or `ConnectionLost` if no reply came in time, plus some seconds for the way.
        """

    def cancel(self) -> None:
        """Withdraw the request instead of asking for its result."""


class AnyPeer(Protocol):
    """A server as one client sees it. Usable from any thread and any event loop."""

    @property
    def unput(self) -> set[int]:
        """Blocks that are written here and may still be put, for who writes them to keep. An abort takes them out."""

    def begin(self, request: Request, *, request_id: int | None = None) -> Pending:
        """Send a request; `request_id` names an earlier one whose outcome is open, to learn that instead."""

    async def acall(self, request: Request, timeout_s: float, *, request_id: int | None = None) -> Reply:
        """Send a request and await its reply; raises as `Pending.result`. Cancelling it withdraws the request."""

    def notify(self, request: Request) -> None:
        """Send a one-way message; it may get lost with the connection."""

    def close(self) -> None:
        """End the connection; calls under way end with `ConnectionLost`. May be called twice."""
