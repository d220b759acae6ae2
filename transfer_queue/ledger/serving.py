"""Puts and draws: answered at once, or parked and answered by the change that makes them possible."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, TypeAlias

from transfer_queue.errors import JournalDamaged, StaleSampleError, TransferQueueError
from transfer_queue.ledger.drawing import Asker, Choice, Drawing, DrawRecord
from transfer_queue.ledger.gate import Gate
from transfer_queue.ledger.keys import KeyBook
from transfer_queue.ledger.putting import Putting
from transfer_queue.ledger.records import Record, Records
from transfer_queue.ledger.removing import Removing
from transfer_queue.ledger.reports import Reports
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.selection import Plan, Split
from transfer_queue.ledger.stirring import Stirred
from transfer_queue.ledger.waiting import Ticket, WaitingDraw, WaitingKeys, WaitingPut, WaitingRoom
from transfer_queue.messages import Admit, Admitted, Draw, Drawn, Keys, Put, PutDone
from transfer_queue.messages.journal import DrawUndone, RowsExpected, TaskSeen, TurnSkipped

Answer: TypeAlias = tuple[Ticket, "PutDone | Admitted | Drawn | Keys | TransferQueueError"]

_UNDOABLE = 4096
"""How many answered draws are remembered, so that one whose answer could not be delivered is undone."""


class Serving:
    """What is waited for, and what a change made possible. Each put and draw that is carried out is noted."""

    def __init__(
        self,
        rows: Rows,
        putting: Putting,
        drawing: Drawing,
        removing: Removing,
        waiting: WaitingRoom,
        reports: Reports,
        records: Records,
        gate: Gate,
        stirred: Stirred,
    ) -> None:
        self.undoable: OrderedDict[Ticket, DrawRecord] = OrderedDict()
        self.admits: Callable[[Put], bool] | None = None  # whether a put that waited can be written down now
        self.expected_rows: Callable[[], int] = lambda: 0  # of a partition that begins now
        self.keys = KeyBook(rows, waiting)
        self._rows = rows
        self._putting = putting
        self._gate = gate
        self._drawing = drawing
        self._removing = removing
        self._waiting = waiting
        self._reports = reports
        self._records = records
        self._stirred = stirred

    def note(self, record: Record) -> None:
        """One change is complete, but for the rows that nobody has any more and that are too old to be handed out."""
        self._removing.drop_stale()
        self._records.add(record)
        self._rows.blocks.close_orders()

    # ------------------------------------------------------------ puts

    def put(self, request: Put, name: str, ticket: Ticket, client: str, now: float) -> PutDone | None:
        """Carry a checked put out, or park it."""
        if self._passes(request, name, ticket, client, now):
            return self._apply(request, name, ticket, client, now)
        return None

    def admit(self, request: Admit, name: str, ticket: Ticket, client: str, now: float) -> Admitted | None:
        """Keep room for a put that is going to be written, or park the request until there is some."""
        if self._passes(request, name, ticket, client, now):
            return Admitted(admission=self._gate.admit(request, name, client, now))
        return None

    def _passes(self, request: Put | Admit, name: str, ticket: Ticket, client: str, now: float) -> bool:
        self._putting.check_open(request, name)
        if self._gate.obstacle(request, name, client) is None:
            return True
        if request.timeout_s <= 0:
            raise self._gate.too_late(request, name, client, 0.0)
        self._gate.wait(request, name, client)
        self._waiting.park_put(ticket, request, client, name, now)
        return False

    def redo_put(self, record: Record) -> PutDone:
        """Carry a put out again, into the same slots."""
        return self._apply(record.request, record.partition, record.ticket, record.client, record.now, record)

    def _apply(
        self, request: Put, name: str, ticket: Ticket, client: str, now: float, before: Record | None = None
    ) -> PutDone:
        begins = request.indexes is None and name not in self._rows.partitions
        expected = self.expected_rows() if begins and before is None else 0
        done, touched = self._putting.apply(request, name, client, now, None if before is None else before.rows)
        if before is not None and int(done.generations.sum()) != before.check:
            raise JournalDamaged(f"rows {done.indexes[:10].tolist()} had other generations when they were put first")
        if request.versions is not None:
            self._removing.drop_stale()
        if self._records.keep:
            check = int(done.generations.sum())
            self._records.add(Record(request, now, ticket, client, name, done.indexes, check=check))
        if expected:
            self.expect(name, expected, now)
        self._rows.blocks.close_orders()
        fields = tuple(spec.name for spec in request.columns)
        self._stirred.window_freed |= request.is_last  # puts that wait will never be let in
        for partition in touched:
            if request.tags is None and request.group_ids is None and not request.is_last and not begins:
                self._stirred.stir(partition.name, self._waiting.tasks(partition.name, fields))
            else:
                self._stirred.stir(partition.name)
        return done

    def expect(self, name: str, rows: int, now: float) -> None:
        """Until it had so many rows, the partition counts as neither produced nor consumed."""
        self._rows.existing(name).expected = rows
        self._records.add(Record(RowsExpected(rows=rows), now, partition=name))

    # ------------------------------------------------------------ draws

    def draw(self, request: Draw, name: str, ticket: Ticket, asker: Asker) -> Drawn | None:
        """Serve a draw or park it; one that no state could serve raises."""
        plan = self._drawing.plan(request, name)
        self.meet(name, request.task_name, asker.now)
        drawn = self._serve(request, plan, name, ticket, asker)
        if drawn is not None:
            return drawn
        if request.timeout_s <= 0:
            raise self._reports.timeout(request, plan, name, 0.0, asker.now)
        self._waiting.park_draw(ticket, request, asker.client, plan, name, asker.now)
        return None

    def redo_draw(self, record: Record) -> Drawn:
        """Make a draw again, with the rows that its sampler chose then."""
        assert record.rows is not None
        partition = self._rows.existing(record.partition)
        consumed = record.rows if record.consumed is None else record.consumed
        choice = Choice(record.rows, consumed, record.split, record.bounds, record.sampler_state)
        done = self._drawing.redo(record.request, partition, choice, Asker(record.client, record.now))
        if done is None or int(done[0].generations.sum()) != record.check:
            raise JournalDamaged(f"rows {record.rows[:10].tolist()} are not what they were when they were drawn first")
        self._drawing.remember(record.request, record.partition, choice)
        self.note(record)
        return self._answered(record.ticket, *done)

    def undo(self, ticket: Ticket, now: float) -> bool:
        """Give back what an answered draw took; False: it is not known (any more)."""
        record = self.undoable.pop(ticket, None)
        if record is None:
            return False
        self._drawing.undo(record)
        self._stirred.stir(record.partition)
        self.note(Record(DrawUndone(), now, ticket))
        return True

    def meet(self, name: str, task: str, now: float) -> None:
        """The first draw of a task in a partition is a change: what went before counts as dropped for it."""
        partition = self._rows.partitions.get(name)
        if partition is not None and task not in partition.accounts:
            partition.account(task)
            self.note(Record(TaskSeen(task_name=task), now, partition=name))

    def skip_turn(self, record: Record, split: Split) -> None:
        """A rank was told that its next batch is gone."""
        self._drawing.assignments.skip(record.partition, record.request.task_name, split)
        self.note(record)

    def settle_draws(self, name: str, task: str | None) -> None:
        """What these draws took was given back or is gone: they cannot be undone any more."""
        for ticket, record in list(self.undoable.items()):
            if record.partition == name and task in (None, record.task):
                del self.undoable[ticket]

    def _serve(self, draw: Draw, plan: Plan, name: str, ticket: Ticket, asker: Asker) -> Drawn | None:
        """Rows, or word that no more come; None: they may still come."""
        return (
            self._drawing.smaller_slice(draw, plan, name)
            or self._attempt(draw, plan, name, ticket, asker)
            or self._drawing.end_of_stream(draw, plan, name)
        )

    def _attempt(self, draw: Draw, plan: Plan, name: str, ticket: Ticket, asker: Asker) -> Drawn | None:
        """Serve a draw and note it; note also what changed although it is refused."""
        assignments = self._drawing.assignments
        assignments.skipped = False
        try:
            done = self._drawing.attempt(draw, plan, name, asker)
        except StaleSampleError:
            if assignments.skipped and plan.split is not None:
                skipped = TurnSkipped(task_name=draw.task_name, rank=plan.split.rank)
                self.note(Record(skipped, asker.now, partition=name))
            raise
        if done is None:
            return None
        choice, drawn, record = done
        if plan.split is not None:  # it may have ended the wait for the last rank
            self._removing.drop_stale()
        if self._records.keep:
            self._records.add(_record_of(draw, name, ticket, asker, choice, drawn))
        self._rows.blocks.close_orders()
        return self._answered(ticket, drawn, record)

    def _answered(self, ticket: Ticket, drawn: Drawn, record: DrawRecord) -> Drawn:
        self.undoable[ticket] = record
        if len(self.undoable) > _UNDOABLE:
            self.undoable.popitem(last=False)
        if record.stirs:
            self._stirred.stir(record.partition)
        elif self._rows.partitions[record.partition].sealed:  # others may wait for what will never come
            self._stirred.stir(record.partition, {record.task})
        if record.assignment is not None and record.lease_token is None and drawn.lease_token is not None:
            self._keep_for_peer(drawn.lease_token)
        return drawn

    def _keep_for_peer(self, token: int) -> None:
        """A peer of the rank has this lease too: it stays, though the answer that granted it may never have arrived."""
        for record in self.undoable.values():
            if record.lease_token == token:
                record.lease_token = None

    # ------------------------------------------------------------ what waits

    def try_all_again(self) -> None:
        """Everything may have changed: whoever waits is looked at again."""
        for waiting in self._waiting.all_draws():
            self._stirred.stir(waiting.partition)
        self._stirred.window_freed = True

    @property
    def may_serve(self) -> bool:
        """Whether `serve_waiting` may find somebody to answer."""
        if self._stirred.window_freed or self._gate.room_made or self.keys.feed.stirred:
            return True
        waiting = self._waiting.tasks
        return any(waiting(name) if tasks is None else tasks for name, tasks in self._stirred.partitions.items())

    def serve_waiting(self, now: float) -> list[Answer]:
        """Answer the parked requests that the changes since the last call made possible, in order of arrival."""
        answers: list[Answer] = []
        while self._stirred or self._gate.room_made:
            if self._stirred.window_freed or self._gate.room_made:
                self._stirred.window_freed = False
                answers.extend(self._serve_puts(now))
            stirred = self._stirred.take()
            for name in sorted(stirred):
                answers.extend(self._serve_draws(name, stirred[name], now))
        if self.keys.feed.stirred:
            answers.extend(self.keys.serve())
        return answers

    def _serve_draws(self, name: str, tasks: set[str] | None, now: float) -> list[Answer]:
        answers: list[Answer] = []
        if name not in self._rows.partitions:
            return answers
        for task in sorted(self._waiting.tasks(name) if tasks is None else tasks):
            self.meet(name, task, now)
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
            drawn = self._serve(waiting.draw, waiting.plan, waiting.partition, waiting.ticket, asker)
        except TransferQueueError as error:
            self._waiting.remove(waiting.ticket)
            return error
        if drawn is not None:
            self._waiting.remove(waiting.ticket)
        return drawn

    def _serve_puts(self, now: float) -> list[Answer]:
        answers: list[Answer] = []
        self._gate.next_round()
        for waiting in self._waiting.puts():
            try:
                answer: PutDone | Admitted | TransferQueueError | None = self._try_put(waiting, now)
            except TransferQueueError as error:
                answer = error
            if answer is not None:
                self._waiting.remove(waiting.ticket)
                answers.append((waiting.ticket, answer))
        return answers

    def _try_put(self, waiting: WaitingPut, now: float) -> PutDone | Admitted | None:
        request, name, client = waiting.put, waiting.partition, waiting.client
        if isinstance(request, Put):
            self._rows.blocks.refused.check(request.block_id)
            self._drawing.leasing.check_writer(request)
        self._putting.check_open(request, name)
        if self._gate.obstacle(request, name, client) is not None:
            self._gate.wait(request, name, client)
            return None
        if isinstance(request, Put):
            if self.admits is not None and not self.admits(request):
                return None
            return self._apply(request, name, waiting.ticket, client, now)
        return Admitted(admission=self._gate.admit(request, name, client, now))

    def too_late(self, late: WaitingDraw | WaitingPut | WaitingKeys, now: float) -> TransferQueueError:
        """The error of a request whose deadline came before it could be served."""
        waited_s = now - late.since
        if isinstance(late, WaitingKeys):
            return self.keys.too_late(late, waited_s)
        if isinstance(late, WaitingDraw):
            return self._reports.timeout(late.draw, late.plan, late.partition, waited_s, now)
        self._stirred.window_freed = True  # who waited behind it may pass now
        return self._gate.too_late(late.put, late.partition, late.client, waited_s)


def _record_of(
    draw: Draw,
    name: str,
    ticket: Ticket,
    asker: Asker,
    choice: Choice,
    drawn: Drawn,
) -> Record:
    return Record(
        draw,
        asker.now,
        ticket,
        asker.client,
        name,
        choice.rows,
        None if choice.consumed is choice.rows else choice.consumed,
        int(drawn.generations.sum()),
        choice.split,
        choice.bounds,
        choice.sampler_state,
    )
