"""Copy many byte ranges of memory, one behind the other, into one output.

Neighbouring ranges are merged into runs first. Long runs are copied one by one; many short ones by a gather over
elements, where NumPy loops and Python does not. Both release the interpreter lock while they move many bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Bytes: TypeAlias = NDArray[np.uint8]
Int64s: TypeAlias = NDArray[np.int64]

_LONG_RUN_BYTES = 512  # from here on a copy per run is faster than a gather
_UNLOCKED_RUN_BYTES = 1 << 16  # from here on a NumPy copy, which releases the interpreter lock
_GATHER_ELEMENTS = 1 << 17  # at once, so that the index stays in the cache
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def copy_ranges(
    memories: Sequence[Bytes], memory_of: Int64s | None, starts: Int64s, sizes: Int64s | int, out: Bytes
) -> None:
    """Copy `sizes[i]` bytes at `starts[i]` of memory `memory_of[i]` (None: all of the first) behind each other.

    The ranges must lie inside their memories, and `out` must have exactly their size in all.
    """
    if out.nbytes == 0:
        return
    lengths = np.broadcast_to(np.asarray(sizes, np.int64), starts.shape)
    first, run_starts, run_sizes = _runs(memory_of, starts, lengths)
    run_memories = None if memory_of is None else memory_of[first]
    if out.nbytes >= _LONG_RUN_BYTES * len(first):
        _copy_runs(memories, run_memories, run_starts, run_sizes, out)
        return
    targets = np.cumsum(run_sizes) - run_sizes
    if run_memories is None:
        _gather_elements(memories[0], run_starts, run_sizes, targets, out)
        return
    for number in np.unique(run_memories).tolist():
        chosen = run_memories == number
        _gather_elements(memories[number], run_starts[chosen], run_sizes[chosen], targets[chosen], out)


def copy_rows(column: Bytes, row_bytes: int, slots: Int64s, out: Bytes) -> None:
    """Copy the named rows of a column of equally long rows behind each other."""
    if out.nbytes == 0:
        return
    first = int(slots[0])
    if slots[-1] - first == len(slots) - 1 and bool((slots[1:] > slots[:-1]).all()):
        out[:] = column[first * row_bytes : first * row_bytes + out.nbytes]
    else:
        np.take(column.reshape(-1, row_bytes), slots, axis=0, out=out.reshape(-1, row_bytes), mode="clip")


def take_int64s(memories: Sequence[Bytes], memory_of: Int64s | None, starts: Int64s) -> Int64s:
    """Read the 8 bytes at each start; starts are multiples of 8 in memory that is aligned to 8."""
    if memory_of is None:
        found: Int64s = _as_elements(memories[0], 8).view(np.int64)[starts >> 3]
        return found
    out = np.empty(starts.shape, np.int64)
    for number in np.unique(memory_of).tolist():
        chosen = memory_of == number
        out[chosen] = _as_elements(memories[number], 8).view(np.int64)[starts[chosen] >> 3]
    return out


def _runs(memory_of: Int64s | None, starts: Int64s, lengths: Int64s) -> tuple[Int64s, Int64s, Int64s]:
    """Merge ranges that follow each other; return (first range, start, size) of each run."""
    apart = starts[:-1] + lengths[:-1] != starts[1:]
    if memory_of is not None:
        apart |= memory_of[:-1] != memory_of[1:]
    first = np.concatenate(([0], np.flatnonzero(apart) + 1))
    return first, starts[first], np.add.reduceat(lengths, first)


def _copy_runs(memories: Sequence[Bytes], memory_of: Int64s | None, starts: Int64s, sizes: Int64s, out: Bytes) -> None:
    numbers = [0] * len(starts) if memory_of is None else memory_of.tolist()
    unlocked = out.nbytes >= _UNLOCKED_RUN_BYTES * len(starts)
    sources = memories if unlocked else [memory.data for memory in memories]
    target = out if unlocked else out.data
    at = 0
    for number, start, size in zip(numbers, starts.tolist(), sizes.tolist(), strict=True):
        target[at : at + size] = sources[number][start : start + size]
        at += size


def _gather_elements(memory: Bytes, starts: Int64s, sizes: Int64s, targets: Int64s, out: Bytes) -> None:
    """Copy run i to `targets[i]` of `out`, in elements as wide as all starts, sizes and targets allow."""
    combined = int(np.bitwise_or.reduce(starts | sizes | targets))
    width = next(w for w in (8, 4, 2, 1) if combined % w == 0 and out.ctypes.data % w == memory.ctypes.data % w == 0)
    source, target = _as_elements(memory, width), _as_elements(out, width)
    starts, sizes, targets = starts // width, sizes // width, targets // width
    total = np.cumsum(sizes)
    inner = np.searchsorted(total, np.arange(_GATHER_ELEMENTS, total[-1], _GATHER_ELEMENTS))
    cuts = np.unique([0, *inner, len(starts)]).tolist()
    for begin, end in itertools.pairwise(cuts):
        counts = sizes[begin:end]
        steps = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        index = np.repeat(starts[begin:end], counts) + steps
        low, high = int(targets[begin]), int(targets[end - 1] + counts[-1])
        if high - low == len(index):
            np.take(source, index, out=target[low:high], mode="clip")
        else:
            target[np.repeat(targets[begin:end], counts) + steps] = source[index]


def _as_elements(memory: Bytes, width: int) -> NDArray[np.uint64]:
    whole = memory[: memory.nbytes // width * width]
    return whole.view(_UNSIGNED[width])
