"""Arenas of units of this host, mapped into this process."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable, Sequence

from transfer_queue.errors import ConnectionLost
from transfer_queue.storage.arena import is_on_disk
from transfer_queue.storage.gather import Pick
from transfer_queue.storage.mapping import Bytes, map_file, map_privately

_VIEW_BYTES = 1 << 16  # smaller columns are copied


class ArenaMaps:
    """Each arena is mapped once, shared. Thread-safe, and valid after a fork."""

    def __init__(self) -> None:
        self._known: dict[str, Bytes] = {}

    def __repr__(self) -> str:
        return f"<ArenaMaps: {len(self._known)} arenas>"

    def view(self, path: str) -> Bytes:
        """Return all bytes of an arena. Raises `ConnectionLost` if its unit removed it."""
        known = self._known.get(path)
        if known is None:
            for other in [other for other in list(self._known) if not os.path.exists(other)]:
                self._known.pop(other, None)
            descriptor = _open(path, os.O_RDWR)
            try:
                known = self._known[path] = map_file(descriptor, os.fstat(descriptor).st_size)
            finally:
                os.close(descriptor)
        return known

    def path_of(self, memory: Bytes) -> str | None:
        """Return the file of an arena that `view` returned; None for other memory."""
        return next((path for path, known in list(self._known.items()) if known is memory), None)

    def clear(self) -> None:
        """Forget all mappings; each ends with its last view."""
        self._known.clear()


class Hold:
    """Something that ends when the last private view that carries it is gone."""

    __slots__ = ("__weakref__",)


def private_views(maps: ArenaMaps, parts: Sequence[Pick], hold: Hold) -> list[Bytes | None]:
    """Map the values of each part copy-on-write: writable, and writes stay in the view. Once for all of an arena.

    None for a part that does not lie in one piece of an arena, or is small: it is to be copied.
    """
    places = [_place(maps, part) for part in parts]
    reach: dict[str, tuple[int, int]] = {}
    for part, place in zip(parts, places, strict=True):
        if place is not None:
            path, start = place
            low, high = reach.get(path, (start, start))
            reach[path] = min(low, start), max(high, start + part.size_bytes)
    mapped = {path: _map_part(path, low, high - low, hold) for path, (low, high) in reach.items()}
    views: list[Bytes | None] = []
    for part, place in zip(parts, places, strict=True):
        if place is None:
            views.append(None)
        else:
            path, start = place
            at = start - reach[path][0]
            views.append(mapped[path][at : at + part.size_bytes])
    return views


def _place(maps: ArenaMaps, part: Pick) -> tuple[str, int] | None:
    """Return the arena and the offset in it where the values of a part lie in one piece."""
    stored = part.stored() if part.size_bytes >= _VIEW_BYTES else None
    path = None if stored is None else maps.path_of(stored[0])
    return None if stored is None or path is None else (path, stored[1])


def _map_part(path: str, start: int, size_bytes: int, hold: Hold) -> Bytes:
    descriptor = _open(path, os.O_RDONLY)
    try:
        return map_privately(descriptor, start, size_bytes, hold)
    finally:
        os.close(descriptor)


class Releaser:
    """Runs what is due when holds end, in a thread of its own: garbage collection may strike while locks are held.

    A forked child has the holds of its parent too. Their end there means nothing: the parent has what they stand for.
    """

    def __init__(self) -> None:
        self._due: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def hold(self, release: Callable[[], None]) -> Hold:
        """Return a hold; `release` is called once it is gone from this process."""
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="tq-unpin", daemon=True)
                self._thread.start()
        hold = Hold()
        weakref.finalize(hold, self._due.put, (os.getpid(), release)).atexit = False
        return hold

    def close(self) -> None:
        """Run what is due by now, and stop. May be called twice."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._due.put(None)
            thread.join()

    def _run(self) -> None:
        while (due := self._due.get()) is not None:
            owner, release = due
            if owner == os.getpid():
                with contextlib.suppress(ConnectionLost):  # then there is nothing left to release
                    release()


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except FileNotFoundError as error:
        text = f"the storage unit of {path} is gone, and its arenas with it"
        if is_on_disk(os.path.basename(path)):
            text += "; or backend.SimpleStorage.ssd_offload.path is another folder to this process than to the unit"
        raise ConnectionLost(text) from error
