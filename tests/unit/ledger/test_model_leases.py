"""Leases, time and restarts against a model: who holds what, who consumed it, what comes again, what is counted.

The driver has every change made again from its record in a second ledger, and compares the whole states. Data-parallel
ranks draw with leases too, for a task that is not modelled: its accounts have to balance, and its replay to be equal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.ledger.driver import Driver, ints, rows
from transfer_queue.errors import GetMetaTimeout, LeaseExpired, StaleSampleError
from transfer_queue.messages import Ack, Drawn, Release, Renew

Id = tuple[int, int]  # global index and generation
TASKS = st.sampled_from(["a", "b"])
CLIENTS = st.sampled_from(["c/1", "c/2", "d/1"])
SECONDS = st.sampled_from([None, 5.0, 5.0, 20.0])


@dataclass
class Held:
    """One lease of the model."""

    token: int
    task: str
    client: str
    rows: list[Id]
    seconds: float
    deadline: float
    open: list[Id] = field(default_factory=list)
    acked: set[Id] = field(default_factory=set)


@dataclass
class Task:
    """One task of the model."""

    consumed: set[Id] = field(default_factory=set)
    gone: int = 0  # consumed, and cleared since
    returns: Counter[Id] = field(default_factory=Counter)
    again: set[Id] = field(default_factory=set)
    redelivered: int = 0
    counts: Counter[str] = field(default_factory=Counter)


class LeaseMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.live: list[Id] = []
        self.tasks: dict[str, Task] = {}
        self.leases: dict[int, Held] = {}
        self.inserted = 0

    @initialize(most=st.sampled_from([None, 2]))
    def begin(self, most: int | None) -> None:
        self.most = most
        self.queue = Driver(max_deliveries=most)

    # ------------------------------------------------------------ rows come and go

    @rule(count=st.integers(1, 6))
    def insert(self, count: int) -> None:
        done = self.queue.put(count)
        self.live += list(zip(done.indexes.tolist(), done.generations.tolist(), strict=True))
        self.inserted += count

    @precondition(lambda self: self.live)
    @rule(data=st.data(), drop=st.booleans())
    def remove(self, data: st.DataObject, drop: bool) -> None:
        chosen = self.some(data, self.live)
        handle = Handle(chosen)
        if drop:
            self.queue.drop(handle)
        else:
            self.queue.clear(handle)
        self.forget(chosen)

    # ------------------------------------------------------------ draws

    @rule(task=TASKS, count=st.integers(1, 4), client=CLIENTS, seconds=SECONDS)
    def draw(self, task: str, count: int, client: str, seconds: float | None) -> None:
        ready = self.ready(task)

        def ask() -> Drawn:
            drawn = self.queue.draw(count, task=task, client=client, timeout_s=0.0, lease_s=seconds)
            assert drawn is not None
            return drawn

        if len(ready) < count:
            with pytest.raises(GetMetaTimeout):
                ask()
            return
        drawn = ask()
        chosen = ready[:count]
        assert rows(drawn) == [index for index, _ in chosen]
        known = self.task(task)
        if seconds is None:
            known.consumed.update(chosen)
            return
        assert drawn.lease_token is not None
        expected = [1 + known.returns[row] for row in chosen]
        assert drawn.extra_info.get("deliveries", [1] * count) == expected
        lease = Held(drawn.lease_token, task, client, chosen, seconds, self.queue.now + seconds, list(chosen))
        self.leases[lease.token] = lease
        known.counts["granted"] += count
        known.redelivered += len(known.again.intersection(chosen))
        known.again.difference_update(chosen)

    @rule(rank=st.integers(0, 1), group=st.sampled_from([None, "g", "h"]), seconds=SECONDS, client=CLIENTS)
    def draw_rank(self, rank: int, group: str | None, seconds: float | None, client: str) -> None:
        """Not modelled: it may be refused, and what it did is replayed. Its rows must not be quarantined meanwhile."""
        seconds = None if self.most else seconds
        try:
            drawn = self.queue.rank(rank, 2, 1, group=group, task="dp", lease_s=seconds, client=client, timeout_s=0.0)
        except (GetMetaTimeout, StaleSampleError):
            return
        assert drawn is not None
        if drawn.lease_token is not None and drawn.generations[0] % 2 == 0:
            self.queue.ack(drawn)

    # ------------------------------------------------------------ the life of a lease

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        lease = self.some_lease(data)
        chosen = self.some(data, lease.rows)
        request = Ack(lease_token=lease.token, **Handle(chosen).arrays())
        if self.refused(lease, chosen, lambda: self.queue.after(self.queue.ledger.ack, request, self.queue.now), "ack"):
            return
        new = [row for row in chosen if row in lease.open]
        if any(row not in lease.open and row not in lease.acked for row in chosen):
            with pytest.raises(LeaseExpired):
                self.queue.after(self.queue.ledger.ack, request, self.queue.now)
            return
        assert self.queue.after(self.queue.ledger.ack, request, self.queue.now) == len(new)
        known = self.task(lease.task)
        known.consumed.update(new)
        known.counts["acked"] += len(new)
        lease.acked.update(new)
        for row in new:
            known.returns.pop(row, None)
        self.settle(lease, new)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = self.some_lease(data)
        chosen = self.some(data, lease.rows)
        request = Release(lease_token=lease.token, **Handle(chosen).arrays())
        if self.refused(lease, chosen, lambda: self.queue.after(self.queue.ledger.release, request, self.queue.now)):
            return
        if any(row not in lease.open for row in chosen):
            with pytest.raises(LeaseExpired):
                self.queue.after(self.queue.ledger.release, request, self.queue.now)
            return
        assert self.queue.after(self.queue.ledger.release, request, self.queue.now) == len(chosen)
        self.give_back(lease, chosen, "released")

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), seconds=SECONDS)
    def renew(self, data: st.DataObject, seconds: float | None) -> None:
        lease = self.some_lease(data)
        request = Renew(lease_token=lease.token, lease_s=seconds)
        if self.refused(lease, [], lambda: self.queue.after(self.queue.ledger.renew, request, self.queue.now)):
            return
        lease.seconds = lease.seconds if seconds is None else seconds
        assert self.queue.after(self.queue.ledger.renew, request, self.queue.now) == lease.seconds
        lease.deadline = self.queue.now + lease.seconds

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def write_under_a_lease(self, data: st.DataObject) -> None:
        lease = self.some_lease(data)
        chosen = self.some(data, lease.rows)
        options = {"fields": ("y",), "lease_token": lease.token}
        if self.refused(lease, chosen, lambda: self.queue.put(to=Handle(chosen), **options), "write"):
            return
        if any(row not in lease.open and row not in lease.acked for row in chosen):
            with pytest.raises(LeaseExpired):
                self.queue.put(to=Handle(chosen), **options)
        else:
            self.queue.put(to=Handle(chosen), **options)

    @rule(seconds=st.sampled_from([1.0, 4.0, 6.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.queue.later(seconds)
        late = [lease for lease in self.leases.values() if lease.open and lease.deadline <= self.queue.now]
        for lease in sorted(late, key=lambda lease: lease.deadline):
            self.give_back(lease, list(lease.open), "expired")

    @rule(client=CLIENTS)
    def client_is_gone(self, client: str) -> None:
        self.queue.gone(client)
        for lease in [lease for lease in self.leases.values() if lease.client == client and lease.open]:
            self.give_back(lease, list(lease.open), "expired")

    @rule(task=TASKS)
    def reset(self, task: str) -> None:
        self.queue.reset(task)
        if task in self.tasks:
            known = self.tasks[task]
            for lease in [lease for lease in self.leases.values() if lease.task == task]:
                known.counts["released"] += len(lease.open)
                lease.open = []
            known.consumed.clear()
            known.returns.clear()
            known.again.clear()

    @rule()
    def the_controller_is_started_again(self) -> None:
        """Leases last from now on for as long as they were granted for."""
        self.queue.restart()
        self.queue.after(self.queue.ledger.resume, self.queue.now)
        for lease in self.leases.values():
            if lease.open:
                lease.deadline = self.queue.now + lease.seconds

    # ------------------------------------------------------------ after each step

    @invariant()
    def accounts_balance_and_equal_the_model(self) -> None:
        if not self.inserted:
            return
        partition = self.queue.ledger.reports.audit()["partitions"]["p"]
        assert (partition["inserted"], partition["live"]) == (self.inserted, len(self.live))
        for name, account in partition["tasks"].items():
            assert account["balanced"], account
            if name == "dp":
                continue
            known = self.task(name)
            held = sum(len(lease.open) for lease in self.leases.values() if lease.task == name)
            assert account["reserved"] == held
            assert account["consumed"] == len(known.consumed) + known.gone
            if known.counts["granted"]:
                settled = {how: count for how, count in account["leases"].items() if how != "open" and count}
                assert settled == {how: count for how, count in known.counts.items() if count}
                assert account["redelivered"] == known.redelivered

    # ------------------------------------------------------------ inside

    def task(self, name: str) -> Task:
        return self.tasks.setdefault(name, Task())

    def ready(self, name: str) -> list[Id]:
        held = {row for lease in self.leases.values() if lease.task == name for row in lease.open}
        return [row for row in self.live if row not in self.task(name).consumed and row not in held]

    def some(self, data: st.DataObject, among: list[Id]) -> list[Id]:
        picks = data.draw(st.lists(st.integers(0, len(among) - 1), min_size=1, max_size=4, unique=True))
        return [among[pick] for pick in picks]

    def some_lease(self, data: st.DataObject) -> Held:
        return self.leases[data.draw(st.sampled_from(sorted(self.leases)))]

    def refused(self, lease: Held, chosen: list[Id], call: Callable[[], Any], kind: str = "") -> bool:
        """Whether the lease is over, or rows of it are gone: then the call raises, and all is as before."""
        gone = any(row not in self.live for row in chosen)
        if len(lease.acked) == len(lease.rows) and kind == "ack":
            assert call() == 0
            return True
        if len(lease.acked) == len(lease.rows) and kind == "write" and not gone:
            return False
        if lease.open and not gone:
            return False
        before = self.queue.snapshot()
        with pytest.raises((LeaseExpired, StaleSampleError)):
            call()
        assert self.queue.snapshot() == before
        return True

    def give_back(self, lease: Held, chosen: list[Id], how: str) -> None:
        known = self.task(lease.task)
        known.counts[how] += len(chosen)
        known.returns.update(chosen)
        if how == "expired":
            known.again.update(chosen)
        self.settle(lease, chosen)
        if self.most is not None:
            self.forget([row for row in chosen if known.returns[row] >= self.most])

    def settle(self, lease: Held, chosen: list[Id]) -> None:
        lease.open = [row for row in lease.open if row not in chosen]

    def forget(self, gone: list[Id]) -> None:
        self.live = [row for row in self.live if row not in gone]
        for known in self.tasks.values():
            known.gone += len(known.consumed.intersection(gone))
            known.consumed.difference_update(gone)
            known.again.difference_update(gone)
            for row in gone:
                known.returns.pop(row, None)
        for lease in self.leases.values():
            lost = [row for row in lease.open if row in gone]
            if lost:
                self.task(lease.task).counts["removed"] += len(lost)
                lease.open = [row for row in lease.open if row not in gone]


class Handle:
    """Rows as a reply names them."""

    def __init__(self, chosen: list[Id]) -> None:
        self.indexes = ints(*(index for index, _ in chosen))
        self.generations = ints(*(generation for _, generation in chosen))

    def arrays(self) -> dict[str, Any]:
        return {"indexes": self.indexes, "generations": self.generations}


LeaseMachine.TestCase.settings = settings(max_examples=210, stateful_step_count=50, deadline=None)
test_leases_do_what_the_model_does = pytest.mark.timeout(300)(LeaseMachine.TestCase)  # 10 500 steps
