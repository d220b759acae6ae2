"""Puts that wait for room in the ledger: in order, with deadlines, withdrawn or admitted before they are written."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import UNIT, Driver, put_request, rows
from transfer_queue.errors import CapacityExceeded
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.admissions import ADMITTED_S
from transfer_queue.ledger.limits import Limits
from transfer_queue.messages import Admit, Clear


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
