"""Rows and partitions: allocation, step windows, writing, removal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import CapacityExceeded, InvalidArgument, UnknownName, WrongType, nearest
from transfer_queue.extents import Extents
from transfer_queue.ledger.blocks import BlockBook
from transfer_queue.ledger.feed import Feed
from transfer_queue.ledger.limits import Limits
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.table import FREE, NO_GROUP, NO_VERSION, RowTable
from transfer_queue.ledger.usage import Usage
from transfer_queue.messages import ColumnSpec

Int64s: TypeAlias = NDArray[np.int64]


class Writer(NamedTuple):
    """Who writes, and when."""

    client: str
    now: float


@dataclass
class Window:
    """The slots of every `num_global_batch`-th step. `step` is the last owner, `used` what it inserted."""

    start: int
    step: int = -1
    used: int = 0
    live: int = 0


class Rows:
    """All rows of all partitions.

    With a ring, step k owns the window [(k % steps) · size, + size) until its inserted rows are all cleared.
    """

    def __init__(self, step_size: int, num_steps: int, limits: Limits) -> None:
        self.table = RowTable()
        self.feed = Feed(self.table)
        self.blocks = BlockBook()
        self.usage = Usage(limits) if limits else None
        self.partitions: dict[str, Partition] = {}
        self.by_number: dict[int, Partition] = {}
        self.step_size = step_size
        self.windows = [Window(k * step_size) for k in range(num_steps)]
        self._ring_end = step_size * num_steps
        self.slots = Extents()
        self.next_number = 0
        self.table.grow(self._ring_end)

    # ------------------------------------------------------------ names

    def name(self, partition_id: str | None, global_step: int | None) -> str:
        """The partition that a request means; step k is the partition `step_k`."""
        if (partition_id is None) == (global_step is None):
            raise InvalidArgument("give exactly one of partition_id and global_step")
        if partition_id is not None:
            if not isinstance(partition_id, str):
                raise WrongType(f"partition_id must be a str, not {partition_id!r}")
            return partition_id
        if isinstance(global_step, bool) or not isinstance(global_step, int):
            raise WrongType(f"global_step must be an int, not {global_step!r}")
        if global_step < 0:
            raise InvalidArgument(f"global_step must not be negative, not {global_step}")
        return f"step_{global_step}"

    def known(self, partition_id: str | None, global_step: int | None) -> Partition | None:
        """The partition that a request means, None if there is none of that name."""
        return self.partitions.get(self.name(partition_id, global_step))

    def step_of(self, name: str) -> int | None:
        """The step that a partition name means where there is a ring."""
        digits = name.removeprefix("step_")
        is_step = self.windows and name.startswith("step_") and digits.isdecimal() and str(int(digits)) == digits
        return int(digits) if is_step else None

    def existing(self, name: str) -> Partition:
        """The partition of this name; raises if there is none."""
        found = self.partitions.get(name)
        if found is None:
            raise UnknownName(f"no partition {name!r}{nearest(name, self.partitions)}")
        return found

    def owners(self, rows: Int64s) -> list[tuple[Partition, Int64s]]:
        """Live rows by partition; returns positions in `rows`, in order."""
        numbers = self.table.partition[rows]
        if len(rows) and (numbers == numbers[0]).all():
            return [(self.by_number[int(numbers[0])], np.arange(len(rows)))]
        return [(self.by_number[n], np.flatnonzero(numbers == n)) for n in np.unique(numbers).tolist()]

    # ------------------------------------------------------------ insertion

    def room(self, name: str, count: int) -> str | None:
        """None if `count` rows fit now; else what must be cleared first. Raises where waiting cannot help."""
        step = self.step_of(name)
        if step is None:
            return None
        window = self.windows[step % len(self.windows)]
        if step < window.step:
            raise CapacityExceeded(f"step {step} is over: the capacity of its window belongs to step {window.step}")
        used = window.used if step == window.step and window.live else 0
        if used + count > self.step_size:
            raise CapacityExceeded(
                f"step {step} has a capacity of {self.step_size} samples (global_batch_size × num_n_samples), "
                f"{used} are inserted; {count} more exceed it by {used + count - self.step_size}"
            )
        if step != window.step and window.live:
            return f"step {window.step}, which has {window.live} samples in the window of step {step}; clear it first"
        return None

    def insert(self, name: str, count: int, at: int | None = None) -> tuple[Partition, Int64s]:
        """Allocate one consecutive run of slots in a partition; `room` comes first. `at`: the run it got before."""
        partition = self.partitions.get(name) or self._create(name)
        start = self._allocate(partition, count, at)
        rows = np.arange(start, start + count, dtype=np.int64)
        self.table.grow(start + count)
        self.table.partition[rows] = partition.number
        self.table.ordinal[rows] = partition.append(rows)
        self.table.group[rows] = NO_GROUP
        return partition, rows

    def _create(self, name: str) -> Partition:
        made = Partition(name, self.next_number, self.table, self.step_of(name))
        self.partitions[name] = self.by_number[made.number] = made
        self.next_number += 1
        return made

    def _allocate(self, partition: Partition, count: int, at: int | None) -> int:
        if partition.step is None:
            if at is not None:
                return self._allocate_at(at, count)
            start = self.slots.allocate(count)
            if start is None:
                self.slots.extend(max(2 * self.slots.size, self.slots.size + count, 1024))
                start = self.slots.allocate(count)
            assert start is not None
            return self._ring_end + start
        window = self.windows[partition.step % len(self.windows)]
        if window.live == 0:
            window.step, window.used = partition.step, 0
        start = window.start + window.used
        window.used += count
        window.live += count
        return start

    def _allocate_at(self, start: int, count: int) -> int:
        end = start - self._ring_end + count
        if end > self.slots.size:
            self.slots.extend(max(2 * self.slots.size, self.slots.size + count, 1024))
        self.slots.claim(start - self._ring_end, count)
        return start

    # ------------------------------------------------------------ writing

    def write(
        self, partition: Partition, rows: Int64s, slots: Int64s, columns: Sequence[ColumnSpec], block: int, who: Writer
    ) -> None:
        """Point cells at slots of a block; `blocks.commit` counts them."""
        for spec in columns:
            column = self.table.column(spec.name)
            again = rows[column.ready[rows] == 1]
            if len(again):
                self.blocks.overwrite(column.block[again])
                self.uncount(partition, column.block[again])
            column.write(rows, slots, block)
            partition.add_column(spec, len(rows) - len(again), who.now, who.client)

    def write_new(
        self, partition: Partition, rows: Int64s, columns: Sequence[ColumnSpec], block: int, who: Writer
    ) -> None:
        """The same for rows that were just inserted, in one run: row i lies at slot i."""
        where = as_run(rows)
        slots = np.arange(len(rows))
        for spec in columns:
            self.table.column(spec.name).write(where, slots, block)
            partition.add_column(spec, len(rows), who.now, who.client)

    # ------------------------------------------------------------ removal

    def remove(self, partition: Partition, rows: Int64s, reason: str) -> None:
        """End the life of rows: generation + 1, status zero, slots and blocks free."""
        table = self.table
        self.feed.remove(partition, rows)
        partition.remove(rows, reason)
        where = as_run(rows)
        blocks, slots = [], []
        for column in table.columns.values():
            there = column.ready[where] == 1
            blocks.append(column.block[where][there])
            slots.append(column.slot[where][there].astype(np.int64))
            column.ready[where] = column.block[where] = column.slot[where] = 0
        every = rows.tolist()
        for task in table.tasks.values():
            task.forget(where, every)
        for row in every if table.tags else ():
            table.tags.pop(row, None)
        table.generation[where] += 1
        table.partition[where] = FREE
        table.version[where] = NO_VERSION
        if blocks:
            self.blocks.clear(np.concatenate(blocks), np.concatenate(slots))
            self.uncount(partition, np.concatenate(blocks))
        if self.usage is not None:
            self.usage.remove(partition.name, rows)
        self._release(partition, rows)

    def uncount(self, partition: Partition, blocks: Int64s) -> None:
        """Cells do not point to these blocks any more: their bytes do not count against limits."""
        if self.usage is not None:
            self.usage.free(partition.name, blocks)

    def drop_partition(self, partition: Partition) -> None:
        """Forget an empty partition."""
        assert partition.live == 0, f"{partition!r} still has rows"
        del self.partitions[partition.name], self.by_number[partition.number]

    def _release(self, partition: Partition, rows: Int64s) -> None:
        if partition.step is not None:
            self.windows[partition.step % len(self.windows)].live -= len(rows)
            return
        ordered = np.sort(rows) - self._ring_end
        for run in np.split(ordered, np.flatnonzero(np.diff(ordered) > 1) + 1):
            self.slots.free(int(run[0]), len(run))


def as_run(rows: Int64s) -> Int64s | slice:
    """The same rows as a slice if they follow each other: NumPy is much faster then."""
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((rows[1:] > rows[:-1]).all()):
        return slice(first, last + 1)
    return rows
