"""The ledger against a model: random inserts, writes, draws, ranks, cancels, clears, seals, aborts and resets.

After each step the accounting identity holds and equals the model's, no row has two owners, slots do not overlap, and
blocks are free when nothing points to them, once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.ledger.driver import Driver, ints, rows
from tests.unit.ledger.model import GROUP, STEPS, WINDOW, Full, Id, Model, Refused, Row, Stale, Taken, Wish
from transfer_queue.errors import CapacityExceeded, InvalidArgument, StaleSampleError, UnknownName
from transfer_queue.messages import Drawn, PutDone

NAMED = ["p", "q"]
PARTITIONS = st.sampled_from(["p", "p", "p", "q", "step_0", "step_1", "step_2"])
TASKS = st.sampled_from(["a", "b"])
FIELDS = st.sampled_from([("x",), ("y",), ("x", "y")])
CONTENT = st.sampled_from([("x", "y"), ("x", "y"), ("x",), ()])
GROUPS = st.sampled_from(["g1", "g2", "g3", "g4"])
ERRORS: dict[type[Exception], type[Exception]] = {
    Stale: StaleSampleError,
    Refused: InvalidArgument,
    Full: CapacityExceeded,
}


class LedgerMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = Driver(global_batch_size=WINDOW // GROUP, num_n_samples=GROUP, num_global_batch=STEPS)
        self.model = Model()
        self.row: dict[Id, Row] = {}
        self.owners: Counter[tuple[str, Id]] = Counter()
        self.parked_puts: dict[int, tuple[str, int, tuple[str, ...], int]] = {}
        self.parked_draws: dict[int, Wish] = {}
        self.taken: dict[int, Taken] = {}

    # ------------------------------------------------------------ producing

    @rule(data=st.data())
    def insert_some(self, data: st.DataObject) -> None:
        """Several at once: rows have to be many for all the other rules to bite."""
        for _ in range(data.draw(st.integers(1, 3))):
            groups = data.draw(st.one_of(st.just([]), st.lists(GROUPS, min_size=1, max_size=4)))
            self.insert(data.draw(PARTITIONS), data.draw(st.integers(1, 6)), data.draw(CONTENT), groups)

    def insert(self, name: str, count: int, fields: tuple[str, ...], groups: list[str]) -> None:
        ids = groups if groups and name in NAMED else None
        count = len(ids) if ids else count
        options = {"partition_id": name, "group_ids": ids, "timeout_s": 1e9}
        try:
            fits = self.model.room(name, count)
            self.model.check_groups(name, ids or [])
        except (Stale, Refused, Full) as error:
            self.expect(error, lambda: self.queue.put(count, fields, **options))
            return
        done = self.queue.put(count, fields, **options)
        block = self.queue.latest_block
        if fits:
            self.inserted(name, done, fields, block, ids)
        else:
            assert done is None
            self.parked_puts[self.queue.ticket] = (name, count, fields, block)
        self.settle()

    def inserted(
        self, name: str, done: Any, fields: tuple[str, ...], block: int, groups: list[str] | None = None
    ) -> None:
        ids = list(zip(rows(done), done.generations.tolist(), strict=True))
        assert not {index for index, _ in ids} & {row.id[0] for row in self.model.live()}
        assert rows(done) == list(range(ids[0][0], ids[0][0] + len(ids)))
        made = self.model.insert(name, ids, groups)
        assert not self.row.keys() & set(ids)
        self.row |= {row.id: row for row in made}
        self.model.write(made, fields, block)

    @precondition(lambda self: self.model.live())
    @rule(data=st.data(), fields=FIELDS)
    def write(self, data: st.DataObject, fields: tuple[str, ...]) -> None:
        chosen = self.some_rows(data)
        self.queue.put(len(chosen), fields, **handle(chosen))
        self.model.write(chosen, fields, self.queue.latest_block)
        self.settle()

    @precondition(lambda self: any(not row.alive for row in self.row.values()))
    @rule(data=st.data())
    def use_an_old_handle(self, data: st.DataObject) -> None:
        dead = data.draw(st.sampled_from([row for row in self.row.values() if not row.alive]))
        live = self.model.live()[:1]
        options = handle([*live, dead])
        self.expect(Stale(), lambda: self.queue.put(len(live) + 1, ["x"], **options))
        reply = PutDone(partition_id="", **options)
        assert self.queue.clear(PutDone(partition_id="", **handle([dead]))) == 0
        self.expect(Stale(), lambda: self.queue.set_tags(reply, *[{}] * (len(live) + 1)))

    # ------------------------------------------------------------ consuming

    @rule(name=PARTITIONS, task=TASKS, fields=FIELDS, count=st.integers(1, 4))
    def draw(self, name: str, task: str, fields: tuple[str, ...], count: int) -> None:
        self.ask(Wish(name, task, fields, count))

    @rule(name=PARTITIONS, task=TASKS, fields=FIELDS, groups=st.integers(1, 2))
    def draw_groups(self, name: str, task: str, fields: tuple[str, ...], groups: int) -> None:
        self.ask(Wish(name, task, fields, groups * GROUP, groups=True))

    @rule(
        name=PARTITIONS,
        task=TASKS,
        fields=FIELDS,
        count=st.sampled_from([1, 1, 1, 2]),
        rank=st.integers(0, 1),
        batch=st.integers(0, 2),
    )
    def draw_rank(self, name: str, task: str, fields: tuple[str, ...], count: int, rank: int, batch: int) -> None:
        self.ask(Wish(name, task, fields, count, rank=rank, batch=batch))

    def ask(self, wish: Wish) -> None:
        params = {} if wish.rank is None else {"dp_rank": wish.rank, "dp_size": 2, "dp_group_id": wish.batch}
        options = {"partition_id": wish.partition, "get_n_samples": wish.groups, "timeout_s": 1e9}
        call = lambda: self.queue.draw(wish.count, wish.fields, wish.task, sampler_params=params, **options)  # noqa: E731
        try:
            expected = self.model.attempt(wish)
        except (Stale, Refused) as error:
            self.queue.ledger.serving.meet(wish.partition, wish.task, self.queue.now)  # that it asked stays known
            self.expect(error, call)
            return
        drawn = call()
        if expected is None:
            assert drawn is None
            self.parked_draws[self.queue.ticket] = wish
        else:
            self.answered(self.queue.ticket, wish, expected, drawn)
        self.settle()

    def answered(self, ticket: int, wish: Wish, expected: tuple[list[list[Row]], bool], drawn: Any) -> None:
        assert isinstance(drawn, Drawn)
        got = [self.row[id] for id in zip(rows(drawn), drawn.generations.tolist(), strict=True)]
        blocks, free = expected
        if free:
            left = list(got)
            for _ in range(wish.count // GROUP):
                block = next(block for block in blocks if block[0] is left[0])
                assert left[: len(block)] == block
                left = left[len(block) :]
            assert not left
        else:
            assert [got] == blocks
        for place in drawn.locations:
            for name in place.fields:
                cells = list(zip(place.blocks.tolist(), place.slots.tolist(), strict=True))
                assert cells == [row.cells[name] for row in got]
        self.taken[ticket], replayed = self.model.take(wish, got)
        assert drawn.extra_info.get("replayed", False) == replayed
        if not replayed:
            self.owners.update((wish.task, row.id) for row in got)

    @precondition(lambda self: self.queue.ticket)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket = data.draw(st.integers(1, self.queue.ticket))
        parked = self.parked_puts.pop(ticket, None) or self.parked_draws.pop(ticket, None)
        taken = self.taken.pop(ticket, None)
        if taken is not None:
            given = taken.rows
            rank, batch = taken.wish.rank, taken.batch
            if batch is not None and rank is not None and batch.deliveries[rank] == 1:
                given = batch.part(rank)
            self.owners.subtract((taken.wish.task, row.id) for row in given)
            self.model.undo(taken)
        assert self.queue.cancel(ticket) == (parked is not None or taken is not None)
        self.settle()

    @rule(name=PARTITIONS, task=st.one_of(st.none(), TASKS))
    def reset(self, name: str, task: str | None) -> None:
        self.queue.reset(task, name)
        self.model.reset(name, task)
        self.forget(name, task)
        self.settle()

    # ------------------------------------------------------------ removing

    @precondition(lambda self: self.model.live())
    @rule(data=st.data())
    def clear_rows(self, data: st.DataObject) -> None:
        chosen = self.some_rows(data)
        assert self.queue.clear(PutDone(partition_id="", **handle(chosen))) == len(chosen)
        for name, part in self.model.partitions.items():
            own = [row for row in chosen if row in part.rows]
            if own:
                self.model.remove(name, own)
        self.settle()

    @rule(name=PARTITIONS, often=st.integers(0, 2))
    def clear_partition(self, name: str, often: int) -> None:
        if often:
            return  # rarely, so that partitions grow old
        part = self.model.partitions.get(name)
        assert self.queue.clear(name) == (len(part.rows) if part else 0)
        if part:
            self.model.remove(name, list(part.rows))
            del self.model.partitions[name]
            self.forget(name, None)
        self.settle()

    @rule(name=st.sampled_from(NAMED), group=GROUPS, seal=st.booleans())
    def end_group(self, name: str, group: str, seal: bool) -> None:
        call = self.queue.seal if seal else self.queue.abort
        part = self.model.partitions.get(name)
        known = part.groups.get(group) if part else None
        if part is None or known is None:
            error = StaleSampleError if part else UnknownName
            self.unchanged(error, lambda: call(group, name))
            return
        call(group, name)
        if seal:
            known.sealed, known.expected = True, len(known.rows)
        else:
            part.aborted.add(group)
            self.model.remove(name, list(known.rows))
        self.settle()

    def forget(self, name: str, task: str | None) -> None:
        """What was drawn from the partition can be drawn again, and not be undone any more."""
        for ticket, taken in list(self.taken.items()):
            if taken.wish.partition == name and task in (None, taken.wish.task):
                del self.taken[ticket]
        ours = {row.id for row in self.model.partitions[name].rows} if name in self.model.partitions else set()
        for owner, id in list(self.owners):
            if id in ours and task in (None, owner):
                del self.owners[owner, id]

    # ------------------------------------------------------------ wrong calls

    @rule(name=PARTITIONS, case=st.sampled_from(["zero", "rank", "groups", "rows", "keys"]))
    def call_wrongly(self, name: str, case: str) -> None:
        calls: dict[str, Any] = {
            "zero": lambda: self.queue.draw(0, partition_id=name),
            "rank": lambda: self.queue.rank(2, 2, 1, group="g", partition_id=name),
            "groups": lambda: self.queue.draw(3, partition_id=name, get_n_samples=True),
            "rows": lambda: self.queue.put(0, partition_id=name),
            "keys": lambda: self.queue.put(2, partition_id=name, keys=["k", "k"]),
        }
        self.unchanged(InvalidArgument, calls[case])

    def expect(self, error: Exception, call: Any) -> None:
        self.unchanged(ERRORS[type(error)], call)

    def unchanged(self, error: type[Exception], call: Any) -> None:
        before = self.queue.snapshot()
        with pytest.raises(error):
            call()
        assert self.queue.snapshot() == before

    # ------------------------------------------------------------ what became possible

    def settle(self) -> None:
        """Serve the parked requests of the model in their order and compare with the answers of the ledger."""
        for ticket, (name, count, fields, block) in list(self.parked_puts.items()):
            try:
                if not self.model.room(name, count):
                    continue
            except Full as refusal:
                self.refused(ticket, refusal)
            else:
                self.inserted(name, self.queue.answers.pop(ticket), fields, block)
            del self.parked_puts[ticket]
        while self.serve_parked():
            pass
        assert not self.queue.answers, "the ledger served whom the model did not"

    def refused(self, ticket: int, refusal: Exception) -> None:
        assert isinstance(self.queue.answers.pop(ticket), ERRORS[type(refusal)])

    def serve_parked(self) -> bool:
        """One round in order of arrival; returns whether any draw was answered, as others may be answered then."""
        waiting = list(self.parked_draws.items())
        for ticket, wish in waiting:
            try:
                expected = self.model.attempt(wish)
            except (Stale, Refused) as refusal:
                self.refused(ticket, refusal)
            else:
                if expected is None:
                    continue
                self.answered(ticket, wish, expected, self.queue.answers.pop(ticket))
            del self.parked_draws[ticket]
        return len(self.parked_draws) < len(waiting)

    # ------------------------------------------------------------ after each step

    @invariant()
    def accounts_balance_and_equal_the_model(self) -> None:
        audit = self.queue.ledger.reports.audit()
        assert list(audit["partitions"]) == list(self.model.partitions)
        assert audit["waiting"] == len(self.parked_puts) + len(self.parked_draws)
        for name, found in audit["partitions"].items():
            part = self.model.partitions[name]
            assert (found["inserted"], found["live"], found["groups"]) == (
                part.inserted,
                len(part.rows),
                len(part.groups),
            )
            for task_name, account in found["tasks"].items():
                task = part.task(task_name)
                assert account["balanced"]
                assert account["reserved"] == len(task.reserved)
                assert account["consumed"] == len(task.consumed) + task.consumed_and_cleared
                assert account["pending"] == len(part.rows) - len(task.reserved) - len(task.consumed)

    @invariant()
    def status_equals_the_model(self) -> None:
        for name, part in self.model.partitions.items():
            for task in ("a", "b"):
                status = self.queue.status(task, ["x", "y"], name)
                assert status.indexes.tolist() == [row.id[0] for row in part.rows]
                assert sorted(status.fields) == ["x", "y"]  # as they came to the partition
                produced = [int(field in row.cells) for row in part.rows for field in status.fields]
                assert status.production.tolist() == produced
                assert status.consumption is not None
                consumed = [int(row in part.task(task).consumed) for row in part.rows]
                assert status.consumption.tolist() == consumed

    @invariant()
    def no_row_has_two_owners_and_no_slot_two_rows(self) -> None:
        assert all(count in (0, 1) for count in self.owners.values())
        indexes = [row.id[0] for row in self.model.live()]
        assert len(indexes) == len(set(indexes))

    @invariant()
    def blocks_are_free_once_and_when_nothing_points_to_them(self) -> None:
        used = self.model.blocks_in_use()
        assert len(self.queue.ledger.blocks) == len(used)
        assert sorted(self.queue.freed) == sorted(self.model.blocks - used)
        told = [cell for cell in self.queue.freed_slots if cell[0] in used]
        assert sorted(told) == sorted(cell for cell in self.model.dead_cells if cell[0] in used)

    # ------------------------------------------------------------ inside

    def some_rows(self, data: st.DataObject) -> list[Row]:
        live = self.model.live()
        picks = data.draw(st.lists(st.integers(0, len(live) - 1), min_size=1, max_size=6, unique=True))
        return [live[pick] for pick in picks]


def handle(chosen: list[Row]) -> dict[str, Any]:
    return {
        "indexes": ints(*(row.id[0] for row in chosen)),
        "generations": ints(*(row.id[1] for row in chosen)),
    }


LedgerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
test_the_ledger_does_what_the_model_does = LedgerMachine.TestCase
