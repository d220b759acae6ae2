"""The ledger: what exists, who may have it, who waits for it.

Every call takes a request (and `now`, in seconds of any steady clock), changes the state or raises with the state
unchanged, and returns the reply; `None` means that the request is parked under its ticket. Parked requests are
answered by `wake`, which the owner calls after every change and when `next_deadline` has come. What storage may reuse
is read from `blocks.take_orders()`, what changed from `records.take()`: `replaying.replay` makes the same changes in
another ledger. Nothing here reads a clock or blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, TransferQueueError
from transfer_queue.ledger import state as stored
from transfer_queue.ledger.blocks import BlockBook
from transfer_queue.ledger.drawing import Asker, Drawing
from transfer_queue.ledger.gate import Gate
from transfer_queue.ledger.leases import Lease, LeaseBook
from transfer_queue.ledger.limits import Limits
from transfer_queue.ledger.lookup import Lookup
from transfer_queue.ledger.losing import lose_unit, reconcile
from transfer_queue.ledger.putting import Putting
from transfer_queue.ledger.records import Record, Records
from transfer_queue.ledger.removing import CLEARED, Removing
from transfer_queue.ledger.reports import Reports
from transfer_queue.ledger.restoring import restorable
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.serving import Answer, Serving
from transfer_queue.ledger.state import Numbered, State
from transfer_queue.ledger.stirring import Stirred
from transfer_queue.ledger.versions import Versions
from transfer_queue.ledger.waiting import Ticket, WaitingPut, WaitingRoom
from transfer_queue.messages import (
    AbortGroup,
    Ack,
    AckMany,
    Admit,
    Admitted,
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
    SetVersion,
)
from transfer_queue.messages.journal import LeaseEnded, Resumed, SamplerGiven, UnitGivenUp
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.registry import SamplerLike

Int64s: TypeAlias = NDArray[np.int64]


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
        limits: Limits | Mapping[str, int | None] | None = None,
        max_staleness: int | None = None,
    ) -> None:
        for name, value in (("num_global_batch", num_global_batch), ("num_n_samples", num_n_samples)):
            _check_positive(name, value)
        for name, optional in (("global_batch_size", global_batch_size), ("max_deliveries", max_deliveries)):
            if optional is not None:
                _check_positive(name, optional)
        if max_staleness is not None and (type(max_staleness) is not int or max_staleness < 0):
            raise InvalidArgument(f"max_staleness must be a whole number of at least 0, not {max_staleness!r}")
        ring = (global_batch_size * num_n_samples, num_global_batch) if global_batch_size else (0, 0)
        limits = limits if isinstance(limits, Limits) else Limits(**(limits or {}))
        self._rows = Rows(*ring, limits)
        self.gate = Gate(self._rows)
        self._waiting = WaitingRoom()
        self._versions = Versions(self._rows, max_staleness)
        self._putting = Putting(self._rows, num_n_samples, self._versions)
        self._lookup = Lookup(self._rows)
        self._drawing = Drawing(self._rows, self._lookup, sampler, num_n_samples, max_deliveries)
        self._leasing = self._drawing.leasing
        self._stirred = Stirred()
        self._removing = Removing(self._rows, self._drawing, self._versions, self._stirred)
        self.records = Records()
        self._refused: list[Answer] = []  # parked requests that a change made impossible
        self.reports = Reports(self._rows, self._drawing, self._waiting, self.gate, self._versions)
        parts = (self._rows, self._putting, self._drawing, self._removing, self._waiting, self.reports, self.records)
        self.serving = Serving(*parts, self.gate, self._stirred)

    @property
    def capacity(self) -> int:
        """How many samples there are slots for now."""
        return self._rows.table.capacity

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
            self._leasing.check_writer(request)
        return self.serving.put(request, name, ticket, client, now)

    def admit(self, request: Admit, ticket: Ticket, client: str, now: float) -> Admitted | None:
        """Keep room for a put that is going to be written; parked as that put would be."""
        return self.serving.admit(request, self.gate.check(request), ticket, client, now)

    def set_tags(self, request: SetTags, now: float) -> int:
        """Merge tags into rows; returns their number. Samplers may choose by them: waiting draws are tried again."""
        self._putting.set_tags(request)
        for partition, _ in self._rows.owners(request.indexes):
            self._stirred.stir(partition.name)
        self.serving.note(Record(request, now))
        return len(request.indexes)

    def seal_group(self, request: SealGroup, now: float) -> int:
        """The group is complete with what it has; returns how many rows that are."""
        partition = self._rows.existing(request.partition_id)
        group = partition.groups.seal(request.group_id)
        partition.recheck_group(group)
        self._stirred.stir(partition.name)
        self.serving.note(Record(request, now))
        return group.size

    def abort_group(self, request: AbortGroup, now: float) -> int:
        """Drop the rows of a group; later rows for it are refused."""
        partition = self._rows.existing(request.partition_id)
        group = partition.groups.abort(request.group_id)
        count = self._removing.remove(partition, partition.rows_at(group.ordinals), request.reason)
        self.serving.note(Record(request, now))
        return count

    def drop(self, request: Drop, now: float) -> int:
        """Take rows out for good; their groups settle without them. Returns their number."""
        if not request.reason:
            raise InvalidArgument("drop needs a reason: it is what the samples are accounted under")
        self._rows.table.check_fresh(request.indexes, request.generations)
        rows = np.unique(request.indexes)
        for partition, positions in self._rows.owners(rows):
            self._removing.drop(partition, rows[positions], request.reason)
        self.serving.note(Record(request, now))
        return len(rows)

    def set_policy_version(self, request: SetVersion, now: float) -> int:
        """The policy has this version now. Drops what is too old for it and in nobody's hands; returns how many."""
        self._versions.check_next(request.version)
        if request.version == self._versions.current:
            return 0
        self._versions.advance(request.version)
        count = self._removing.drop_stale()
        self.serving.note(Record(request, now))
        return count

    def settle(self, request: Settle, now: float) -> Settled:
        """Which of these blocks of a dead writer are in use? The others are refused from now on."""
        settled = Settled(committed=self.blocks.settle(request.blocks))
        self._stirred.window_freed = True  # who waits with a block that is refused now hears it
        self.serving.note(Record(request, now))
        return settled

    def reconcile(self, request: Reconcile, now: float) -> Reconciled:
        """A unit came back with these blocks: rows of those it lost are not ready any more."""
        reconciled = reconcile(self._rows, request, self._stirred)
        self.serving.note(Record(request, now))
        return reconciled

    def lose_unit(self, unit: int, now: float, by: object) -> None:
        """What a unit stores is lost: by `UnitGivenUp`, or by an `Announce` without its index, for which it is new."""
        lose_unit(self._rows, unit, self._stirred, for_good=not isinstance(by, UnitGivenUp))
        self.serving.note(Record(by, now))

    # ------------------------------------------------------------ consuming

    def draw(self, request: Draw, ticket: Ticket, now: float, client: str = "") -> Drawn | None:
        """Serve a draw, or park it; one that no state could serve raises at once."""
        name = self._rows.name(request.partition_id, request.global_step)
        return self.serving.draw(request, name, ticket, Asker(client, now))

    def ack(self, request: Ack, now: float) -> int:
        """Consume rows of a lease; returns how many were not acknowledged before."""
        self._end_overdue(now)
        count, more = self._leasing.ack(request.lease_token, request.indexes, request.generations)
        if more is not None:
            self._stirred.stir(more.name)
        self.serving.note(Record(request, now))
        return count

    def ack_many(self, request: AckMany, now: float) -> tuple[str, ...]:
        """Consume rows of several leases; returns of each why it was refused, or ""."""
        self._end_overdue(now)
        refused = self._leasing.ack_each(request, self._stirred.stir)
        self.serving.note(Record(request, now))
        return refused

    def release(self, request: Release, now: float) -> int:
        """Give rows of a lease back, to be drawn again; returns their number."""
        self._end_overdue(now)
        count, partition, spoiled = self._leasing.release(request.lease_token, request.indexes, request.generations)
        self._removing.quarantine(partition, spoiled)
        self._stirred.stir(partition.name)
        self.serving.note(Record(request, now))
        return count

    def renew(self, request: Renew, now: float) -> float:
        """The lease lasts so long from now; returns how long, in seconds."""
        self._end_overdue(now)
        duration_s = self._leasing.renew(request.lease_token, request.lease_s, now)
        self.serving.note(Record(request, now))
        return duration_s

    def end_lease(self, lease: Lease, how: str, now: float) -> None:
        """A lease is over without a word from its holder, unless what ended another one has ended it already."""
        if lease.token not in self.leases.open:
            return
        partition, spoiled = self._leasing.end(lease, how)
        self._removing.quarantine(partition, spoiled)
        self._stirred.stir(partition.name)
        self.serving.note(Record(LeaseEnded(lease_token=lease.token, how=how), now))

    def client_gone(self, client: str, now: float) -> None:
        """A client is dead or has left: what it holds goes back at once, and counts as overdue."""
        for lease in self.leases.of_client(client):
            self.end_lease(lease, "its holder is gone", now)

    def locate(self, request: Locate) -> Drawn:
        """Look rows up without consuming them."""
        return self._lookup.locate(request)

    def cancel(self, ticket: Ticket, now: float) -> bool:
        """Nobody waits for this request any more: forget it, or give back what it drew. False: it is not known."""
        waiting = self._waiting.remove(ticket)
        if waiting is not None:
            self._stirred.window_freed |= isinstance(waiting, WaitingPut)  # who waited behind it may pass now
            return True
        return self.serving.undo(ticket, now)

    def reset(self, request: ResetConsumption, now: float) -> int:
        """Give back what a task, or every task, consumed or reserved in a partition; returns how many rows it has."""
        name = self._rows.name(request.partition_id, request.global_step)
        self._stirred.stir(name)
        self.serving.settle_draws(name, request.task_name)
        count = self._drawing.reset(name, request.task_name)
        self.serving.note(Record(request, now))
        return count

    def clear(self, request: Clear, now: float) -> int:
        """Remove the named rows, or a partition with its name. Unknown partitions: nothing to do."""
        if request.indexes is not None:
            count = self._removing.clear(request.indexes, request.generations)
        elif (partition := self._rows.known(request.partition_id, request.global_step)) is None:
            return 0
        elif request.keys is not None:
            count = self._removing.clear_keys(partition, request.keys)
        else:
            self._drawing.samplers.clear_caches(partition.name)
            count = self._removing.remove(partition, partition.rows(), CLEARED)
            self._drawing.assignments.forget(partition.name)
            self.serving.settle_draws(partition.name, None)
            self._rows.drop_partition(partition)
        self.serving.note(Record(request, now))
        return count

    def register_sampler(
        self, task: str | None, sampler: SamplerLike, now: float = 0.0, by: RegisterSampler | None = None
    ) -> BaseSampler:
        """From now on this sampler serves the task (None: every task without its own), parked draws included.

        `by`: the request that named it; a sampler given as an object has to be given again after a restart.
        """
        named = None if by is None else (by.sampler, by.arguments)
        made = self._drawing.samplers.register(task, sampler, named)
        self.serving.note(Record(by or SamplerGiven(task_name=task, described=repr(made)), now))
        for waiting in self._waiting.all_draws():
            try:
                self._waiting.replan(waiting, self._drawing.plan(waiting.draw, waiting.partition))
            except TransferQueueError as error:
                self._waiting.remove(waiting.ticket)
                self._refused.append((waiting.ticket, error))
            self._stirred.stir(waiting.partition)
        return made

    def lose_sampler(self, given: SamplerGiven, now: float) -> None:
        """A sampler that was given as an object is gone: until it is given again, its tasks raise."""
        self._drawing.samplers.lose(given.task_name, given.described)
        self.serving.note(Record(given, now))

    # ------------------------------------------------------------ waiting

    def wake(self, now: float, *, serve: bool = True) -> list[Answer]:
        """Answer the parked requests that can be served by now, in order of arrival, and those that are overdue.

        `serve` False: only the latter; the former wait for the next call.
        """
        answers, self._refused = self._refused, []
        self._end_overdue(now)
        self.gate.expire(now)
        if serve:
            answers += self.serving.serve_waiting(now)
        answers += [(late.ticket, self.serving.too_late(late, now)) for late in self._waiting.overdue(now)]
        return answers + self.serving.serve_waiting(now) if serve else answers

    def next_deadline(self) -> float | None:
        """When `wake` has something to do even if nothing changes until then."""
        due = (self._waiting.next_deadline(), self.leases.next_deadline(), self.gate.next_deadline())
        return min(filter(None, due), default=None)

    def resume(self, now: float) -> None:
        """The controller was started again: leases last from now on, for nobody could renew them meanwhile."""
        self._leasing.resume(now)
        self.serving.note(Record(Resumed(), now))

    # ------------------------------------------------------------ the state as a whole

    def state(self) -> State:
        """The state as plain values, for `load`. Copies what changes, so that the copy may be used at leisure."""
        numbered = Numbered()
        state = {
            "rows": stored.dump_rows(self._rows),
            "assignments": stored.dump_assignments(self._drawing.assignments, numbered),
            "leases": stored.dump_leases(self.leases, numbered),
            "draws": stored.dump_draws(self.serving.undoable, numbered),
            "samplers": self._drawing.samplers.state(),
            "usage": self.gate.state(),
            "versions": self._versions.state(),
        }
        return state | {"pool": [stored.dump_assignment(assignment) for assignment in numbered.all]}

    def replace(self, state: State, old: Int64s, new: Int64s) -> int:
        """Take the state of a checkpoint in place of all that is there; return how many samples it has.

        Block `old[i]` of it is `new[i]` now. What was there is freed; who waits is looked at again. Raises with
        everything as before. Not among the `records`: write the new state down whole. Done again, it changes nothing.
        """
        before = self.state()
        gone = np.setdiff1d(np.array(list(self.blocks.cells), np.int64), new)
        try:
            self.load(restorable(state, before, old, new))
        except BaseException:
            self.load(before)
            raise
        self._removing.drop_stale()  # this queue may have another window, and nobody has anything of it
        self.blocks.free(gone)
        self.serving.try_all_again()
        return sum(partition.live for partition in self._rows.partitions.values())

    def load(self, state: State) -> None:
        """Become the ledger that had this state; it must have been made with the same arguments as this one."""
        known = [stored.load_assignment(described) for described in state["pool"]]
        stored.load_rows(self._rows, state["rows"])
        self._versions.load(state["versions"])
        self.gate.load(state["usage"])
        stored.load_assignments(self._drawing.assignments, state["assignments"], known)
        stored.load_leases(self.leases, state["leases"], known)
        self.serving.undoable = stored.load_draws(state["draws"], known)
        self._drawing.samplers.load(state["samplers"])

    # ------------------------------------------------------------ inside

    def _end_overdue(self, now: float) -> None:
        for lease in self.leases.overdue(now):
            self.end_lease(lease, "it ran out", now)


def _check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name} must be a whole number of at least 1, not {value!r}")
