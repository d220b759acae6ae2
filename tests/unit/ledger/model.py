"""What the ledger should do, told with dicts and lists and without any care for speed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

GROUP = 2  # rows of a group
WINDOW = 8  # rows of a step
STEPS = 2  # steps of the ring

Id = tuple[int, int]  # global index, generation


@dataclass(eq=False)
class Row:
    id: Id
    ordinal: int
    group: str | None
    cells: dict[str, tuple[int, int]] = field(default_factory=dict)  # field -> (block, slot)
    alive: bool = True


@dataclass(eq=False)
class Group:
    expected: int
    sealed: bool = False
    rows: list[Row] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """A selection split over two ranks."""

    count: int
    rows: list[Row]
    held: set[Row]
    deliveries: Counter[int] = field(default_factory=Counter)
    broken: set[int] = field(default_factory=set)

    def part(self, rank: int) -> list[Row]:
        return self.rows[rank * self.count : (rank + 1) * self.count]

    @property
    def missing(self) -> list[int]:
        return [rank for rank in (0, 1) if not self.deliveries[rank] and rank not in self.broken]


@dataclass(eq=False)
class Task:
    consumed: set[Row] = field(default_factory=set)
    reserved: set[Row] = field(default_factory=set)
    batches: dict[int, Batch] = field(default_factory=dict)
    consumed_and_cleared: int = 0


@dataclass(eq=False)
class Part:
    rows: list[Row] = field(default_factory=list)  # in allocation order
    ordinals: itertools.count[int] = field(default_factory=itertools.count)
    inserted: int = 0
    groups: dict[str, Group] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    tasks: dict[str, Task] = field(default_factory=dict)

    def task(self, name: str) -> Task:
        return self.tasks.setdefault(name, Task())


@dataclass(eq=False)
class Wish:
    """A draw: plain, of whole groups, or of one rank."""

    partition: str
    task: str
    fields: tuple[str, ...]
    count: int
    groups: bool = False
    rank: int | None = None
    batch: int | None = None


@dataclass
class Taken:
    """What a draw took, so that it can be undone."""

    wish: Wish
    rows: list[Row]
    batch: Batch | None = None


class Stale(Exception):
    pass


class Refused(Exception):
    pass


class Full(Exception):
    pass


class Model:
    def __init__(self) -> None:
        self.partitions: dict[str, Part] = {}
        self.dead_cells: set[tuple[int, int]] = set()
        self.blocks: set[int] = set()  # all that ever held a cell
        self.cleared: dict[str, set[tuple[str, int]]] = {}  # task -> (partition, batch)
        self.windows: dict[int, int] = {}  # window -> the last step that owned it
        self.used: Counter[int] = Counter()  # rows inserted in a window since its owner took it

    # ------------------------------------------------------------ producing

    def room(self, name: str, count: int) -> bool:
        """May the rows be inserted now? Raises where waiting cannot help."""
        if not name.startswith("step_"):
            return True
        step = int(name.removeprefix("step_"))
        owner = self.windows.get(step % STEPS, -1)
        live = len(self.partitions[f"step_{owner}"].rows) if f"step_{owner}" in self.partitions else 0
        if step < owner or (self.used[step % STEPS] if step == owner and live else 0) + count > WINDOW:
            raise Full
        return step == owner or not live

    def check_groups(self, name: str, groups: list[str]) -> None:
        part = self.partitions.get(name, Part())
        for group, count in Counter(groups).items():
            if group in part.aborted:
                raise Stale
            known = part.groups.get(group, Group(GROUP))
            if known.sealed or len(known.rows) + count > known.expected:
                raise Refused

    def insert(self, name: str, ids: list[Id], groups: list[str] | None) -> list[Row]:
        part = self.partitions.setdefault(name, Part())
        if name.startswith("step_"):
            step = int(name.removeprefix("step_"))
            if not part.rows:
                self.windows[step % STEPS], self.used[step % STEPS] = step, 0
            start = step % STEPS * WINDOW + self.used[step % STEPS]
            assert [index for index, _ in ids] == list(range(start, start + len(ids)))
            self.used[step % STEPS] += len(ids)
        else:
            assert ids[0][0] >= STEPS * WINDOW
        made = [Row(id, next(part.ordinals), group) for id, group in zip(ids, groups or [None] * len(ids), strict=True)]
        part.rows += made
        part.inserted += len(made)
        for row in made:
            if row.group is not None:
                part.groups.setdefault(row.group, Group(GROUP)).rows.append(row)
        return made

    def write(self, rows: list[Row], fields: Iterable[str], block: int) -> None:
        for name in fields:
            self.blocks.add(block)
            for slot, row in enumerate(rows):
                row.cells[name] = (block, slot)

    # ------------------------------------------------------------ consuming

    def ready(self, wish: Wish) -> list[Row]:
        part = self.partitions[wish.partition]
        task = part.task(wish.task)
        taken = task.consumed | task.reserved
        return [row for row in part.rows if row not in taken and row.cells.keys() >= set(wish.fields)]

    def complete_groups(self, wish: Wish) -> list[list[Row]]:
        part, ready = self.partitions[wish.partition], self.ready(wish)
        blocks: dict[Any, list[Row]] = {}
        for row in ready:
            blocks.setdefault(row.ordinal // GROUP if row.group is None else row.group, []).append(row)
        size = {name: group.expected for name, group in part.groups.items()}
        return [rows for name, rows in blocks.items() if len(rows) == size.get(name, GROUP)]

    def attempt(self, wish: Wish) -> tuple[list[list[Row]], bool] | None:
        """Blocks of rows to choose from, and whether the choice is free; None: not now. Raises as the ledger should."""
        if wish.partition not in self.partitions:
            return None
        if wish.rank is not None:
            return self._attempt_rank(wish)
        if wish.groups:
            found = self.complete_groups(wish)
            return (found, True) if len(found) >= wish.count // GROUP else None
        ready = self.ready(wish)
        return ([ready[: wish.count]], False) if len(ready) >= wish.count else None

    def _attempt_rank(self, wish: Wish) -> tuple[list[list[Row]], bool] | None:
        assert wish.rank is not None
        assert wish.batch is not None
        batches = self.partitions[wish.partition].task(wish.task).batches
        batch = batches.get(wish.batch)
        if batch is None:
            if (wish.partition, wish.batch) in self.cleared.get(wish.task, ()):
                raise Stale
            ready = self.ready(wish)[: 2 * wish.count]
            return ([ready[wish.rank * wish.count :][: wish.count]], False) if len(ready) == 2 * wish.count else None
        if batch.count != wish.count:
            raise Refused
        part = batch.part(wish.rank)
        if not all(row.alive for row in part):
            raise Stale
        return ([part], False) if all(row.cells.keys() >= set(wish.fields) for row in part) else None

    def take(self, wish: Wish, rows: list[Row]) -> tuple[Taken, bool]:
        """Apply an answered draw; returns what it took and whether it was a replay."""
        task = self.partitions[wish.partition].task(wish.task)
        if wish.rank is None:
            task.consumed |= set(rows)
            return Taken(wish, rows), False
        assert wish.batch is not None
        if wish.batch not in task.batches:
            chosen = self.ready(wish)[: 2 * wish.count]
            task.batches[wish.batch] = Batch(wish.count, chosen, set(chosen))
            task.reserved |= set(chosen)
        batch = task.batches[wish.batch]
        open_before = bool(batch.missing)
        batch.deliveries[wish.rank] += 1
        self._complete(task, batch, open_before)
        return Taken(wish, [], batch), batch.deliveries[wish.rank] > 1

    def undo(self, taken: Taken) -> None:
        task = self.partitions[taken.wish.partition].task(taken.wish.task)
        task.consumed -= set(taken.rows)
        batch = taken.batch
        if batch is None or taken.wish.rank is None:
            return
        open_before = bool(batch.missing)
        batch.deliveries[taken.wish.rank] -= 1
        if not open_before and batch.missing:
            alive = {row for row in batch.held if row.alive}
            task.consumed -= alive
            task.reserved |= alive
        self._break(task, batch)

    def _complete(self, task: Task, batch: Batch, open_before: bool) -> None:
        if open_before and not batch.missing:
            batch.held = {row for row in batch.held if row.alive}
            task.reserved -= batch.held
            task.consumed |= batch.held

    def _break(self, task: Task, batch: Batch) -> None:
        open_before = bool(batch.missing)
        for rank in batch.missing:
            if not all(row.alive for row in batch.part(rank)):
                batch.broken.add(rank)
                rest = set(batch.part(rank)) & batch.held
                batch.held -= rest
                task.reserved -= rest
        self._complete(task, batch, open_before)

    # ------------------------------------------------------------ removing

    def remove(self, name: str, rows: list[Row]) -> None:
        part = self.partitions[name]
        for row in rows:
            row.alive = False
            part.rows.remove(row)
            self.dead_cells |= set(row.cells.values())
            if row.group is not None:
                part.groups[row.group].rows.remove(row)
                if not part.groups[row.group].rows:
                    del part.groups[row.group]
        for task_name, task in part.tasks.items():
            task.consumed_and_cleared += len(task.consumed & set(rows))
            task.consumed -= set(rows)
            task.reserved -= set(rows)
            for number, batch in list(task.batches.items()):
                self._break(task, batch)
                if not any(row.alive for row in batch.rows):
                    del task.batches[number]
                    self.cleared.setdefault(task_name, set()).add((name, number))

    def reset(self, name: str, task: str | None) -> None:
        for known, state in self.partitions[name].tasks.items() if name in self.partitions else ():
            if task in (None, known):
                state.consumed, state.reserved, state.batches = set(), set(), {}

    def live(self) -> list[Row]:
        return [row for part in self.partitions.values() for row in part.rows]

    def blocks_in_use(self) -> set[int]:
        return {block for row in self.live() for block, _ in row.cells.values()}
