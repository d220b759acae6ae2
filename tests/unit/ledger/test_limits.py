"""What counts against limits, what has to wait and in which order."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.unit.ledger.driver import UNIT, Driver, put_request, rows
from transfer_queue.errors import CapacityExceeded, InvalidArgument, WrongType
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.admissions import ADMITTED_S
from transfer_queue.ledger.limits import Claim, Limit, Limits
from transfer_queue.ledger.usage import Usage
from transfer_queue.messages import Admit, Clear

PARTITIONS = ("train", "val")
PRODUCERS = ("rollout-0", "rollout-1")


def claim(samples: int, size_bytes: int = 0, partition: str = "train", producer: str = "rollout-0") -> Claim:
    return Claim(partition, producer, samples, size_bytes)


def fill(usage: Usage, what: Claim, first_row: int = 0, block: int = 1) -> None:
    """Insert the rows of a claim, with one field."""
    usage.insert(what.partition, what.producer, np.arange(first_row, first_row + what.samples))
    if what.size_bytes:
        usage.commit(block, what.producer, what.size_bytes, {what.partition: what.samples})


def total(usage: Usage, unit: str) -> int:
    return usage.held(Limit("total", "", unit))


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_limits_are_positive_whole_numbers(value: Any) -> None:
    """Anything else is refused, naming the key."""
    with pytest.raises((InvalidArgument, WrongType), match=r"limits\.partition_bytes"):
        Limits(partition_bytes=value)


def test_no_limits() -> None:
    """Without limits there is nothing to wait for, whatever is held."""
    usage = Usage(Limits())
    fill(usage, claim(1000, 1 << 40))
    assert not Limits() and not Limits().bounds_bytes
    assert (
        Limits(total_samples=1) and not Limits(total_samples=1).bounds_bytes and Limits(producer_bytes=1).bounds_bytes
    )
    usage.check(claim(10, 1 << 50))
    assert usage.obstacle(claim(10, 1 << 50)) is None


@pytest.mark.parametrize("scope", ["total", "partition", "producer"])
@pytest.mark.parametrize("unit", ["bytes", "samples"])
def test_each_limit_bounds_what_its_holder_has(scope: str, unit: str) -> None:
    """A put waits if it does not fit under the limit of its own partition, producer or the total, and says why."""
    usage = Usage(Limits(**{f"{scope}_{unit}": 100}))
    fill(usage, claim(60, 60))
    assert usage.obstacle(claim(40, 40)) is None
    text = usage.obstacle(claim(41, 41))
    assert text is not None and f"limits.{scope}_{unit}" in text
    assert "100, of which 60 are held, and 41 are needed: 1 too many" in text
    assert "partition 'train' holds 60" in text and "client 'rollout-0' holds 60" in text
    elsewhere = usage.obstacle(claim(41, 41, "val", "rollout-1"))
    assert (elsewhere is None) == (scope != "total")


def test_a_put_that_can_never_fit_is_refused() -> None:
    """It names the limit, what is needed and what is allowed; one that adds to rows that exist is never refused."""
    usage = Usage(Limits(total_samples=10, producer_bytes=1000))
    with pytest.raises(
        CapacityExceeded, match=r"11 samples exceeds the capacity: limits.total_samples is 10"
    ) as caught:
        usage.check(claim(11, 1))
    assert caught.value.details == {"limit": "total_samples", "needed": 11, "allowed": 10}
    with pytest.raises(CapacityExceeded, match=r"1001 bytes .* limits.producer_bytes is 1000, 1 less"):
        usage.check(claim(1, 1001))
    usage.check(claim(0, 5000))
    assert usage.obstacle(claim(0, 5000)) is None


def test_the_error_at_the_deadline_says_by_how_much_and_who_holds_it() -> None:
    """The message for people, the details for programs; holders with most first."""
    usage = Usage(Limits(total_bytes=100))
    fill(usage, claim(1, 20), 0, 1)
    fill(usage, claim(1, 70, "val", "rollout-1"), 1, 2)
    error = usage.too_late(claim(2, 30), 1.5)
    assert "no capacity for 2 samples (30 bytes) in partition 'train' after 1.5 s: limits.total_bytes is 100" in str(
        error
    )
    assert "20 too many (partition 'val' holds 70, partition 'train' holds 20" in str(error)
    assert error.details["excess"] == 20
    assert error.details["partitions"] == {"val": 70, "train": 20}
    assert list(error.details["producers"]) == ["rollout-1", "rollout-0"]


# ---------------------------------------------------------------- order


def test_first_come_first_served_per_limit() -> None:
    """A small put does not overtake a large one that waits for the same limit; one that needs others passes."""
    usage = Usage(Limits(partition_samples=10, total_samples=1000))
    fill(usage, claim(8))
    large, small, other = claim(5), claim(1), claim(1, partition="val")
    assert usage.obstacle(large) is not None
    usage.wait(large)
    assert usage.obstacle(small) == "earlier puts wait for limits.partition_samples of 'train'"
    assert "earlier puts wait" in str(usage.too_late(small, 1.0))
    assert usage.obstacle(other) is None
    usage.remove("train", np.arange(8))
    usage.next_round()
    assert usage.obstacle(large) is None
    fill(usage, large)
    assert usage.obstacle(small) is None


# ---------------------------------------------------------------- admissions


def test_room_is_kept_for_a_put_that_was_admitted() -> None:
    """It counts until the put comes, which is then let in whatever else waits; nothing is counted twice."""
    usage = Usage(Limits(total_bytes=100))
    number = usage.admit(claim(2, 80), 0.0, "c")
    assert total(usage, "bytes") == 80 and usage.obstacle(claim(1, 30)) is not None
    assert usage.use(number, claim(2, 80))
    assert total(usage, "bytes") == total(usage, "samples") == 0
    assert not usage.use(number, claim(2, 80))


@pytest.mark.parametrize("other", [claim(3, 80), claim(2, 81), claim(2, 80, "val"), claim(2, 80, producer="rollout-1")])
def test_an_admission_covers_what_it_was_asked_for(other: Claim) -> None:
    """A larger put, or one of another partition or producer, is treated as if it had none."""
    usage = Usage(Limits(total_bytes=100))
    assert not usage.use(usage.admit(claim(2, 80), 0.0, "c"), other)
    assert total(usage, "bytes") == 0


def test_admissions_end() -> None:
    """By withdrawal, or a minute after they were granted."""
    usage = Usage(Limits(total_bytes=100))
    assert usage.admissions.next_expiry() is None
    first, second = usage.admit(claim(1, 10), 5.0, "c"), usage.admit(claim(1, 10), 6.0, "c")
    assert usage.admissions.next_expiry() == 5.0 + ADMITTED_S
    assert not usage.expire(4.9 + ADMITTED_S)
    assert usage.expire(5.0 + ADMITTED_S)
    assert not usage.use(first, claim(1, 10))
    usage.withdraw(second)
    usage.withdraw(second)
    assert total(usage, "bytes") == 0 and usage.admissions.next_expiry() is None


# ---------------------------------------------------------------- in the ledger


def size(count: int) -> int:
    return 100 * count


def put(queue: Driver, count: int, **options: Any) -> Any:
    """Rows of 100 bytes."""
    return queue.put(count, size_bytes=size(count), **{"timeout_s": 60.0} | options)


def admit(queue: Driver, count: int, **options: Any) -> Any:
    body = {"partition_id": "p", "global_step": None, "timeout_s": 60.0} | options
    request = Admit(num_rows=count, size_bytes=size(count), **body)
    return queue.after(queue.ledger.admit, request, queue._next(), "writer", queue.now)


def test_a_put_waits_until_rows_are_cleared() -> None:
    """It is carried out by the clear that makes room, whole."""
    queue = Driver(limits=Limits(total_bytes=size(10)))
    first, second = put(queue, 6), put(queue, 4)
    assert put(queue, 5) is None
    waiting = queue.ticket
    queue.clear(second)
    assert waiting not in queue.answers
    queue.clear_rows(0)
    assert rows(queue.answers[waiting])
    assert len(queue.locate().indexes) == 10
    assert rows(first)[0] == 0


def test_a_put_that_waited_in_vain_says_why() -> None:
    """At its deadline; and those behind it are tried again at once."""
    queue = Driver(limits=Limits(partition_samples=10))
    put(queue, 8, client="rollout-3")
    with pytest.raises(CapacityExceeded, match="no capacity for 3 samples"):
        put(queue, 3, timeout_s=0.0)
    assert put(queue, 5, timeout_s=2.0) is None
    large = queue.ticket
    assert put(queue, 1) is None
    small = queue.ticket
    assert rows(put(queue, 10, partition_id="q"))
    queue.later(2.0)
    assert "after 2.0 s: limits.partition_samples of 'p' is 10, of which 8 are held, and 5 are needed" in str(
        queue.answers[large]
    )
    assert "client 'rollout-3' holds 8" in str(queue.answers[large])
    assert rows(queue.answers[small])


def test_a_put_that_is_withdrawn_lets_those_behind_it_pass() -> None:
    """The line goes on."""
    queue = Driver(limits=Limits(total_samples=10))
    put(queue, 8)
    assert put(queue, 5) is None
    large = queue.ticket
    assert put(queue, 1) is None
    small = queue.ticket
    assert queue.cancel(large)
    assert rows(queue.answers[small])


def test_hopeless_puts_are_refused_and_change_nothing() -> None:
    """Whatever the timeout; so are requests to admit them."""
    queue = Driver(limits=Limits(partition_bytes=size(10)))
    put(queue, 1)
    before = queue.snapshot()
    for call in (put, admit):
        with pytest.raises(CapacityExceeded, match=r"1100 bytes exceeds the capacity: limits.partition_bytes is 1000"):
            call(queue, 11)
    assert queue.snapshot() == before


def test_fields_of_rows_that_exist_are_always_admitted() -> None:
    """A full queue is completed, drawn and emptied; what is added counts."""
    queue = Driver(limits=Limits(total_bytes=size(4)))
    full = put(queue, 4, keys=["a", "b", "c", "d"])
    assert put(queue, 4, fields=["y"], to=full) is not None
    assert put(queue, 2, fields=["z"], keys=["b", "c"]) is not None
    assert put(queue, 2, keys=["d", "new"]) is None
    waiting = queue.ticket
    assert rows(queue.draw(4, ["x", "y"])) == rows(full)
    queue.clear()
    assert len(rows(queue.answers[waiting])) == 2


def test_what_is_written_anew_gives_its_bytes_back() -> None:
    """The old block counts until its last cell is written elsewhere."""
    queue = Driver(limits=Limits(total_bytes=size(8)))
    first = put(queue, 4)
    assert put(queue, 4, to=first) is not None
    assert put(queue, 4) is not None
    assert put(queue, 1) is None


def test_dropped_and_quarantined_rows_do_not_count() -> None:
    """Whatever takes rows out makes room."""
    queue = Driver(limits=Limits(total_samples=4), max_deliveries=1)
    first = put(queue, 4)
    assert put(queue, 1) is None
    queue.drop(queue.locate(indexes=first.indexes[:1], generations=first.generations[:1], partition_id=None))
    assert len(rows(queue.answers[2])) == 1
    assert put(queue, 1) is None
    ticket = queue.ticket
    leased = queue.lease(1)
    assert leased is not None
    queue.release(leased)
    assert len(rows(queue.answers[ticket])) == 1


def test_large_puts_are_admitted_before_they_are_written() -> None:
    """The room is kept for the put that comes with the admission, which waits for nobody."""
    queue = Driver(limits=Limits(total_bytes=size(10)))
    assert queue.ledger.gate.admit_from_bytes == 1 << 16
    granted = admit(queue, 6)
    assert admit(queue, 6) is None
    waiting = queue.ticket
    assert put(queue, 5) is None
    assert len(rows(put(queue, 6, admission=granted.admission))) == 6
    queue.clear()
    second: Any = queue.answers[waiting]
    assert second.admission != granted.admission
    assert waiting + 1 not in queue.answers
    queue.ledger.gate.withdraw(second.admission)
    queue.wake()
    assert len(rows(queue.answers[waiting + 1])) == 5


def test_the_admissions_of_a_client_that_is_gone_end() -> None:
    """Their room goes to who waits at once; another life of a client of the same name keeps its own."""
    usage = Usage(Limits(total_bytes=100))
    mine = [usage.admit(claim(1, 20), 0.0, "rollout/a1") for _ in range(2)]
    other = usage.admit(claim(1, 30), 0.0, "rollout/b2")
    assert usage.admissions.clients() == {"rollout/a1", "rollout/b2"}
    usage.next_round()
    usage.leave("rollout/a1")
    assert usage.room_made and total(usage, "bytes") == 30
    assert usage.admissions.clients() == {"rollout/b2"}
    assert [usage.use(number, claim(1, 20)) for number in mine] == [False, False]
    assert usage.use(other, claim(1, 30))


def test_an_admission_that_is_not_used_ends() -> None:
    """After a minute its room goes to who waits."""
    queue = Driver(limits=Limits(total_bytes=size(10)))
    admit(queue, 6)
    assert put(queue, 6, timeout_s=600.0) is None
    assert queue.ledger.next_deadline() == queue.now + ADMITTED_S
    queue.later(ADMITTED_S)
    assert len(rows(queue.answers[queue.ticket])) == 6


def test_without_limits_everything_is_admitted() -> None:
    """And nobody needs to ask; an admission that is not known does no harm."""
    queue = Driver()
    assert queue.ledger.gate.admit_from_bytes is None
    assert admit(queue, 10**6).admission == 0
    assert len(rows(put(queue, 5, admission=17))) == 5


def test_a_draw_that_waits_for_rows_that_wait_is_told_so() -> None:
    """More is asked for than the limit lets in."""
    queue = Driver(limits=Limits(partition_samples=4))
    put(queue, 4)
    assert put(queue, 4) is None
    assert queue.draw(8, timeout_s=1.0) is None
    queue.later(1.0)
    text = str(queue.answers[queue.ticket])
    assert "4 of 8 samples ready" in text
    assert "1 puts into it wait until samples are cleared (no capacity for 4 samples" in text
    assert "limits.partition_samples of 'p' is 4" in text


def test_usage_outlives_a_restart() -> None:
    """A ledger made from the state of another one, or from its records, keeps who holds what."""
    queue = Driver(limits=Limits(total_bytes=size(10), producer_samples=8))
    put(queue, 6, client="a")
    admit(queue, 2)
    queue.restart()
    assert put(queue, 5, client="b") is None
    queue.cancel()
    queue.clear_rows(0, 1)
    assert put(queue, 5, client="a") is None
    assert len(rows(put(queue, 5, client="b"))) == 5


def test_limits_are_those_of_the_queue_not_of_the_state_it_goes_on_from() -> None:
    """Samples put before there were limits count, their bytes do not; without limits there is nothing to know."""
    plain, limited = Driver(), Ledger(limits=Limits(total_samples=4))
    put(plain, 3)
    limited.load(plain.ledger.state())
    with pytest.raises(CapacityExceeded, match="1 too many"):
        limited.put(put_request(2, ("x",), UNIT + 50), 1, "writer", 0.0)
    limited.clear(Clear(partition_id="p", global_step=None, indexes=None, generations=None), 0.0)
    assert limited.put(put_request(4, ("x",), UNIT + 51), 2, "writer", 0.0) is not None
    unlimited = Ledger()
    unlimited.load(limited.state())
    assert unlimited.put(put_request(40, ("x",), UNIT + 52), 3, "writer", 0.0) is not None


# ---------------------------------------------------------------- against a model


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
