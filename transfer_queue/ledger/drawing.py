"""One draw: find rows, take them, tell where they are; and how to take it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, SamplerError, TransferQueueError, WrongType
from transfer_queue.ledger.assignments import Assignment, Assignments
from transfer_queue.ledger.caching import KeptBatches
from transfer_queue.ledger.leasing import Leasing, checked_duration
from transfer_queue.ledger.lookup import Lookup
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.reserving import Reserving
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.selection import Plan, SamplerBook, Split
from transfer_queue.ledger.table import Handle
from transfer_queue.messages import Draw, Drawn
from transfer_queue.samplers.registry import SamplerLike
from transfer_queue.samplers.states import Batch, batch_of

Int64s: TypeAlias = NDArray[np.int64]


class Asker(NamedTuple):
    """Who draws, and when."""

    client: str
    now: float


class Choice(NamedTuple):
    """What is to be known of a draw to make it again without its sampler."""

    rows: Int64s  # handed out
    consumed: Int64s  # marked consumed; the same object where it is the same
    split: Split | None = None
    bounds: list[int] | None = None  # of the slices, where the draw fixed them
    sampler_state: dict[str, Any] | None = None  # what the sampler keeps, after it chose


@dataclass
class DrawRecord:
    """What an answered draw took."""

    partition: str
    task: str
    consumed: Handle
    split: Split | None = None
    assignment: Assignment | None = None
    stirs: bool = False  # the draw gave rows back, or fixed the slices of other ranks: others may be answered now
    lease_token: int | None = None


class Drawing:
    """Serves draws from the ready sets."""

    def __init__(
        self,
        rows: Rows,
        lookup: Lookup,
        sampler: SamplerLike | None,
        num_n_samples: int,
        max_deliveries: int | None = None,
    ) -> None:
        self._rows = rows
        self._lookup = lookup
        self.samplers = SamplerBook(sampler, num_n_samples)
        self.assignments = Assignments(rows.table, self.samplers.forget_kept)
        self.reserving = Reserving(rows.table, self.assignments)
        self.leasing = Leasing(rows, self.assignments, self.reserving, max_deliveries)

    def plan(self, draw: Draw, name: str) -> Plan:
        """Check the request; raise if no state of the partition could ever serve it."""
        if not draw.task_name:
            raise InvalidArgument("get_meta needs a task_name: consumption is tracked per task")
        if not draw.fields or not all(isinstance(field, str) for field in draw.fields):
            raise InvalidArgument(f"data_fields must name at least one field, not {draw.fields!r}")
        if isinstance(draw.batch_size, bool) or not isinstance(draw.batch_size, int):
            raise WrongType(f"batch_size must be an int, not {draw.batch_size!r}")
        if draw.batch_size < 1:
            raise InvalidArgument(f"batch_size must be at least 1, not {draw.batch_size}")
        if draw.lease_s is not None:
            checked_duration(draw.lease_s)
        plan = self.samplers.plan(draw)
        if self._rows.step_of(name) is not None and plan.want > self._rows.step_size:
            raise InvalidArgument(
                f"{name!r} holds at most {self._rows.step_size} samples (global_batch_size × num_n_samples); "
                f"a draw of {plan.want} can never be served"
            )
        return plan

    def attempt(self, draw: Draw, plan: Plan, name: str, asker: Asker) -> tuple[Choice, Drawn, DrawRecord] | None:
        """Serve the draw if that is possible now; return also what was chosen."""
        partition = self._rows.partitions.get(name)
        if partition is None:
            return None
        split = plan.split
        assignment = None if split is None else self.assignments.find(name, draw, split)
        if split is not None and split.kept:
            return self._attempt_kept(draw, plan, partition, split, assignment, asker)
        bounds = None
        if assignment is None:
            chosen = self._select(draw, plan, partition)
            if chosen is None:
                return None
            if split is not None:
                bounds = self.assignments.bounds(plan, chosen[0])
            choice = Choice(*chosen, split, bounds, plan.sampler_state())
        else:
            choice = Choice(assignment.chosen.rows, assignment.consumed, split)
        if split is None:
            return choice, *self._take(draw, partition, choice, asker)
        taken = self._take_slice(draw, partition, choice, split, assignment, asker)
        return None if taken is None else (choice, *taken)

    def _attempt_kept(
        self,
        draw: Draw,
        plan: Plan,
        partition: Partition,
        split: Split,
        before: Assignment | None,
        asker: Asker,
    ) -> tuple[Choice, Drawn, DrawRecord] | None:
        """The same for one rank of a sampler that may keep batches; it keeps nothing of what is not served."""
        kept = KeptBatches(plan.sampler, partition.name, draw.task_name, split.batch_index)
        try:
            chosen = self._select(draw, plan, partition, before)
            taken = None if chosen is None else self._take_kept(draw, plan, partition, (kept, before), chosen, asker)
        except TransferQueueError:
            kept.put_back()
            raise
        if taken is None:
            kept.put_back()
        return taken

    def _take_kept(
        self,
        draw: Draw,
        plan: Plan,
        partition: Partition,
        known: tuple[KeptBatches, Assignment | None],
        chosen: tuple[Int64s, Int64s],
        asker: Asker,
    ) -> tuple[Choice, Drawn, DrawRecord] | None:
        split, (kept, before), whole = plan.split, known, plan.sampler_state()
        assert split is not None and isinstance(split.group, tuple)
        if before is not None and chosen[0] is before.chosen.rows:
            choice = Choice(*chosen, split, sampler_state=None if whole is None else {"kept": [], "whole": whole})
            again = self._take_slice(draw, partition, choice, split, before, asker)
            return None if again is None else (choice, *again)
        if not self.samplers.has_cached_result(plan, draw, partition.name):
            choice = Choice(*chosen, sampler_state=whole)
            return choice, *self._take(draw, partition, choice, asker)
        if before is not None and before.leased:
            raise SamplerError(f"sampler {plan.sampler!r} chose another batch for a rank that has a lease of the last")
        state = {"kept": kept.changed(split.group[0]), "whole": whole}
        choice = Choice(*chosen, split, [0, len(chosen[0])], state)
        made = self._deal(draw, partition, choice, split, before, asker)
        return None if made is None else (choice, *made)

    def _deal(
        self,
        draw: Draw,
        partition: Partition,
        choice: Choice,
        split: Split,
        before: Assignment | None,
        asker: Asker,
    ) -> tuple[Drawn, DrawRecord] | None:
        """Hand a new batch out, and reserve what the sampler keeps for other ranks beside it."""
        if before is not None:
            self.reserving.give_up(partition, draw.task_name, before)
        taken = self._take_slice(draw, partition, choice, split, None, asker)
        kept: list[tuple[Any, Any]] = (choice.sampler_state or {})["kept"]
        for rank, value in kept:
            share = batch_of(value)
            if (rank,) != split.group and share is not None:
                self._reserve_share(draw, partition, Split(0, 1, (rank,), split.batch_index), share)
        if taken is not None:
            taken[1].stirs |= before is not None or len(kept) > 1
        return taken

    def _reserve_share(self, draw: Draw, partition: Partition, split: Split, share: Batch) -> None:
        """Reserve a batch that was dealt to a rank before it asked, unless it is another's or not ready."""
        rows, consumed = (np.array(indexes, np.int64) for indexes in share)
        if len(rows) == 0 or not self._may_take(draw, partition, np.concatenate([rows, consumed])):
            return
        old = self.assignments.find(partition.name, draw, split)
        if old is not None and old.leased:
            return
        if old is not None:
            self.reserving.give_up(partition, draw.task_name, old)
        made = self.assignments.form(partition, draw, split, rows, consumed, [0, len(rows)])
        self.reserving.reserve(partition, draw.task_name, made.held.rows)

    def _may_take(self, draw: Draw, partition: Partition, rows: Int64s) -> bool:
        table = self._rows.table
        own = bool(partition.owns(rows).all())
        return own and bool(table.available(rows, draw.fields, table.task(draw.task_name)).all())

    def smaller_slice(self, draw: Draw, plan: Plan, name: str) -> Drawn | None:
        """An answer without rows, if other ranks shared what is left of a sealed partition in smaller slices."""
        partition = self._rows.partitions.get(name)
        if partition is None or not partition.sealed or plan.split is None or plan.split.kept:
            return None
        formed = self.assignments.formed(name, draw.task_name, plan.split)
        size = draw.batch_size if formed is None else formed.terms["batch_size"]
        assert isinstance(size, int)
        return self._end(draw, partition, size) if size < draw.batch_size else None

    def end_of_stream(self, draw: Draw, plan: Plan, name: str) -> Drawn | None:
        """An answer without rows, if no more come and those that the task did not consume are too few for this draw.

        Its `extra_info` says so, how many are `left`, and the `batch_size` of a draw that may still get them; 0: none
        can, because they are too few for groups or ranks.
        """
        partition = self._rows.partitions.get(name)
        if partition is None or not partition.sealed:
            return None
        if plan.split is not None and self.assignments.find(name, draw, plan.split) is not None:
            return None  # the rows of this batch are chosen, and wait for their fields
        left = self._left(draw, partition)
        if left >= plan.least:
            ready = partition.ready_set(draw.task_name, draw.fields)
            if plan.group_size is None or len(ready) < left:  # those that are not ready may make groups whole
                return None
        fits = left // max(1, plan.want // draw.batch_size)
        fits -= 0 if plan.group_size is None else fits % plan.group_size
        return self._end(draw, partition, fits)

    def _left(self, draw: Draw, partition: Partition) -> int:
        rows = partition.rows()
        return len(rows) - int(self._rows.table.task(draw.task_name).consumed[rows].sum())

    def _end(self, draw: Draw, partition: Partition, batch_size: int) -> Drawn:
        extra = {"end_of_stream": True, "left": self._left(draw, partition), "batch_size": batch_size}
        none = partition.rows()[:0]
        return self._lookup.describe(partition.name, none, draw.fields, [partition], extra_info=extra)

    def redo(self, draw: Draw, partition: Partition, choice: Choice, asker: Asker) -> tuple[Drawn, DrawRecord] | None:
        """Make a draw again that was made before, with the same choice."""
        if choice.split is None:
            return self._take(draw, partition, choice, asker)
        assignment = self.assignments.find(partition.name, draw, choice.split)
        if choice.split.kept and choice.bounds is not None:
            return self._deal(draw, partition, choice, choice.split, assignment, asker)
        return self._take_slice(draw, partition, choice, choice.split, assignment, asker)

    def remember(self, draw: Draw, partition: str, choice: Choice) -> None:
        """Note what the sampler kept after a draw that is made again."""
        state = choice.sampler_state
        if state is None or choice.split is None or not choice.split.kept:
            self.samplers.restore(draw, state)
        else:
            self.samplers.restore_kept(draw, partition, choice.split.batch_index, state["kept"])
            self.samplers.restore(draw, state["whole"])

    def _take(self, draw: Draw, partition: Partition, choice: Choice, asker: Asker) -> tuple[Drawn, DrawRecord]:
        rows, consumed = choice.rows, choice.consumed
        task, granted = draw.task_name, None
        if draw.lease_s is None:
            self._rows.table.task(task).consumed[consumed] = 1
            partition.take(task, consumed)
        else:
            lease = self.leasing.grant(partition, task, asker.client, draw.lease_s, asker.now, rows, consumed)
            granted = (lease.token, lease.duration_s)
        drawn = self._describe(draw, partition, rows, granted)
        taken = Handle(rows, drawn.generations) if consumed is rows else self._rows.table.handle(consumed)
        return drawn, DrawRecord(partition.name, task, taken, lease_token=drawn.lease_token)

    def _select(
        self, draw: Draw, plan: Plan, partition: Partition, before: Assignment | None = None
    ) -> tuple[Int64s, Int64s] | None:
        ready = partition.ready_set(draw.task_name, draw.fields)
        if len(ready) < plan.least and not plan.pairs:
            return None
        return self.samplers.select(plan, draw, ready, self._rows.table, before)

    def _take_slice(
        self,
        draw: Draw,
        partition: Partition,
        choice: Choice,
        split: Split,
        assignment: Assignment | None,
        asker: Asker,
    ) -> tuple[Drawn, DrawRecord] | None:
        """Hand out the slice of a rank; None if rows of it lack a field."""
        task = draw.task_name
        if assignment is None:
            assert choice.bounds is not None
            assignment = self.assignments.form(partition, draw, split, choice.rows, choice.consumed, choice.bounds)
            self.reserving.reserve(partition, task, assignment.held.rows)
        rows = assignment.slice_of(split.rank).rows
        if not self._rows.table.produced(rows, draw.fields).all():
            return None
        was_complete = not assignment.missing
        leased_before = split.rank in assignment.leased
        granted = self._lease_of_slice(draw, partition, assignment, split.rank, asker)
        leased = split.rank in assignment.leased
        replayed = self.assignments.serve(partition.name, task, split, assignment, leased=leased)
        nothing = self._rows.table.handle(rows[:0])
        stirs = choice.bounds is not None and not split.kept
        record = DrawRecord(partition.name, task, nothing, split, assignment, stirs)
        record.lease_token = assignment.leased[split.rank] if leased and not leased_before else None
        if not was_complete and not assignment.missing:
            record.stirs |= self.reserving.complete(partition, task, assignment)
        return self._describe(draw, partition, rows, granted, {"replayed": True} if replayed else {}), record

    def _lease_of_slice(
        self, draw: Draw, partition: Partition, assignment: Assignment, rank: int, asker: Asker
    ) -> tuple[int, float] | None:
        """Return token and seconds left of the lease of this rank's slice: peers of a rank share theirs."""
        token = assignment.leased.get(rank)
        if token is not None:
            return token, self.leasing.book.open[token].deadline - asker.now
        if draw.lease_s is None:
            return None
        if rank in assignment.done:  # a peer acknowledged it already: a second time does no harm
            last = assignment.tokens.get(rank)
            return None if last is None else (last, draw.lease_s)
        at = (assignment, rank)
        lease = self.leasing.grant_slice(partition, draw.task_name, asker.client, draw.lease_s, asker.now, at)
        return lease.token, lease.duration_s

    def _describe(
        self,
        draw: Draw,
        partition: Partition,
        rows: Int64s,
        granted: tuple[int, float] | None,
        extra: dict[str, object] | None = None,
    ) -> Drawn:
        extra = extra or {}
        returns = self._rows.table.task(draw.task_name).returns
        if returns and granted is not None and any(row in returns for row in rows.tolist()):
            extra["deliveries"] = [1 + len(returns.get(row, ())) for row in rows.tolist()]
        return self._lookup.describe(partition.name, rows, draw.fields, [partition], extra_info=extra, lease=granted)

    def undo(self, record: DrawRecord) -> None:
        """The answer never arrived: what it took is ready again."""
        partition = self._rows.partitions[record.partition]
        task = record.task
        if record.lease_token is not None:
            self.leasing.withdraw(record.lease_token)
        elif record.assignment is None:
            rows = self._rows.table.alive(record.consumed)
            self._rows.table.task(task).consumed[rows] = 0
            partition.give_back(task, rows)
        assignment, split = record.assignment, record.split
        if assignment is None or split is None:
            return
        was_complete = not assignment.missing
        self.assignments.unserve(partition.name, task, split, assignment)
        if was_complete and assignment.missing:
            self.reserving.reserve(partition, task, self._rows.table.alive(assignment.held))
        self.reserving.break_slices(partition, task, assignment)

    def reset(self, name: str, task: str | None) -> int:
        """Forget what a task, or every task, consumed and reserved in a partition; returns how many rows it has."""
        partition = self._rows.partitions.get(name)
        if partition is None:
            return 0
        rows = partition.rows()
        self.leasing.forget(name, task, "consumption was reset")
        self.assignments.forget(name, task)
        for known in [known for known in partition.accounts if task in (None, known)]:
            column = self._rows.table.task(known)
            column.forget(rows, rows.tolist() if column.returns else ())
            partition.give_back(known, rows)
        return len(rows)
