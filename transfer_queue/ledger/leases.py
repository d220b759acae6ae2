"""Leases: who holds which rows until when."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import LeaseExpired
from transfer_queue.ledger.assignments import Assignment
from transfer_queue.ledger.table import Handle

Int64s: TypeAlias = NDArray[np.int64]

OPEN, DONE, RETURNED, GONE = 0, 1, 2, 3  # what a holder may still do something with comes first

REMEMBERED = 4096
"""How many ended leases are remembered, so that a late holder is told how its lease ended."""


@dataclass(eq=False)
class Lease:
    """One draw, or one rank's slice of one, that its holder has to acknowledge before the deadline.

    `rows` are those handed out, followed by those that the sampler marks consumed with them without handing them out;
    `marked` are the ones that are held and will be consumed.
    """

    token: int
    client: str
    partition: str
    task: str
    duration_s: float
    deadline: float
    rows: Handle
    handed_out: int
    marked: NDArray[np.bool_]
    state: NDArray[np.int8]  # [n] OPEN, DONE, RETURNED or GONE
    assignment: Assignment | None = None
    rank: int = 0

    @property
    def open(self) -> NDArray[np.bool_]:
        """[n] bool: still held."""
        still: NDArray[np.bool_] = self.state == OPEN
        return still

    def positions(self, indexes: Int64s) -> Int64s:
        """Where these rows are in the lease, -1 for rows that it never had."""
        own = self.rows.rows[: self.handed_out]
        if len(own) == len(indexes) and (own == indexes).all():  # all of them, as most are acknowledged
            return np.arange(len(own))
        order = np.argsort(own, kind="stable")
        at = np.searchsorted(own, indexes, sorter=order).clip(max=len(own) - 1)
        found = order[at]
        return np.where(own[found] == indexes, found, -1)

    @property
    def held(self) -> int:
        """How many of the rows that were handed out are open."""
        return int(self.open[: self.handed_out].sum())

    def __repr__(self) -> str:
        return f"<Lease {self.token} of {self.client!r}: {int(self.open.sum())} of {self.handed_out} rows open>"


class LeaseBook:
    """All leases that are open, and how the last ones ended."""

    def __init__(self) -> None:
        self.open: dict[int, Lease] = {}
        self.ended: OrderedDict[int, str] = OrderedDict()
        self.next_token = 1
        self.ended_by: Counter[str] = Counter()  # leases that ended since this book was made, by how
        self.redelivered: Counter[str] = Counter()  # rows handed out again after a lease had run out, by task
        self._deadlines: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self.open)

    def add(self, lease: Lease) -> None:
        self.open[lease.token] = lease
        self.next_token = max(self.next_token, lease.token + 1)
        self.note_deadline(lease)

    def note_deadline(self, lease: Lease) -> None:
        """The deadline of the lease was set anew."""
        heapq.heappush(self._deadlines, (lease.deadline, lease.token))

    def end(self, lease: Lease, how: str) -> None:
        self.open.pop(lease.token, None)
        self.ended[lease.token] = how
        self.ended_by[how] += 1
        if len(self.ended) > REMEMBERED:
            self.ended.popitem(last=False)

    def get(self, token: int) -> Lease:
        """The open lease of this token; raises `LeaseExpired` for one that ended in any way."""
        lease = self.open.get(token)
        if lease is None:
            how = self.ended.get(token, "unknown to this queue: it ended long ago, or belongs to another one")
            raise LeaseExpired(f"lease {token} is over ({how}); its samples are not yours any more: draw again")
        return lease

    def of_client(self, client: str) -> list[Lease]:
        return [lease for lease in self.open.values() if lease.client == client]

    def of_partition(self, partition: str, task: str | None = None) -> list[Lease]:
        return [one for one in self.open.values() if one.partition == partition and task in (None, one.task)]

    def clients(self) -> set[str]:
        """Who holds any."""
        return {lease.client for lease in self.open.values()}

    def next_deadline(self) -> float | None:
        """When the first lease ends; entries of leases that ended or were renewed are dropped on the way."""
        while self._deadlines:
            deadline, token = self._deadlines[0]
            lease = self.open.get(token)
            if lease is not None and lease.deadline == deadline:
                return deadline
            heapq.heappop(self._deadlines)
        return None

    def overdue(self, now: float) -> list[Lease]:
        """The open leases whose deadline has come, the earliest first."""
        late: dict[int, Lease] = {}  # a deadline that was set twice is noted twice
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            token = heapq.heappop(self._deadlines)[1]
            late[token] = self.open[token]
        return list(late.values())


def shown(client: str) -> str:
    """The name that the user gave; what follows the last slash tells lives of one client apart."""
    return client.rpartition("/")[0] or client
