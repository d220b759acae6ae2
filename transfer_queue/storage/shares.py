"""Work on many bytes, shared out among threads: one core alone does not move them as fast as the memory could.

NumPy releases the interpreter lock while it copies. Each thread gets one consecutive share, because a long run of
bytes is copied faster than many short ones. The threads live as long as the work does: to start one takes less than a
tenth of what its smallest share takes, and nothing is left to look after in a forked child or at the end.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue import environment

Bytes: TypeAlias = NDArray[np.uint8]

SHARE_BYTES = 4 << 20  # at least, for each thread
MAX_THREADS = 4

_PART_BYTES = 4096
_THREAD_NAME = "tq-share"


class Work(Protocol):
    """Something to do with bytes, in parts of about one size that any thread can do in any order."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def parts(self) -> int: ...

    def run(self, begin: int, end: int) -> None:
        """Do the parts [begin, end)."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes on their way from one place to another."""

    target: Bytes
    source: Bytes

    @property
    def size_bytes(self) -> int:
        return self.source.nbytes

    @property
    def parts(self) -> int:
        return -(-self.source.nbytes // _PART_BYTES)

    def run(self, begin: int, end: int) -> None:
        chosen = slice(begin * _PART_BYTES, end * _PART_BYTES)
        self.target[chosen] = self.source[chosen]


_Share: TypeAlias = list[tuple[Work, int, int]]


def run_all(works: Sequence[Work], threads: int | None = None) -> None:
    """Do all of them, here and in at most `threads` - 1 threads beside (None: as many as pay).

    TQ_NUM_THREADS bounds how many such threads this process has at once, the one that calls this among them. None of
    them is still under way when this returns or raises.
    """
    total = sum(work.size_bytes for work in works)
    count = _worth(total) if threads is None else threads
    first, *others = _shares(works, total, max(count, 1))
    helpers = [_Helper(share) for share in others]
    try:
        _run(first)
    finally:
        interrupt: BaseException | None = None
        for helper in helpers:
            interrupt = helper.wait() or interrupt
        if interrupt is not None:
            raise interrupt
    for helper in helpers:
        if helper.error is not None:
            raise helper.error


def _worth(size_bytes: int) -> int:
    """How many threads pay for so many bytes, within what this process may have."""
    count = min(_cores(), MAX_THREADS, size_bytes // SHARE_BYTES)
    most = environment.whole_number("TQ_NUM_THREADS", at_least=1) if count > 1 else None
    if most is None:
        return count
    return min(count, most - sum(thread.name == _THREAD_NAME for thread in threading.enumerate()))


def _shares(works: Sequence[Work], total: int, count: int) -> list[_Share]:
    """Cut what is to be done into `count` shares of about the same number of bytes, in order."""
    shares: list[_Share] = [[] for _ in range(count)]
    limit = max(-(-total // count), 1)
    at = 0
    for work in works:
        size, parts = work.size_bytes, work.parts
        begin, first = 0, min(at // limit, count - 1)
        last = max((at + size - 1) // limit, first)  # what has no bytes lies where it begins
        for number in range(first, last + 1):
            end = parts if number == last else min(parts, ((number + 1) * limit - at) * parts // size)
            if end > begin:
                shares[number].append((work, begin, end))
                begin = end
        at += size
    return shares


def _run(share: _Share) -> None:
    for work, begin, end in share:
        work.run(begin, end)


class _Helper:
    """A thread that does a share; if none can be started, the share is done at once."""

    def __init__(self, share: _Share) -> None:
        self.error: BaseException | None = None
        self._share = share
        self._thread = threading.Thread(target=self._run, name=_THREAD_NAME, daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads: too many, or the interpreter is ending
            self._run()

    def wait(self) -> BaseException | None:
        """Return when the share is done; an interrupt meanwhile is put off and returned."""
        interrupt: BaseException | None = None
        while self._thread.is_alive():
            try:
                self._thread.join()
            except KeyboardInterrupt as raised:
                interrupt = raised
        return interrupt

    def _run(self) -> None:
        try:
            _run(self._share)
        except BaseException as error:
            self.error = error


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0))
