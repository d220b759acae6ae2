"""The ledger: what exists, who may have it, who waits for it.

Every call takes a request (and `now`, in seconds of any steady clock), changes the state or raises with the state
unchanged, and returns the reply; `None` means that the request is parked under its ticket. Parked requests are
answered by `wake`, which the owner calls after every change and when `next_deadline` has come. What storage may reuse
is read from `blocks.take_orders()`, what changed from `records.take()`: with the same records, `replay` makes the same
changes in another ledger. Nothing here reads a clock or blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import CapacityExceeded, InvalidArgument, StaleSampleError, TransferQueueError
from transfer_queue.ledger.blocks import BlockBook
from transfer_queue.ledger.drawing import Asker, Drawing, DrawRecord
from transfer_queue.ledger.leases import Lease, LeaseBook
from transfer_queue.ledger.lookup import Lookup
from transfer_queue.ledger.losing import reconcile
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.putting import Putting
from transfer_queue.ledger.records import Record, Records
from transfer_queue.ledger.reports import Reports
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.selection import Plan
from transfer_queue.ledger.waiting import Ticket, WaitingDraw, WaitingPut, WaitingRoom
from transfer_queue.messages import (
    AbortGroup,
    Ack,
    Clear,
    Draw,
    Drawn,
    Drop,
    Locate,
    Put,
    PutDone,
    Reconcile,
    Reconciled,
    RegisterSampler,
    Release,
    Renew,
    ResetConsumption,
    SealGroup,
    SetTags,
    Settle,
    Settled,
)
from transfer_queue.messages.journal import DrawUndone, LeaseEnded, Resumed, SamplerGiven, TaskSeen, TurnSkipped
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
        max_deliveries: int | None = None,
    ) -> None:
        for name, value in (("num_global_batch", num_global_batch), ("num_n_samples", num_n_samples)):
            _check_positive(name, value)
        for name, optional in (("global_batch_size", global_batch_size), ("max_deliveries", max_deliveries)):
            if optional is not None:
                _check_positive(name, optional)
        ring = (global_batch_size * num_n_samples, num_global_batch) if global_batch_size else (0, 0)
        self._rows = Rows(*ring)
        self._waiting = WaitingRoom()
        self._putting = Putting(self._rows, num_n_samples)
        self._lookup = Lookup(self._rows)
        self._drawing = Drawing(self._rows, self._lookup, sampler, num_n_samples, max_deliveries)
        self._leasing = self._drawing.leasing
        self.records = Records()
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

    @property
    def leases(self) -> LeaseBook:
        """Who holds what, and until when."""
        return self._leasing.book

    def put(self, request: Put, ticket: Ticket, client: str, now: float) -> PutDone | None:
        """Insert or extend rows; parked while the step's window belongs to a step that is not cleared."""
        name = self._putting.check(request)
        if request.lease_token is not None:
            self._end_overdue(now)
            self._leasing.check_writer(request.lease_token, request.indexes)
        obstacle = self._putting.obstacle(request, name)
        if obstacle is None:
            return self._apply(request, name, ticket, client, now)
        if request.timeout_s <= 0:
            raise CapacityExceeded(f"no capacity for step {self._rows.step_of(name)}: the ring waits for {obstacle}")
        self._waiting.park_put(ticket, request, client, name, now)
        return None

    def set_tags(self, request: SetTags, now: float) -> int:
        """Merge tags into rows; returns their number. Samplers may choose by them: waiting draws are tried again."""
        self._putting.set_tags(request)
        for partition, _ in self._rows.owners(request.indexes):
            self._stir(partition.name)
        self._note(Record(request, now))
        return len(request.indexes)

    def seal_group(self, request: SealGroup, now: float) -> int:
        """The group is complete with what it has; returns how many rows that are."""
        partition = self._rows.existing(request.partition_id)
        group = partition.groups.seal(request.group_id)
        partition.recheck_group(group)
        self._stir(partition.name)
        self._note(Record(request, now))
        return group.size

    def abort_group(self, request: AbortGroup, now: float) -> int:
        """Drop the rows of a group; later rows for it are refused."""
        partition = self._rows.existing(request.partition_id)
        group = partition.groups.abort(request.group_id)
        count = self._remove(partition, partition.rows_at(group.ordinals), request.reason)
        self._note(Record(request, now))
        return count

    def drop(self, request: Drop, now: float) -> int:
        """Take rows out for good; their groups settle without them. Returns their number."""
        if not request.reason:
            raise InvalidArgument("drop needs a reason: it is what the samples are accounted under")
        self._rows.table.check_fresh(request.indexes, request.generations)
        rows = np.unique(request.indexes)
        for partition, positions in self._rows.owners(rows):
            self._drop(partition, rows[positions], request.reason)
        self._note(Record(request, now))
        return len(rows)

    def settle(self, request: Settle, now: float) -> Settled:
        """Which of these blocks of a dead writer are in use? The others are refused from now on."""
        settled = Settled(committed=self.blocks.settle(request.blocks))
        self._note(Record(request, now))
        return settled

    def reconcile(self, request: Reconcile, unit: int, now: float) -> Reconciled:
        """A unit came back with these blocks: rows of those it lost are not ready any more."""
        reconciled, hurt = reconcile(self._rows, unit, request.blocks)
        for name in hurt:
            self._stir(name)
        self._note(Record(request, now))
        return reconciled

    # ------------------------------------------------------------ consuming

    def draw(self, request: Draw, ticket: Ticket, now: float, client: str = "") -> Drawn | None:
        """Serve a draw, or park it; one that no state could serve raises at once."""
        name = self._rows.name(request.partition_id, request.global_step)
        plan = self._drawing.plan(request, name)
        self._meet(name, request.task_name, now)
        drawn = self._attempt(request, plan, name, ticket, Asker(client, now))
        if drawn is not None:
            return drawn
        if request.timeout_s <= 0:
            raise self.reports.timeout(request, plan, name, 0.0, now)
        self._waiting.park_draw(ticket, request, client, plan, name, now)
        return None

    def ack(self, request: Ack, now: float) -> int:
        """Consume rows of a lease; returns how many were not acknowledged before."""
        self._end_overdue(now)
        count, more = self._leasing.ack(request.lease_token, request.indexes, request.generations)
        if more is not None:
            self._stir(more.name)
        self._note(Record(request, now))
        return count

    def release(self, request: Release, now: float) -> int:
        """Give rows of a lease back, to be drawn again; returns their number."""
        self._end_overdue(now)
        count, partition, spoiled = self._leasing.release(request.lease_token, request.indexes, request.generations)
        self._quarantine(partition, spoiled)
        self._stir(partition.name)
        self._note(Record(request, now))
        return count

    def renew(self, request: Renew, now: float) -> float:
        """The lease lasts so long from now; returns how long, in seconds."""
        self._end_overdue(now)
        duration_s = self._leasing.renew(request.lease_token, request.lease_s, now)
        self._note(Record(request, now))
        return duration_s

    def client_gone(self, client: str, now: float) -> None:
        """A client is dead or has left: what it holds goes back at once, and counts as overdue."""
        for lease in self.leases.of_client(client):
            self._end_lease(lease, "its holder is gone", now)

    def locate(self, request: Locate) -> Drawn:
        """Look rows up without consuming them."""
        return self._lookup.locate(request)

    def cancel(self, ticket: Ticket, now: float) -> bool:
        """Nobody waits for this request any more: forget it, or give back what it drew. False: it is not known."""
        if self._waiting.remove(ticket) is not None:
            return True
        record = self._undoable.pop(ticket, None)
        if record is None:
            return False
        self._drawing.undo(record)
        self._stir(record.partition)
        self._note(Record(DrawUndone(), now, ticket))
        return True

    def reset(self, request: ResetConsumption, now: float) -> int:
        """Give back what a task, or every task, consumed or reserved in a partition; returns how many rows it has."""
        name = self._rows.name(request.partition_id, request.global_step)
        self._stir(name)
        self._settle_draws(name, request.task_name)
        count = self._drawing.reset(name, request.task_name)
        self._note(Record(request, now))
        return count

    def clear(self, request: Clear, now: float) -> int:
        """Remove the named rows, or a partition with its name. Unknown partitions: nothing to do."""
        if request.indexes is not None:
            count = self._clear_rows(request.indexes, request.generations)
            self._note(Record(request, now))
            return count
        partition = self._rows.partitions.get(self._rows.name(request.partition_id, request.global_step))
        if partition is None:
            return 0
        count = self._remove(partition, partition.rows(), "cleared")
        self._drawing.assignments.forget(partition.name)
        self._settle_draws(partition.name, None)
        self._rows.drop_partition(partition)
        self._note(Record(request, now))
        return count

    def register_sampler(
        self, task: str | None, sampler: SamplerLike, now: float = 0.0, by: RegisterSampler | None = None
    ) -> BaseSampler:
        """From now on this sampler serves the task (None: every task without its own), parked draws included.

        `by`: the request that named it; a sampler given as an object has to be given again after a restart.
        """
        made = self._drawing.samplers.register(task, sampler)
        self._note(Record(by or SamplerGiven(task_name=task, described=repr(made)), now))
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
        self._end_overdue(now)
        while self._stirred or self._window_freed:
            if self._window_freed:
                self._window_freed = False
                answers.extend(self._serve_puts(now))
            stirred, self._stirred = self._stirred, {}
            for name in sorted(stirred):
                answers.extend(self._serve_draws(name, stirred[name], now))
        for late in self._waiting.overdue(now):
            answers.append((late.ticket, self._too_late(late, now)))
        return answers

    def next_deadline(self) -> float | None:
        """When `wake` has something to do even if nothing changes until then."""
        return min(filter(None, (self._waiting.next_deadline(), self.leases.next_deadline())), default=None)

    def resume(self, now: float) -> None:
        """The controller was started again: leases last from now on, for nobody could renew them meanwhile."""
        self._leasing.resume(now)
        self._note(Record(Resumed(), now))

    # ------------------------------------------------------------ inside

    def _note(self, record: Record) -> None:
        """One change is complete."""
        self.records.add(record)
        self.blocks.close_orders()

    def _meet(self, name: str, task: str, now: float) -> None:
        """The first draw of a task in a partition is a change: what went before counts as dropped for it."""
        partition = self._rows.partitions.get(name)
        if partition is not None and task not in partition.accounts:
            partition.account(task)
            self._note(Record(TaskSeen(task_name=task), now, partition=name))

    def _attempt(self, draw: Draw, plan: Plan, name: str, ticket: Ticket, asker: Asker) -> Drawn | None:
        """Serve a draw and note it; also what changed although it is refused."""
        assignments = self._drawing.assignments
        assignments.skipped = False
        try:
            done = self._drawing.attempt(draw, plan, name, asker)
        except StaleSampleError:
            if assignments.skipped and plan.split is not None:
                skipped = TurnSkipped(task_name=draw.task_name, rank=plan.split.rank)
                self._note(Record(skipped, asker.now, partition=name))
            raise
        if done is None:
            return None
        choice, drawn, record = done
        self._note(
            Record(
                draw,
                asker.now,
                ticket,
                asker.client,
                name,
                choice.rows,
                None if choice.consumed is choice.rows else choice.consumed,
                int(drawn.generations.sum()),
                split=choice.split,
                bounds=choice.bounds,
                sampler_state=plan.sampler_state(),
            )
        )
        return self._answered(ticket, drawn, record)

    def _end_overdue(self, now: float) -> None:
        for lease in self.leases.overdue(now):
            self._end_lease(lease, "it ran out", now)

    def _end_lease(self, lease: Lease, how: str, now: float) -> None:
        partition, spoiled = self._leasing.end(lease, how)
        self._quarantine(partition, spoiled)
        self._stir(partition.name)
        self._note(Record(LeaseEnded(lease_token=lease.token, how=how), now))

    def _quarantine(self, partition: Partition, rows: Int64s) -> None:
        """Rows that were given back too often are dropped; the partition remembers what they were."""
        if len(rows):
            partition.remember_quarantined(rows)
            self._drop(partition, rows, "quarantined")

    def _drop(self, partition: Partition, rows: Int64s, reason: str) -> None:
        shrunk = partition.shrink_groups(rows)
        self._remove(partition, rows, reason)
        for group in shrunk:
            partition.recheck_group(group)

    def _apply(
        self, request: Put, name: str, ticket: Ticket, client: str, now: float, at: Int64s | None = None
    ) -> PutDone:
        done, touched = self._putting.apply(request, name, client, now, at)
        self._note(Record(request, now, ticket, client, name, done.indexes, check=int(done.generations.sum())))
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
            if record.partition == name and task in (None, record.task):
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
            self._leasing.forget_rows(partition, lambda held: ~self._rows.table.fresh(*held))
            self._drawing.reserving.after_clear(partition)
        if partition.step is not None:
            self._window_freed = True
        self._stir(partition.name)
        return len(rows)

    def _serve_draws(self, name: str, tasks: set[str] | None, now: float) -> list[Answer]:
        answers: list[Answer] = []
        if name not in self._rows.partitions:
            return answers
        for task in sorted(self._waiting.tasks(name) if tasks is None else tasks):
            self._meet(name, task, now)
            hopeless: set[Any] = set()
            for waiting in self._waiting.draws(name, task):
                if waiting.signature not in hopeless:
                    answer = self._try(waiting, now)
                    if answer is None:
                        hopeless.add(waiting.signature)
                    else:
                        answers.append((waiting.ticket, answer))
        return answers

    def _try(self, waiting: WaitingDraw, now: float) -> Drawn | TransferQueueError | None:
        asker = Asker(waiting.client, now)
        try:
            drawn = self._attempt(waiting.draw, waiting.plan, waiting.partition, waiting.ticket, asker)
        except TransferQueueError as error:
            self._waiting.remove(waiting.ticket)
            return error
        if drawn is not None:
            self._waiting.remove(waiting.ticket)
        return drawn

    def _serve_puts(self, now: float) -> list[Answer]:
        answers: list[Answer] = []
        for waiting in self._waiting.puts():
            try:
                if self._putting.obstacle(waiting.put, waiting.partition) is not None:
                    continue
                if waiting.put.lease_token is not None:
                    self._leasing.check_writer(waiting.put.lease_token, waiting.put.indexes)
                answer: PutDone | TransferQueueError = self._apply(
                    waiting.put, waiting.partition, waiting.ticket, waiting.client, now
                )
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
