"""Limits and waiting puts against a model."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.ledger.claims import claim
from transfer_queue.ledger.limits import Limit, Limits
from transfer_queue.ledger.usage import Usage

PARTITIONS = ("train", "val")


PRODUCERS = ("rollout-0", "rollout-1")


class Machine(RuleBasedStateMachine):
    """Random puts, additions, overwrites and clears, beside a model that counts rows and cells one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.usage = Usage(Limits(total_bytes=1 << 40))
        self.rows: dict[int, tuple[str, str]] = {}  # slot: (partition, producer)
        self.cells: dict[tuple[int, str], int] = {}  # (slot, field): block
        self.blocks: dict[int, tuple[str, int, Counter[str]]] = {}  # block: (producer, bytes, cells by partition)

    def write(self, rows: list[int], fields: list[str], producer: str, size_bytes: int) -> None:
        block = len(self.blocks) + 1
        for partition in PARTITIONS:
            mine = [row for row in rows if self.rows[row][0] == partition]
            again = [self.cells[row, name] for row in mine for name in fields if (row, name) in self.cells]
            self.usage.free(partition, np.array(again, np.int64))
        for row in rows:
            self.cells.update({(row, name): block for name in fields})
        counts = Counter(self.rows[row][0] for row in rows for _ in fields)
        self.blocks[block] = (producer, size_bytes, counts)
        self.usage.commit(block, producer, size_bytes, counts)

    @rule(
        count=st.integers(1, 5),
        partition=st.sampled_from(PARTITIONS),
        producer=st.sampled_from(PRODUCERS),
        fields=st.integers(1, 3),
        size_bytes=st.integers(0, 100),
    )
    def put(self, count: int, partition: str, producer: str, fields: int, size_bytes: int) -> None:
        rows = [slot for slot in range(64) if slot not in self.rows][:count]
        if rows:
            self.rows.update(dict.fromkeys(rows, (partition, producer)))
            self.usage.insert(partition, producer, np.array(rows))
            self.write(rows, ["a", "b", "c"][:fields], producer, size_bytes)

    @precondition(lambda self: self.rows)
    @rule(data=st.data(), producer=st.sampled_from(PRODUCERS), size_bytes=st.integers(0, 100))
    def add(self, data: st.DataObject, producer: str, size_bytes: int) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.rows)), min_size=1, max_size=8, unique=True))
        fields = data.draw(st.lists(st.sampled_from(["b", "c", "d"]), min_size=1, unique=True))
        self.write(rows, fields, producer, size_bytes)

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def clear(self, data: st.DataObject) -> None:
        partition = data.draw(st.sampled_from(sorted({name for name, _ in self.rows.values()})))
        of_partition = sorted(row for row in self.rows if self.rows[row][0] == partition)
        rows = data.draw(st.lists(st.sampled_from(of_partition), min_size=1, unique=True))
        gone = [cell for cell in self.cells if cell[0] in rows]
        self.usage.remove(partition, np.array(rows))
        self.usage.free(partition, np.array([self.cells.pop(cell) for cell in gone], np.int64))
        for row in rows:
            del self.rows[row]

    @rule()
    def reload(self) -> None:
        kept = Usage(self.usage.limits)
        self.usage.admit(claim(3, 30), 0.0, "c")
        kept.load(self.usage.state())
        self.usage = kept

    @invariant()
    def counts_are_those_of_the_model(self) -> None:
        expected: Counter[Limit] = Counter()
        for partition, producer in self.rows.values():
            expected.update(dict(claim(1, 0, partition, producer).amounts()))
        left = Counter((block, self.rows[row][0]) for (row, _), block in self.cells.items())
        for (block, partition), cells in left.items():
            producer, size_bytes, at_first = self.blocks[block]
            exact = Fraction(size_bytes * cells, at_first.total())
            for limit, _ in claim(0, 1, partition, producer).amounts():
                expected[limit] += exact  # type: ignore[assignment]  # rounded per block and partition
        parts = len(left)
        for limit in {*expected, *self.usage._held}:
            apart = abs(self.usage.held(limit) - expected[limit])
            assert apart <= (2 * parts if limit.unit == "bytes" else 0), limit
        if not self.cells:
            assert all(limit.unit == "samples" for limit in self.usage._held)


TestAgainstModel = Machine.TestCase


TestAgainstModel.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
