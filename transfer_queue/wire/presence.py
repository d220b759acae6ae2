"""Which connections each client has, and which clients are gone.

A client is gone when its last connection ended and its process is dead, or when it made no new one within the grace
period: a torn connection is made anew within 50 ms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import NamedTuple

from transfer_queue.wire.holders import lives

GRACE_S = 2.0

_LOOK_AGAIN_S = 0.05  # a process that ends closes its sockets a moment before it is dead


class _Absent(NamedTuple):
    until: float
    pid: int


class Presence:
    """Told of each connection that proves the token and of each that ends; used by the server thread alone."""

    def __init__(
        self,
        *,
        grace_s: float = GRACE_S,
        clock: Callable[[], float] = time.monotonic,
        lives: Callable[[int], bool] = lives,
    ) -> None:
        self._grace_s = grace_s
        self._clock = clock
        self._lives = lives
        self._connections: dict[str, set[Hashable]] = {}
        self._absent: dict[str, _Absent] = {}
        self._next_look = 0.0

    def come(self, client_id: str, identity: Hashable) -> None:
        """A connection of this client is there."""
        self._connections.setdefault(client_id, set()).add(identity)
        self._absent.pop(client_id, None)

    def leave(self, client_id: str, identity: Hashable, pid: int) -> None:
        """A connection ended. `pid`: of the process behind it, 0 if that is not known."""
        if self.overlook(client_id, identity) and client_id not in self._connections:
            self._next_look = self._clock()
            self._absent[client_id] = _Absent(self._next_look + self._grace_s, pid)

    def overlook(self, client_id: str, identity: Hashable) -> bool:
        """Do not watch this connection any more, whether it is there or not; return whether it was watched."""
        connections = self._connections.get(client_id, set())
        watched = identity in connections
        connections.discard(identity)
        if not connections:
            self._connections.pop(client_id, None)
        return watched

    def connections(self, client_id: str) -> tuple[Hashable, ...]:
        return tuple(self._connections.get(client_id, ()))

    def take_gone(self) -> list[str]:
        """Return the clients that are gone since the last call."""
        now = self._clock() if self._absent else 0.0
        if not self._absent or now < self._next_look:
            return []
        self._next_look = now + _LOOK_AGAIN_S
        alive = {pid: self._lives(pid) for pid in {absent.pid for absent in self._absent.values()}}
        gone = [name for name, absent in self._absent.items() if absent.until <= now or not alive[absent.pid]]
        for name in gone:
            del self._absent[name]
        return gone

    def due_s(self) -> float | None:
        """Seconds until `take_gone` has to look again; None: nobody is missed."""
        return max(0.0, self._next_look - self._clock()) if self._absent else None
