"""Granting leases, and what becomes of their rows: consumed when acknowledged, ready again when given back or overdue.

The slice of a data-parallel rank is different in one respect: given back, it stays reserved for that rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument, LeaseExpired, TransferQueueError, WrongType
from transfer_queue.ledger.assignments import Assignment, Assignments
from transfer_queue.ledger.leases import DONE, GONE, OPEN, RETURNED, Lease, LeaseBook, shown
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.reserving import Reserving
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.table import Handle
from transfer_queue.messages import AckMany, Put

Int64s: TypeAlias = NDArray[np.int64]

_ACKNOWLEDGED = "acknowledged"


class Leasing:
    """The life of leases. `max_deliveries`: a sample given back so often is quarantined; None: never."""

    def __init__(self, rows: Rows, assignments: Assignments, reserving: Reserving, max_deliveries: int | None) -> None:
        self.book = LeaseBook()
        self.max_deliveries = max_deliveries
        self._rows = rows
        self._assignments = assignments
        self._reserving = reserving

    # ------------------------------------------------------------ granting

    def grant(
        self,
        partition: Partition,
        task: str,
        client: str,
        duration_s: float,
        now: float,
        rows: Int64s,
        consumed: Int64s,
    ) -> Lease:
        """Hold what a draw took. `rows` are handed out, `consumed` will be marked; they may differ."""
        hidden = np.empty(0, np.int64) if consumed is rows else np.setdiff1d(consumed, rows)
        every = np.concatenate([rows, hidden])
        marked = np.ones(len(every), np.bool_) if consumed is rows else np.isin(every, consumed)
        lease = self._add(partition, task, client, duration_s, now, self._rows.table.handle(every), len(rows), marked)
        self._reserving.reserve(partition, task, every[marked])
        return lease

    def grant_slice(
        self, partition: Partition, task: str, client: str, duration_s: float, now: float, at: tuple[Assignment, int]
    ) -> Lease:
        """Hold the slice of one rank, which is reserved already."""
        assignment, rank = at
        part = assignment.slice_of(rank)
        marked = np.ones(len(part.rows), np.bool_)
        lease = self._add(partition, task, client, duration_s, now, part, len(part.rows), marked, assignment.acked)
        lease.assignment, lease.rank = assignment, rank
        assignment.leased[rank] = assignment.tokens[rank] = lease.token
        return lease

    def _add(
        self,
        partition: Partition,
        task: str,
        client: str,
        duration_s: float,
        now: float,
        rows: Handle,
        handed_out: int,
        marked: NDArray[np.bool_],
        done: Collection[int] = (),
    ) -> Lease:
        token = self.book.next_token
        state = np.zeros(len(rows.rows), np.int8)
        if done:
            state[np.isin(rows.rows, np.fromiter(done, np.int64))] = DONE
        deadline = now + duration_s
        lease = Lease(token, client, partition.name, task, duration_s, deadline, rows, handed_out, marked, state)
        self.book.add(lease)
        account = partition.account(task)
        account.leases["granted"] += int(lease.open.sum())
        again = self._rows.table.task(task).again
        if again:
            repeated = again.intersection(rows.rows[lease.open].tolist())
            again -= repeated
            account.redelivered += len(repeated)
            self.book.redelivered[task] += len(repeated)
        return lease

    # ------------------------------------------------------------ settling

    def ack(self, token: int, rows: Int64s, generations: Int64s) -> tuple[int, Partition | None]:
        """Consume rows of a lease; returns how many this call consumed, and where more may be served now."""
        if self.book.ended.get(token) == _ACKNOWLEDGED:
            return 0, None
        lease = self.book.get(token)
        chosen = self._chosen(lease, rows, generations, DONE)
        partition = self._rows.partitions[lease.partition]
        count = self._settle(lease, chosen, DONE, "acked")
        settled = lease.rows.rows[chosen[lease.marked[chosen]]]
        column = self._rows.table.task(lease.task)
        for row in settled.tolist() if column.returns else ():
            column.returns.pop(row, None)
        stirs = False
        if lease.assignment is None:
            column.consumed[settled] = 1
            column.reserved[settled] = False
        else:
            lease.assignment.acked.update(settled.tolist())
        if not lease.open.any():
            whole = bool((lease.state[: lease.handed_out] == DONE).all())
            self.book.end(lease, _ACKNOWLEDGED if whole else "acknowledged in part, the rest was given back")
            if lease.assignment is not None:
                stirs = self._finish_slice(partition, lease, lease.assignment)
        return count, partition if stirs or partition.sealed else None

    def ack_each(self, request: AckMany, stir: Callable[[str], object]) -> tuple[str, ...]:
        """Do that for each part; returns why it was refused, or "". `stir`: more may be served in this partition."""
        sizes = request.sizes
        if len(sizes) != len(request.lease_tokens) or not len(sizes):
            raise InvalidArgument(f"{len(request.lease_tokens)} leases do not have {len(sizes)} sizes")
        if (sizes < 0).any() or not len(request.indexes) == len(request.generations) == sizes.sum():
            raise InvalidArgument(f"parts of {sizes.tolist()} samples are not {len(request.indexes)} samples")
        ends = np.cumsum(sizes)[:-1]
        rows, generations = np.split(request.indexes, ends), np.split(request.generations, ends)
        refused = []
        for token, *part in zip(request.lease_tokens.tolist(), rows, generations, strict=True):
            try:
                _, more = self.ack(token, *part)
            except TransferQueueError as error:
                refused.append(str(error))
                continue
            refused.append("")
            if more is not None:
                stir(more.name)
        return tuple(refused)

    def _finish_slice(self, partition: Partition, lease: Lease, assignment: Assignment) -> bool:
        assignment.leased.pop(lease.rank, None)
        assignment.done.add(lease.rank)
        stirs = False
        if not assignment.missing:
            stirs = self._reserving.complete(partition, lease.task, assignment)
            self._assignments.forget_finished(partition.name, lease.task, assignment)
        return stirs

    def release(self, token: int, rows: Int64s, generations: Int64s) -> tuple[int, Partition, Int64s]:
        """Give rows of a lease back; returns their number, their partition, and what is to be quarantined."""
        lease = self.book.get(token)
        chosen = self._chosen(lease, rows, generations, OPEN)
        if lease.assignment is not None:  # a rank works on its slice as a whole
            chosen = np.flatnonzero(lease.open)
        partition = self._rows.partitions[lease.partition]
        back = self._give_back(partition, lease, chosen, "released")
        if not lease.open.any():
            self.book.end(lease, "released")
        return len(chosen), partition, back

    def end(self, lease: Lease, how: str) -> tuple[Partition, Int64s]:
        """The lease is over without a word from its holder; returns its partition and what is to be quarantined."""
        partition = self._rows.partitions[lease.partition]
        back = self._give_back(partition, lease, np.flatnonzero(lease.open), "expired")
        self.book.end(lease, how)
        return partition, back

    def withdraw(self, token: int) -> None:
        """The answer that granted this lease never arrived: it was never granted."""
        lease = self.book.open.get(token)
        if lease is None:
            return
        partition = self._rows.partitions[lease.partition]
        partition.account(lease.task).leases["granted"] -= int(lease.open.sum())
        chosen = np.flatnonzero(lease.open)
        if lease.assignment is None:
            self._reserving.unreserve(partition, lease.task, self._alive(lease, chosen[lease.marked[chosen]]))
        else:
            lease.assignment.leased.pop(lease.rank, None)
            self._reserving.break_slices(partition, lease.task, lease.assignment)
        self.book.end(lease, "withdrawn")

    def renew(self, token: int, duration_s: float | None, now: float) -> float:
        """The lease ends so long from now; returns how long."""
        lease = self.book.get(token)
        if duration_s is not None:
            lease.duration_s = checked_duration(duration_s)
        lease.deadline = now + lease.duration_s
        self.book.note_deadline(lease)
        return lease.duration_s

    def resume(self, now: float) -> None:
        """Nobody could renew while there was no controller: every lease lasts from now for as long as was granted."""
        for lease in self.book.open.values():
            lease.deadline = now + lease.duration_s
            self.book.note_deadline(lease)

    def check_writer(self, put: Put) -> None:
        """Raise `LeaseExpired` for a put under a lease that is over, or of rows that it gave back."""
        token, rows = put.lease_token, put.indexes
        if token is None or self.book.ended.get(token) == _ACKNOWLEDGED:
            return
        lease = self.book.get(token)
        if rows is None:
            return
        positions = lease.positions(rows)
        lost = rows[(positions >= 0) & np.isin(lease.state[positions], (RETURNED, GONE))]
        if len(lost):
            raise LeaseExpired(f"samples {lost[:10].tolist()} of lease {token} were given back: draw them again")

    # ------------------------------------------------------------ rows that go

    def forget_rows(self, partition: Partition, gone: Callable[[Handle], NDArray[np.bool_]]) -> None:
        """Rows of the partition were removed; `gone` says which rows of a handle are."""
        for lease in self.book.of_partition(partition.name):
            lost = np.flatnonzero(lease.open & gone(lease.rows))
            if len(lost):
                self._settle(lease, lost, GONE, "removed")
                if not lease.open[: lease.handed_out].any():
                    self._end_without_rows(partition, lease)

    def _end_without_rows(self, partition: Partition, lease: Lease) -> None:
        """The last rows that were open are gone; a rank that acknowledged the others is done with its slice."""
        rest = np.flatnonzero(lease.open)
        if len(rest):
            self._give_back(partition, lease, rest, "released")
        self.book.end(lease, "its samples were cleared")
        if lease.assignment is not None:
            lease.assignment.leased.pop(lease.rank, None)
            if (lease.state == DONE).any():
                self._finish_slice(partition, lease, lease.assignment)

    def forget(self, partition: str, task: str | None, how: str) -> None:
        """Leases of a partition (and task) are void; their rows are settled by the caller."""
        for lease in self.book.of_partition(partition, task):
            account = self._rows.partitions[partition].account(lease.task)
            account.leases["released"] += int(lease.open.sum())
            if lease.assignment is not None:
                lease.assignment.leased.pop(lease.rank, None)
            self.book.end(lease, how)

    # ------------------------------------------------------------ inside

    def _chosen(self, lease: Lease, rows: Int64s, generations: Int64s, last: int) -> Int64s:
        """Positions of these rows, all of which are in the lease and in a state up to `last`."""
        self._rows.table.check_fresh(rows, generations)
        found = lease.positions(rows)
        if len(found) and found.min() < 0:
            foreign = rows[found < 0]
            raise InvalidArgument(f"samples {foreign[:10].tolist()} are not part of lease {lease.token}")
        meant = np.zeros(len(lease.state), np.bool_)
        meant[found] = True
        positions = np.flatnonzero(meant)
        states = lease.state[positions]
        lost = lease.rows.rows[positions[states > last]]
        if len(lost):
            raise LeaseExpired(f"samples {lost[:10].tolist()} of lease {lease.token} are settled already: draw again")
        chosen: Int64s = positions[states == OPEN]
        rest_open = lease.open
        rest_open[chosen] = False
        if not rest_open[: lease.handed_out].any():  # what was held beside them shares the fate of the last ones
            chosen = np.concatenate([chosen, np.flatnonzero(rest_open)])
        return chosen

    def _settle(self, lease: Lease, chosen: Int64s, state: int, counter: str) -> int:
        lease.state[chosen] = state
        self._rows.partitions[lease.partition].account(lease.task).leases[counter] += len(chosen)
        return int((chosen < lease.handed_out).sum())

    def _give_back(self, partition: Partition, lease: Lease, chosen: Int64s, counter: str) -> Int64s:
        """Return the rows that were given back too often."""
        self._settle(lease, chosen, RETURNED, counter)
        rows = self._alive(lease, chosen[lease.marked[chosen]])
        column = self._rows.table.task(lease.task)
        for row in rows.tolist():
            column.returns.setdefault(row, []).append(shown(lease.client))
        if counter == "expired":
            column.again.update(rows.tolist())
        if lease.assignment is None:
            self._reserving.unreserve(partition, lease.task, rows)
        else:
            lease.assignment.leased.pop(lease.rank, None)
            self._assignments.offer_again(partition.name, lease.task, lease.assignment, lease.rank)
            self._reserving.break_slices(partition, lease.task, lease.assignment)
        if self.max_deliveries is None:
            return rows[:0]
        return np.array([row for row in rows.tolist() if len(column.returns[row]) >= self.max_deliveries], np.int64)

    def _alive(self, lease: Lease, positions: Int64s) -> Int64s:
        return self._rows.table.alive(Handle(lease.rows.rows[positions], lease.rows.generations[positions]))


def checked_duration(duration_s: float) -> float:
    """A lease lasts for a finite time above zero."""
    if isinstance(duration_s, bool) or not isinstance(duration_s, int | float):
        raise WrongType(f"a lease is a number of seconds, not {duration_s!r}")
    if not 0 < duration_s < math.inf:
        raise InvalidArgument(f"a lease lasts a finite number of seconds above 0, not {duration_s}")
    return float(duration_s)
