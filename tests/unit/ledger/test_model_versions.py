"""The version window against a model, over every interleaving of puts, draws, leases and raises."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.ledger.driver import Driver, ints
from transfer_queue.errors import GetMetaTimeout, LeaseExpired, StaleSampleError
from transfer_queue.messages import Drawn

TASKS = st.sampled_from(["a", "b"])


FIELDS = st.sampled_from([("x",), ("x", "y")])


SECONDS = st.sampled_from([None, 5.0])


class VersionMachine(RuleBasedStateMachine):
    """Puts, raises and grants in any order: no grant lies outside its window, nothing too old is kept for nobody."""

    @initialize(bound=st.integers(0, 2))
    def begin(self, bound: int) -> None:
        self.bound = bound
        self.queue = Driver(max_staleness=bound, num_n_samples=2)
        self.current = 0
        self.versions: dict[tuple[int, int], int] = {}
        self.leases: list[Drawn] = []
        self.bare: set[tuple[int, int]] = set()  # rows without a version
        self.checked: set[int] = set()
        self.groups = 0

    def grant(self, drawn: Drawn | None) -> None:
        """Check what was handed out against the version of now; the slice that a rank has already is not a grant."""
        if drawn is None or "replayed" in drawn.extra_info:
            return
        for row in ids_of(drawn):
            version = self.versions.get(row, -1)
            assert version < 0 or version >= self.current - self.bound, (row, version, self.current)
        if drawn.lease_token is not None:
            self.leases.append(drawn)

    def woken(self) -> None:
        for ticket, answer in self.queue.answers.items():
            if ticket not in self.checked and isinstance(answer, Drawn):
                self.grant(answer)
            self.checked.add(ticket)

    @rule(lags=st.lists(st.integers(-1, 4), min_size=1, max_size=4), grouped=st.booleans(), whole=st.booleans())
    def put(self, lags: list[int], grouped: bool, whole: bool) -> None:
        """Rows without a version (-1), of the next version (0) or older."""
        versions = [-1 if lag < 0 else max(self.current + 1 - lag, 0) for lag in lags]
        self.groups += grouped
        ids = [self.groups] * len(lags) if grouped else None
        fields = ("x", "y") if whole else ("x",)
        done = self.queue.put(len(lags), fields, version=versions, group_ids=ids, group_size=len(lags))
        for row, version in zip(ids_of(done), versions, strict=True):
            self.versions[row] = version
            self.bare |= {row} if version < 0 else set()
        self.woken()

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def add(self, data: st.DataObject) -> None:
        """Another field, and a version for a row that has none."""
        row = data.draw(st.sampled_from(self.live()))
        version = data.draw(st.integers(0, self.current + 1)) if row in self.bare else -1
        if row in self.bare:
            self.bare.discard(row)
            self.versions[row] = version
        self.queue.put(1, ("y",), indexes=ints(row[0]), generations=ints(row[1]), version=version)
        self.woken()

    @rule(by=st.integers(0, 2))
    def advance(self, by: int) -> None:
        self.current += by
        self.queue.raise_version(self.current)
        self.woken()

    @rule(task=TASKS, count=st.integers(1, 3), fields=FIELDS, seconds=SECONDS, wait=st.booleans(), whole=st.booleans())
    def draw(
        self, task: str, count: int, fields: tuple[str, ...], seconds: float | None, wait: bool, whole: bool
    ) -> None:
        options: dict[str, Any] = {"lease_s": seconds, "timeout_s": 8.0 if wait else 0.0}
        if whole:
            count, options["get_n_samples"] = 2, True
        with contextlib.suppress(GetMetaTimeout):
            self.grant(self.queue.draw(count, fields, task, **options))
        self.woken()

    @rule(task=TASKS, rank=st.integers(0, 1), group=st.sampled_from([None, 0, 1, 2]), seconds=SECONDS)
    def draw_slice(self, task: str, rank: int, group: int | None, seconds: float | None) -> None:
        with contextlib.suppress(GetMetaTimeout, StaleSampleError):
            self.grant(self.queue.rank(rank, 2, 1, group=group, task=task, lease_s=seconds, timeout_s=0.0))
        self.woken()

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), acknowledge=st.booleans())
    def settle(self, data: st.DataObject, acknowledge: bool) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        self.leases.remove(lease)
        with contextlib.suppress(LeaseExpired, StaleSampleError):
            self.queue.ack(lease) if acknowledge else self.queue.release(lease)
        self.woken()

    @rule(seconds=st.sampled_from([1.0, 6.0]))
    def later(self, seconds: float) -> None:
        self.queue.later(seconds)
        self.woken()

    @rule(what=st.sampled_from(["reset", "cancel", "clear", "restart"]), task=TASKS)
    def disturb(self, what: str, task: str) -> None:
        if what == "reset":
            self.queue.reset(task)
        elif what == "cancel":
            self.queue.cancel()
        elif what == "clear":
            self.queue.clear_rows(*(row for row, _ in self.live()[:2]))
        else:
            self.queue.restart()
        self.woken()

    @invariant()
    def only_what_is_held_or_used_is_too_old(self) -> None:
        state = self.queue.ledger.state()["rows"]
        table = state["table"]
        beyond = (table["version"] >= 0) & (table["version"] < self.current - self.bound)
        tasks = {task["name"]: task for task in table["tasks"]}
        known = [tasks.get(account[0]) for part in state["partitions"] for account in part["accounts"]]
        held = np.zeros(len(beyond), np.bool_)
        used = np.full(len(beyond), bool(known))
        for task in known:
            held |= False if task is None else task["reserved"]
            used &= False if task is None else task["consumed"] == 1
        assert not (beyond & ~held & ~used).any()

    @invariant()
    def accounts_balance(self) -> None:
        for found in self.queue.ledger.reports.audit()["partitions"].values():
            assert all(task["balanced"] for task in found["tasks"].values()), found
            assert sum(found["stale"]["by_producer"].values()) == found["dropped"].get("stale", 0)

    def live(self) -> list[tuple[int, int]]:
        return ids_of(self.queue.locate(partition_id="p", fields=()))


def ids_of(reply: Any) -> list[tuple[int, int]]:
    """(global index, generation) of the rows of a reply."""
    return list(zip(reply.indexes.tolist(), reply.generations.tolist(), strict=True))


VersionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


TestVersions = VersionMachine.TestCase
