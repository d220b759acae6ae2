"""The whole state of a ledger as plain values: dicts, lists, numbers, text and NumPy arrays that nobody else changes.

What dumps takes O(rows) memory copies and no more, because the queue stands still meanwhile; what loads replaces all
that was there. Ready sets and who waits are not part of it: the former are made again at the first draw, the latter
ask again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.extents import Extents
from transfer_queue.ledger.assignments import REMEMBERED, Assignment, Assignments, Turns
from transfer_queue.ledger.blocks import BlockBook, Orders
from transfer_queue.ledger.drawing import DrawRecord
from transfer_queue.ledger.groups import Group
from transfer_queue.ledger.leases import Lease, LeaseBook
from transfer_queue.ledger.partition import FieldState, Partition, TaskAccount
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.selection import Split
from transfer_queue.ledger.table import Column, Handle, RowTable, TaskColumn
from transfer_queue.messages import ColumnSpec, FreeBlocks

Int64s: TypeAlias = NDArray[np.int64]
State: TypeAlias = dict[str, Any]


# ---------------------------------------------------------------- rows


def dump_table(table: RowTable) -> State:
    tasks = [
        {
            "name": name,
            "consumed": task.consumed.copy(),
            "reserved": task.reserved.copy(),
            "returns": [(row, list(clients)) for row, clients in task.returns.items()],
            "again": _members(task.again),
        }
        for name, task in sorted(table.tasks.items())
        if not task.blank  # a task that only asked so far is known to the accounts of its partitions
    ]
    return {
        "capacity": table.capacity,
        "generation": table.generation.copy(),
        "partition": table.partition.copy(),
        "ordinal": table.ordinal.copy(),
        "group": table.group.copy(),
        "version": table.version.copy(),
        "writer": table.writer.copy(),
        "columns": [
            (name, column.number, column.ready.copy(), column.block.copy(), column.slot.copy())
            for name, column in table.columns.items()
        ],
        "tasks": tasks,
        "keys": (_array(table.keys), list(table.keys.values())),
        "tags": (_array(table.tags), [dict(tag) for tag in table.tags.values()]),
    }


def load_table(table: RowTable, state: State) -> None:
    table.capacity = state["capacity"]
    table.generation = _own(state["generation"])
    table.partition = _own(state["partition"])
    table.ordinal = _own(state["ordinal"])
    table.group = _own(state["group"])
    table.version, table.writer = _own(state["version"]), _own(state["writer"])
    table.columns = {
        name: Column(number, _own(ready), _own(block), _own(slot))
        for name, number, ready, block, slot in state["columns"]
    }
    table.tasks = {
        task["name"]: TaskColumn(
            _own(task["consumed"]),
            _own(task["reserved"]),
            {row: list(clients) for row, clients in task["returns"]},
            set(task["again"].tolist()),
        )
        for task in state["tasks"]
    }
    table.keys = dict(zip(state["keys"][0].tolist(), state["keys"][1], strict=True))
    table.tags = dict(zip(state["tags"][0].tolist(), state["tags"][1], strict=True))


def dump_rows(rows: Rows) -> State:
    free = rows.slots.ranges()
    return {
        "table": dump_table(rows.table),
        "blocks": dump_blocks(rows.blocks),
        "partitions": [dump_partition(partition) for partition in rows.partitions.values()],
        "windows": [(window.step, window.used, window.live) for window in rows.windows],
        "slots": rows.slots.size,
        "free": (_array(start for start, _ in free), _array(length for _, length in free)),
        "next_number": rows.next_number,
        "beyond": np.empty(0, np.int64),  # generations of slots that lived elsewhere, behind those of the table
    }


def load_rows(rows: Rows, state: State) -> None:
    load_table(rows.table, state["table"])
    load_blocks(rows.blocks, state["blocks"])
    for window, (step, used, live) in zip(rows.windows, state["windows"], strict=True):
        window.step, window.used, window.live = step, used, live
    rows.slots = Extents()
    rows.slots.load(state["slots"], list(zip(*(each.tolist() for each in state["free"]), strict=True)))
    rows.next_number = state["next_number"]
    rows.table.grow_by(state["beyond"])
    rows.partitions.clear()
    rows.by_number.clear()
    for described in state["partitions"]:
        partition = load_partition(described, rows.table)
        rows.partitions[partition.name] = rows.by_number[partition.number] = partition
    rows.feed.begin_again()


# ---------------------------------------------------------------- partitions


def dump_partition(partition: Partition) -> State:
    groups = partition.groups
    return {
        "name": partition.name,
        "number": partition.number,
        "step": partition.step,
        "base": partition.base,
        "indexes": partition.indexes[: partition.length].copy(),
        "inserted": partition.inserted,
        "sealed": partition.sealed,
        "expected": partition.expected,
        "groups": [(one.group_id, one.number, one.expected, one.ordinals, one.sealed) for one in groups.values()],
        "aborted_groups": list(groups.aborted),
        "next_group": groups.next_number,
        "holes": groups.holes,
        "fields": [
            (_dump_spec(known.spec), known.rows, known.produced_at, known.produced_by)
            for known in partition.fields.values()
        ],
        "accounts": [
            (task, known.consumed_and_cleared, dict(known.dropped), dict(known.leases), known.redelivered)
            for task, known in partition.accounts.items()
        ],
        "dropped": dict(partition.dropped),
        "lost": [(name, _members(rows)) for name, rows in partition.lost.items()],
        "quarantined": [dict(one) for one in partition.quarantined],
        "stale": [(by, list(counts.items())) for by, counts in partition.stale.items()],
    }


def load_partition(state: State, table: RowTable) -> Partition:
    partition = Partition(state["name"], state["number"], table, state["step"])
    partition.base = state["base"]
    partition.indexes = _own(state["indexes"])
    partition.length = len(partition.indexes)
    partition.live = int((partition.indexes >= 0).sum())
    partition.inserted, partition.sealed, partition.expected = state["inserted"], state["sealed"], state["expected"]
    rows = partition.rows().tolist() if table.keys else ()
    partition.keys = {table.keys[row]: row for row in rows if row in table.keys}
    groups = [Group(known, number, size, _own(rows), sealed) for known, number, size, rows, sealed in state["groups"]]
    partition.groups.load(groups, state["aborted_groups"], state["next_group"], state["holes"])
    for spec, count, produced_at, produced_by in state["fields"]:
        partition.fields[spec[0]] = FieldState(_load_spec(spec), count, produced_at, produced_by)
    for task, cleared, dropped, leases, redelivered in state["accounts"]:
        partition.accounts[task] = TaskAccount(cleared, Counter(dropped), Counter(leases), redelivered)
    partition.dropped = Counter(state["dropped"])
    partition.lost = {name: set(rows.tolist()) for name, rows in state["lost"]}
    partition.quarantined = list(state["quarantined"])
    partition.stale = {by: Counter(dict(counts)) for by, counts in state["stale"]}
    return partition


def _dump_spec(spec: ColumnSpec) -> list[Any]:
    return [spec.name, spec.layout, spec.dtype, None if spec.shape is None else list(spec.shape)]


def _load_spec(spec: list[Any]) -> ColumnSpec:
    name, layout, dtype, shape = spec
    return ColumnSpec(name=name, layout=layout, dtype=dtype, shape=None if shape is None else tuple(shape))


# ---------------------------------------------------------------- blocks


def dump_blocks(blocks: BlockBook) -> State:
    known = list(blocks.put.values())
    return {
        "blocks": _array(blocks.cells),
        "cells": _array(blocks.cells.values()),
        "rows": _array(rows for rows, _ in known),
        "put": _array(cells for _, cells in known),
        "refused": blocks.refused.dump(),
        "orders": [
            (
                unit,
                orders.sequence,
                [(one.sequence, one.blocks, one.partial_blocks, one.partial_slots) for one in orders.unconfirmed],
            )
            for unit, orders in blocks.orders.items()
        ],
    }


def load_blocks(blocks: BlockBook, state: State) -> None:
    names = state["blocks"].tolist()
    blocks.cells = dict(zip(names, state["cells"].tolist(), strict=True))
    blocks.put = dict(zip(names, zip(state["rows"].tolist(), state["put"].tolist(), strict=True), strict=True))
    blocks.refused.load(state["refused"])
    blocks.orders = {}
    for unit, sequence, unconfirmed in state["orders"]:
        waiting = deque(
            FreeBlocks(sequence=number, blocks=whole, partial_blocks=partial, partial_slots=slots)
            for number, whole, partial, slots in unconfirmed
        )
        blocks.orders[unit] = Orders(sequence, waiting)


# ---------------------------------------------------------------- data-parallel draws, leases


class Numbered:
    """Assignments are referred to from several places: each is kept once, and named by its number."""

    def __init__(self) -> None:
        self.all: list[Assignment] = []
        self._numbers: dict[int, int] = {}

    def number(self, assignment: Assignment | None) -> int:
        if assignment is None:
            return -1
        if id(assignment) not in self._numbers:
            self._numbers[id(assignment)] = len(self.all)
            self.all.append(assignment)
        return self._numbers[id(assignment)]


def dump_assignments(assignments: Assignments, numbered: Numbered) -> State:
    return {
        "book": [
            (partition, task, numbered.number(assignment))
            for (partition, task), book in sorted(assignments.by_task.items(), key=lambda entry: entry[0])
            for assignment in book.values()
        ],
        "turns": [(*key, turns.count, _members(turns.returned)) for key, turns in assignments.turns.items()],
        "cleared": [(task, list(known)) for task, known in sorted(assignments.cleared.items(), key=lambda one: one[0])],
    }


def load_assignments(assignments: Assignments, state: State, known: list[Assignment]) -> None:
    assignments.by_task.clear()
    assignments.turns.clear()
    assignments.cleared.clear()
    for partition, task, number in state["book"]:
        made = known[number]
        assignments.by_task.setdefault((partition, task), {})[made.key] = made
    for partition, task, rank, count, returned in state["turns"]:
        assignments.turns[partition, task, rank] = Turns(count, set(returned.tolist()))
    for task, cleared in state["cleared"]:
        names = ((partition, _key(key)) for partition, key in cleared)
        assignments.cleared[task] = deque(names, maxlen=REMEMBERED)


def dump_assignment(made: Assignment) -> State:
    return {
        "key": made.key,
        "dp_size": made.dp_size,
        "terms": dict(made.terms),
        "chosen": tuple(made.chosen),
        "bounds": list(made.bounds),
        "consumed": made.consumed,
        "held": tuple(made.held),
        "deliveries": list(made.deliveries.items()),
        "ranks": [_members(made.broken), _members(made.done), _members(made.acked)],
        "tokens": [list(made.leased.items()), list(made.tokens.items())],
    }


def load_assignment(state: State) -> Assignment:
    broken, done, acked = (set(ranks.tolist()) for ranks in state["ranks"])
    leased, tokens = (dict(pairs) for pairs in state["tokens"])
    return Assignment(
        _key(state["key"]),
        state["dp_size"],
        state["terms"],
        Handle(*state["chosen"]),
        state["bounds"],
        state["consumed"],
        Handle(*state["held"]),
        Counter(dict(state["deliveries"])),
        broken,
        done,
        leased,
        tokens,
        acked,
    )


def _key(key: Any) -> Any:
    kind, group, number = key
    return kind, group, number


def dump_leases(book: LeaseBook, numbered: Numbered) -> State:
    return {
        "open": [
            (
                (lease.token, lease.client, lease.partition, lease.task, lease.duration_s, lease.deadline),
                tuple(lease.rows),
                lease.handed_out,
                lease.marked,
                lease.state.copy(),
                numbered.number(lease.assignment),
                lease.rank,
            )
            for lease in book.open.values()
        ],
        "ended": list(book.ended.items()),
        "next_token": book.next_token,
    }


def load_leases(book: LeaseBook, state: State, known: list[Assignment]) -> None:
    book.open.clear()
    for head, rows, handed_out, marked, settled, number, rank in state["open"]:
        assignment = None if number < 0 else known[number]
        token, client, partition, task, duration_s, deadline = head
        grant = (token, client, partition, task, duration_s, deadline, Handle(*rows), handed_out, marked)
        book.add(Lease(*grant, _own(settled), assignment, rank))
    book.ended = OrderedDict((token, how) for token, how in state["ended"])
    book.next_token = state["next_token"]


def dump_draws(undoable: OrderedDict[Any, DrawRecord], numbered: Numbered) -> list[Any]:
    return [
        (
            ticket,
            record.partition,
            record.task,
            tuple(record.consumed),
            None if record.split is None else (*_split_fields(record.split),),
            numbered.number(record.assignment),
            record.stirs,
            record.lease_token,
        )
        for ticket, record in undoable.items()
    ]


def load_draws(state: list[Any], known: list[Assignment]) -> OrderedDict[Any, DrawRecord]:
    return OrderedDict(
        (
            ticket,
            DrawRecord(
                partition,
                task,
                Handle(*consumed),
                None if split is None else Split(*split),
                None if number < 0 else known[number],
                stirs,
                token,
            ),
        )
        for ticket, partition, task, consumed, split, number, stirs, token in state
    )


def _split_fields(split: Split) -> tuple[Any, ...]:
    return split.rank, split.size, split.group, split.batch_index


# ---------------------------------------------------------------- arrays


def _array(values: Any) -> Int64s:
    return np.fromiter(values, dtype=np.int64)


def _members(values: set[int]) -> Int64s:
    """Equal sets give equal arrays: the order of a set depends on how it came about."""
    return _array(sorted(values))


def _own(array: NDArray[Any]) -> NDArray[Any]:
    """An array that can be written to: what was read is read-only."""
    return array.copy()
