"""The ledger: what exists, who may have it, who waits for it.

Every call takes a request (and `now`, in seconds of any steady clock), changes the state or raises with the state
unchanged, and returns the reply; `None` means that the request is parked under its ticket. Parked requests are
answered by `wake`, which the owner calls after every change and when `next_deadline` has come. What storage may reuse
is read from `blocks.take_freed()`. Nothing here reads a clock, blocks, or knows who is asking.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import CapacityExceeded, InvalidArgument, TransferQueueError
from transfer_queue.ledger.blocks import BlockBook
from transfer_queue.ledger.drawing import Drawing, DrawRecord
from transfer_queue.ledger.lookup import Lookup
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.putting import Putting
from transfer_queue.ledger.reports import Reports
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.waiting import Ticket, WaitingDraw, WaitingPut, WaitingRoom
from transfer_queue.messages import (
    AbortGroup,
    Clear,
    Draw,
    Drawn,
    Locate,
    Put,
    PutDone,
    ResetConsumption,
    SealGroup,
    SetTags,
)
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.registry import SamplerLike

Int64s: TypeAlias = NDArray[np.int64]
Answer: TypeAlias = tuple[Ticket, "PutDone | Drawn | TransferQueueError"]

_UNDOABLE = 4096
"""How many answered draws are remembered, so that one whose answer could not be delivered is undone."""


class Ledger:
    """The state of one queue."""

    def __init__(
        self,
        *,
        global_batch_size: int | None = None,
        num_global_batch: int = 1,
        num_n_samples: int = 1,
        sampler: SamplerLike | None = None,
    ) -> None:
        for name, value in (("num_global_batch", num_global_batch), ("num_n_samples", num_n_samples)):
            _check_positive(name, value)
        if global_batch_size is not None:
            _check_positive("global_batch_size", global_batch_size)
        ring = (global_batch_size * num_n_samples, num_global_batch) if global_batch_size else (0, 0)
        self._rows = Rows(*ring)
        self._waiting = WaitingRoom()
        self._putting = Putting(self._rows, num_n_samples)
        self._lookup = Lookup(self._rows)
        self._drawing = Drawing(self._rows, self._lookup, sampler, num_n_samples)
        self._undoable: OrderedDict[Ticket, DrawRecord] = OrderedDict()
        self._refused: list[Answer] = []  # parked requests that a change made impossible
        self._stirred: dict[str, set[str] | None] = {}  # partitions in which more may be served; None: to any task
        self._window_freed = False
        self.reports = Reports(self._rows, self._drawing, self._waiting)

    @property
    def blocks(self) -> BlockBook:
        """Which blocks are in use, and which became free."""
        return self._rows.blocks

    # ------------------------------------------------------------ producing

    def put(self, request: Put, ticket: Ticket, client: str, now: float) -> PutDone | None:
        """Insert or extend rows; parked while the step's window belongs to a step that is not cleared."""
        name = self._putting.check(request)
        obstacle = self._putting.obstacle(request, name)
        if obstacle is None:
            return self._apply(request, name, client, now)
        if request.timeout_s <= 0:
            raise CapacityExceeded(f"no capacity for step {self._rows.step_of(name)}: the ring waits for {obstacle}")
        self._waiting.park_put(ticket, request, client, name, now)
        return None

    def set_tags(self, request: SetTags) -> int:
        """Merge tags into rows; returns their number. Samplers may choose by them: waiting draws are tried again."""
        self._putting.set_tags(request)
        for partition, _ in self._rows.owners(request.indexes):
            self._stir(partition.name)
        return len(request.indexes)

    def seal_group(self, request: SealGroup) -> int:
        """The group is complete with what it has; returns how many rows that are."""
        partition = self._rows.existing(request.partition_id)
        group = partition.groups.seal(request.group_id)
        for ready in partition.ready.values():
            for index in ready.group_indexes():
                index.recheck(group)
        self._stir(partition.name)
        return group.size

    def abort_group(self, request: AbortGroup) -> int:
        """Drop the rows of a group; later rows for it are refused."""
        partition = self._rows.existing(request.partition_id)
        group = partition.groups.abort(request.group_id)
        return self._remove(partition, partition.rows_at(group.ordinals), request.reason)

    # ------------------------------------------------------------ consuming

    def draw(self, request: Draw, ticket: Ticket, now: float) -> Drawn | None:
        """Serve a draw, or park it; one that no state could serve raises at once."""
        name = self._rows.name(request.partition_id, request.global_step)
        plan = self._drawing.plan(request, name)
        done = self._drawing.attempt(request, plan, name)
        if done is not None:
            return self._answered(ticket, *done)
        if request.timeout_s <= 0:
            raise self.reports.timeout(request, plan, name, 0.0, now)
        self._waiting.park_draw(ticket, request, plan, name, now)
        return None

    def locate(self, request: Locate) -> Drawn:
        """Look rows up without consuming them."""
        return self._lookup.locate(request)

    def cancel(self, ticket: Ticket) -> bool:
        """Nobody waits for this request any more: forget it, or give back what it drew. False: it is not known."""
        if self._waiting.remove(ticket) is not None:
            return True
        record = self._undoable.pop(ticket, None)
        if record is None:
            return False
        self._drawing.undo(record)
        self._stir(record.partition)
        return True

    def reset(self, request: ResetConsumption) -> int:
        """Give back what a task, or every task, consumed or reserved in a partition; returns how many rows it has."""
        name = self._rows.name(request.partition_id, request.global_step)
        self._stir(name)
        self._settle_draws(name, request.task_name)
        return self._drawing.reset(name, request.task_name)

    def clear(self, request: Clear) -> int:
        """Remove the named rows, or a partition with its name. Unknown partitions: nothing to do."""
        if request.indexes is not None:
            return self._clear_rows(request.indexes, request.generations)
        partition = self._rows.partitions.get(self._rows.name(request.partition_id, request.global_step))
        if partition is None:
            return 0
        count = self._remove(partition, partition.rows(), "cleared")
        self._drawing.assignments.forget(partition.name)
        self._settle_draws(partition.name, None)
        self._rows.drop_partition(partition)
        return count

    def register_sampler(self, task: str | None, sampler: SamplerLike) -> BaseSampler:
        """From now on this sampler serves the task (None: every task without its own), parked draws included."""
        made = self._drawing.samplers.register(task, sampler)
        for waiting in self._waiting.all_draws():
            try:
                self._waiting.replan(waiting, self._drawing.plan(waiting.draw, waiting.partition))
            except TransferQueueError as error:
                self._waiting.remove(waiting.ticket)
                self._refused.append((waiting.ticket, error))
            self._stir(waiting.partition)
        return made

    # ------------------------------------------------------------ waiting

    def wake(self, now: float) -> list[Answer]:
        """Answer the parked requests that can be served by now, in order of arrival, and those that are overdue."""
        answers, self._refused = self._refused, []
        while self._stirred or self._window_freed:
            if self._window_freed:
                self._window_freed = False
                answers.extend(self._serve_puts(now))
            stirred, self._stirred = self._stirred, {}
            for name in sorted(stirred):
                answers.extend(self._serve_draws(name, stirred[name]))
        for late in self._waiting.overdue(now):
            answers.append((late.ticket, self._too_late(late, now)))
        return answers

    def next_deadline(self) -> float | None:
        return self._waiting.next_deadline()

    # ------------------------------------------------------------ inside

    def _apply(self, request: Put, name: str, client: str, now: float) -> PutDone:
        done, touched = self._putting.apply(request, name, client, now)
        fields = tuple(spec.name for spec in request.columns)
        for partition in touched:
            if request.tags is None and request.group_ids is None:
                self._stir(partition.name, self._waiting.tasks(partition.name, fields))
            else:
                self._stir(partition.name)
        return done

    def _stir(self, partition: str, tasks: set[str] | None = None) -> None:
        """More of a partition may be served now: to these tasks, or (None) to any."""
        if tasks is None or self._stirred.get(partition, tasks) is None:
            self._stirred[partition] = None
        elif tasks:
            self._stirred[partition] = tasks.union(self._stirred.get(partition) or ())

    def _answered(self, ticket: Ticket, drawn: Drawn, record: DrawRecord) -> Drawn:
        self._undoable[ticket] = record
        if len(self._undoable) > _UNDOABLE:
            self._undoable.popitem(last=False)
        if record.stirs:
            self._stir(record.partition)
        return drawn

    def _settle_draws(self, name: str, task: str | None) -> None:
        """What these draws took was given back or is gone: they cannot be undone any more."""
        for ticket, record in list(self._undoable.items()):
            if record.partition == name and task in (None, record.draw.task_name):
                del self._undoable[ticket]

    def _clear_rows(self, rows: Int64s, generations: Int64s | None) -> int:
        self._rows.table.check_fresh(rows, np.full_like(rows, -1) if generations is None else generations)
        rows = np.unique(rows)
        for partition, positions in self._rows.owners(rows):
            self._remove(partition, rows[positions], "cleared")
        return len(rows)

    def _remove(self, partition: Partition, rows: Int64s, reason: str) -> int:
        if len(rows):
            self._rows.remove(partition, rows, reason)
            self._drawing.after_clear(partition)
        if partition.step is not None:
            self._window_freed = True
        self._stir(partition.name)
        return len(rows)

    def _serve_draws(self, name: str, tasks: set[str] | None) -> list[Answer]:
        answers: list[Answer] = []
        if name not in self._rows.partitions:
            return answers
        for task in sorted(self._waiting.tasks(name) if tasks is None else tasks):
            hopeless: set[Any] = set()
            for waiting in self._waiting.draws(name, task):
                if waiting.signature not in hopeless:
                    answer = self._try(waiting)
                    if answer is None:
                        hopeless.add(waiting.signature)
                    else:
                        answers.append((waiting.ticket, answer))
        return answers

    def _try(self, waiting: WaitingDraw) -> Drawn | TransferQueueError | None:
        try:
            done = self._drawing.attempt(waiting.draw, waiting.plan, waiting.partition)
        except TransferQueueError as error:
            self._waiting.remove(waiting.ticket)
            return error
        if done is None:
            return None
        self._waiting.remove(waiting.ticket)
        return self._answered(waiting.ticket, *done)

    def _serve_puts(self, now: float) -> list[Answer]:
        answers: list[Answer] = []
        for waiting in self._waiting.puts():
            try:
                if self._putting.obstacle(waiting.put, waiting.partition) is not None:
                    continue
                answer: PutDone | TransferQueueError = self._apply(waiting.put, waiting.partition, waiting.client, now)
            except TransferQueueError as error:
                answer = error
            self._waiting.remove(waiting.ticket)
            answers.append((waiting.ticket, answer))
        return answers

    def _too_late(self, late: WaitingDraw | WaitingPut, now: float) -> TransferQueueError:
        waited_s = now - late.since
        if isinstance(late, WaitingDraw):
            return self.reports.timeout(late.draw, late.plan, late.partition, waited_s, now)
        obstacle = self._putting.obstacle(late.put, late.partition)
        step = self._rows.step_of(late.partition)
        return CapacityExceeded(f"no capacity for step {step} after {waited_s:.1f} s: the ring waits for {obstacle}")


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name} must be a whole number of at least 1, not {value!r}")
