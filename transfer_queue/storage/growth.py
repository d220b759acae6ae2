"""New arenas, made in a thread beside, so that nobody waits who does not need them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from transfer_queue.errors import CapacityExceeded
from transfer_queue.storage.arena import Arena, Arenas, Planned
from transfer_queue.storage.beside import Beside

_RETRY_S = 1.0


class Growth:
    """One arena at a time. Every method but `close` is called with `lock` held; `grown` is called without it.

    full   why the last attempt failed; None: it did not
    """

    def __init__(
        self,
        arenas: Arenas,
        lock: threading.Lock,
        grown: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        self.full: CapacityExceeded | None = None
        self._arenas = arenas
        self._lock = lock
        self._beside = Beside(1, "tq-grow")  # its own: other work may wait for the controller
        self._grown = grown
        self._clock = clock
        self._growing = False
        self._stopped = False
        self._retry_at = 0.0

    def make_room_if_low(self) -> None:
        """Have the next arena ready before the last one is full."""
        if self._arenas.low:
            self.make_room(self._arenas.arena_bytes)

    def make_room(self, size_bytes: int) -> None:
        """Begin to make an arena with so many bytes, if there may be one more and none is on its way."""
        if self._growing or self._stopped or self._clock() < self._retry_at:
            return
        planned = self._arenas.plan_growth(size_bytes)
        if planned is not None:
            self._growing = True
            self._beside.submit(self._make, planned)

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        """Wait for the arena that is being made. May be called twice."""
        self._beside.close()

    def _make(self, planned: Planned) -> None:
        arena = full = None
        try:
            arena = self._filled(planned)
        except (CapacityExceeded, OSError) as error:
            full = error if isinstance(error, CapacityExceeded) else _not_made(planned.size_bytes, error)
        finally:
            with self._lock:
                self._growing = False
                self.full = full
                if arena is None:
                    self._arenas.give_up(planned)
                    self._retry_at = self._clock() + _RETRY_S
                else:
                    self._arenas.add(arena)
        if arena is not None:
            self._grown()

    def _filled(self, planned: Planned) -> Arena:
        arena = self._arenas.create(planned)
        try:
            arena.fill()
        except BaseException:
            arena.close()
            raise
        return arena


def _not_made(size_bytes: int, error: OSError) -> CapacityExceeded:
    return CapacityExceeded(f"cannot make an arena of {size_bytes} bytes: {error}", needed_bytes=size_bytes)
