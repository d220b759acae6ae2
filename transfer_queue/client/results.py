"""Memory for the columns of a result, filled with the rows that were picked.

Columns that lie behind each other in storage come to lie at the same distances in the result: then one copy takes
them all, however many there are. A long copy is also the faster one: beyond a size that it derives from the caches,
the C library writes past them, which takes two thirds of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from transfer_queue.client.buffers import BufferPool
from transfer_queue.storage.block import ALIGNMENT, Bytes, aligned
from transfer_queue.storage.gather import Pick, PickCopy
from transfer_queue.storage.shares import Copy, Work, run_all

BUFFER_BYTES = 1 << 29  # columns are joined up to this size, so that the pool keeps two such buffers

_GAP_BYTES = 1 << 16  # between two columns, at most: there lie offsets and other fields, which are copied for nothing


@dataclass(slots=True)
class _Run:
    """Bytes of storage that are copied as they lie."""

    memory: Bytes
    start: int
    end: int
    at: int  # where they come to lie


@dataclass(slots=True)
class _Buffer:
    """Some columns of a result in one piece of memory."""

    size_bytes: int = 0
    numbers: list[int] = field(default_factory=list)
    cuts: list[tuple[int, int]] = field(default_factory=list)  # of each: where it lies, and its size
    runs: list[_Run] = field(default_factory=list)
    picks: list[tuple[Pick, int]] = field(default_factory=list)

    def place(self, number: int, part: Pick, stored: tuple[Bytes, int] | None) -> None:
        """Add a column; those that are stored in one piece come in the order in which they are stored."""
        at = aligned(self.size_bytes)
        if stored is None:
            self.picks.append((part, at))
        else:
            at = self._append(*stored, part.size_bytes)
        self.numbers.append(number)
        self.cuts.append((at, part.size_bytes))
        self.size_bytes = at + part.size_bytes

    def _append(self, memory: Bytes, start: int, size_bytes: int) -> int:
        """Go on with the last run, or begin one; return where the column comes to lie."""
        run = self.runs[-1] if self.runs else None
        if run is None or run.memory is not memory or not 0 <= start - run.end <= _GAP_BYTES:
            run = _Run(memory, start, start, aligned(self.size_bytes) + start % ALIGNMENT)
            self.runs.append(run)
        run.end = start + size_bytes
        return run.at + start - run.start

    def works(self, memory: Bytes) -> list[Work]:
        """Return the copies that fill it."""
        works: list[Work] = []
        for run in self.runs:
            size = run.end - run.start
            works.append(Copy(memory[run.at : run.at + size], run.memory[run.start : run.end]))
        works += [PickCopy(part, memory[at : at + part.size_bytes]) for part, at in self.picks]
        return works


def copied(pool: BufferPool, parts: Sequence[Pick]) -> list[Bytes]:
    """Copy the values of each part into memory of the caller's own."""
    values: dict[int, Bytes] = {}
    works: list[Work] = []
    for buffer in _buffers(parts):
        memory, pieces = pool.take(buffer.size_bytes, buffer.cuts)
        values.update(zip(buffer.numbers, pieces, strict=True))
        works += buffer.works(memory)
    run_all(works)
    return [values[number] for number in range(len(parts))]


def _buffers(parts: Sequence[Pick]) -> list[_Buffer]:
    stored = [part.stored() for part in parts]
    in_pieces = [number for number, place in enumerate(stored) if place is None]
    runs = [(id(place[0]), place[1], number) for number, place in enumerate(stored) if place is not None]
    buffers = [_Buffer()]
    for number in [*(number for _, _, number in sorted(runs)), *in_pieces]:
        part = parts[number]
        if buffers[-1].numbers and buffers[-1].size_bytes + part.size_bytes > BUFFER_BYTES:
            buffers.append(_Buffer())
        buffers[-1].place(number, part, stored[number])
    return buffers
