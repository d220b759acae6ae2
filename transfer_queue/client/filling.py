"""Writing a block into its place: by copying on this host, in messages elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

from transfer_queue.messages import Write
from transfer_queue.storage.block import BlockPlan, Bytes, fill_block
from transfer_queue.storage.packing import MAX_FRAME_BYTES


class Filling:
    """The copy into a claimed place. It may still run in another thread when its operation was cancelled."""

    def __init__(self, plan: BlockPlan, memory: Bytes, discard: Callable[[], None]) -> None:
        self._plan = plan
        self._memory = memory
        self._discard = discard
        self._lock = threading.Lock()
        self._running = self._abandoned = False

    def run(self) -> None:
        with self._lock:
            if self._abandoned:
                return
            self._running = True
        try:
            fill_block(self._plan, self._memory)
        finally:
            with self._lock:
                self._running = False
                abandoned = self._abandoned
        if abandoned:
            self._discard()

    def abandon(self) -> None:
        """Give the place back, as soon as nothing writes to it."""
        with self._lock:
            self._abandoned = True
            if self._running:
                return
        self._discard()


def write_messages(span: int, parts: Sequence[Bytes]) -> Iterator[Write]:
    """Cut buffers that follow each other into messages of at most 8 MiB."""
    frames: list[memoryview] = []
    start = size = 0
    for part in parts:
        at = 0
        while at < part.nbytes:
            piece = part[at : at + MAX_FRAME_BYTES - size]
            frames.append(piece.data)
            at, size = at + piece.nbytes, size + piece.nbytes
            if size == MAX_FRAME_BYTES:
                yield Write(span=span, offset=start, frames=tuple(frames))
                frames, start, size = [], start + size, 0
    if frames:
        yield Write(span=span, offset=start, frames=tuple(frames))
