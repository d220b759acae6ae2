"""Threads for work that nobody waits for: what it raises would lie in a future that nobody looks at."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

log = logging.getLogger(__name__)


class Beside:
    """Work that is to handle the errors that it expects; any other is logged, each kind once."""

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(max_workers=threads, thread_name_prefix=name)
        self._logged: set[tuple[str, type[BaseException]]] = set()

    def submit(self, work: Callable[..., None], *arguments: Any) -> None:
        """Raises `RuntimeError` after `close`."""
        name = work.__qualname__
        self._pool.submit(work, *arguments).add_done_callback(lambda done: self._look_at(name, done))

    def close(self) -> None:
        """Drop what has not begun, and wait for the rest. May be called twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _look_at(self, name: str, done: Future[None]) -> None:
        error = None if done.cancelled() else done.exception()
        if error is not None and (name, type(error)) not in self._logged:
            self._logged.add((name, type(error)))
            log.error("%s failed; more of this kind are not logged", name, exc_info=error)
