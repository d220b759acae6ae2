"""Keys in the ledger: clearing by key, what a put tells, sealed partitions, and requests that wait for keys.

The driver compares each change with its replay from the journal.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import Driver, put_request, rows
from transfer_queue.errors import CapacityExceeded, GetMetaTimeout, InvalidArgument, PartitionSealed
from transfer_queue.messages import Clear, GetKeys, Keys, WaitKeys


def clear_keys(queue: Driver, *keys: str, partition: str = "p") -> int:
    request = Clear(partition_id=partition, global_step=None, indexes=None, generations=None, keys=keys)
    return int(queue.after(queue.ledger.clear, request, queue.now))


def wait(queue: Driver, **wanted: Any) -> Keys | None:
    """None: parked under the driver's latest ticket."""
    body: dict[str, Any] = {"partition_id": "p", "keys": None, "fields": (), "where": {}, "count": None, "since": None}
    request = WaitKeys(**body | {"timeout_s": 10.0} | wanted)
    queue.ticket += 1
    reply: Keys | None = queue.after(queue.ledger.serving.keys.wait, request, queue.ticket, queue.now)
    return reply


def listing(queue: Driver, since: str | None = None) -> Keys:
    return queue.ledger.serving.keys.listing(GetKeys(partition_id=None, since=since))


def answer(queue: Driver, ticket: int) -> Any:
    return queue.answers.get(ticket)


def test_clear_by_key_leaves_out_what_is_not_there() -> None:
    queue = Driver()
    queue.put(3, keys=["a", "b", "c"])
    assert clear_keys(queue, "b", "b", "nobody") == 1 and clear_keys(queue, "b") == 0
    assert clear_keys(queue, "a", partition="nowhere") == 0
    assert listing(queue).keys == ("a", "c")
    assert clear_keys(queue, "c", "a") == 2 and listing(queue).partitions == ("p",)


def test_a_put_tells_tags_and_fields_where_asked() -> None:
    queue = Driver()
    assert queue.put(1, ["x"], keys=["a"], tags=[{"n": 1}]).tags is None
    done = queue.put(2, ["y"], keys=["b", "a"], tags=[None, {"m": 2}], tell=True)
    assert (done.tags, done.fields) == ((None, {"n": 1, "m": 2}), ("y",))
    assert queue.put(1, (), keys=["a"], tell=True).fields == ("x", "y")


# ---------------------------------------------------------------- the last rows


def test_a_sealed_partition_takes_fields_but_no_rows() -> None:
    """Also after a restart; a partition of the same name that is made anew is open."""
    queue = Driver()
    first = queue.put(2, ["x"], keys=["a", "b"], is_last=True)
    queue.restart()
    queue.put(fields=["y"], to=first)
    queue.put(2, ["z"], keys=["b", "a"])
    for options in ({}, {"keys": ["c"]}):
        with pytest.raises(PartitionSealed, match="2 more came" if not options else "1 more came"):
            queue.put(1 if options else 2, ["x"], **options)
    assert queue.status().sealed and not queue.status(partition="q").sealed
    queue.clear(first)
    with pytest.raises(PartitionSealed):
        queue.put(1)
    queue.clear("p")
    queue.put(1)
    assert not queue.status().sealed


def test_a_put_that_waits_ends_when_the_partition_is_sealed() -> None:
    queue = Driver(limits={"total_samples": 2})
    first = queue.put(2, ["x"])
    assert queue.put(1, timeout_s=50.0) is None
    ticket = queue.ticket
    queue.put(fields=["y"], to=first, is_last=True)
    assert isinstance(answer(queue, ticket), PartitionSealed)
    with pytest.raises(CapacityExceeded):
        queue.put(1, partition_id="q")


def test_draws_that_nothing_can_serve_any_more_end() -> None:
    """They get no rows, and are told how many are left; draws that may still be served wait on."""
    queue = Driver()
    queue.put(3, ["x"])
    first = queue.put(2, ["x", "y"])
    assert queue.draw(4, ["x", "y"], "a") is None
    assert queue.draw(2, ["x"], "b") is not None
    assert queue.draw(4, ["x"], "b") is None
    few, many = queue.ticket - 2, queue.ticket
    queue.put(fields=["z"], to=first, is_last=True)
    assert many in queue.answers and rows(queue.answers[many]) == []
    assert queue.answers[many].extra_info == {"end_of_stream": True, "left": 3, "batch_size": 3}
    assert few not in queue.answers  # five rows may yet get y
    assert queue.draw(2, ["x", "y"], "a") is not None
    assert queue.answers[few].extra_info == {"end_of_stream": True, "left": 3, "batch_size": 3}
    assert queue.draw(3, ["x"], "b") is not None
    assert queue.draw(1, ["x"], "b").extra_info["left"] == 0
    queue.reset("b")
    assert rows(queue.draw(2, ["x"], "b")) == [0, 1]


def test_rows_under_a_lease_may_come_back() -> None:
    queue = Driver()
    queue.put(2, ["x"], is_last=True)
    leased = queue.lease(2)
    assert queue.draw(1) is None
    ticket = queue.ticket
    assert leased is not None
    queue.ack(leased)
    assert queue.answers[ticket].extra_info["end_of_stream"]


def test_groups_that_stay_incomplete_end_a_draw_of_groups() -> None:
    queue = Driver(num_n_samples=2)
    queue.put(3, ["x"], group_ids=[1, 1, 2], is_last=True)
    assert rows(queue.draw(2, get_n_samples=True)) == [0, 1]
    assert queue.draw(2, get_n_samples=True).extra_info == {"end_of_stream": True, "left": 1, "batch_size": 0}


def test_ranks_of_a_batch_are_served_to_the_last() -> None:
    queue = Driver()
    queue.put(4, ["x"], is_last=True)
    assert rows(queue.rank(0, 2, 2)) == [0, 1]
    assert queue.rank(0, 2, 1) is None, "the other rank has not got its slice, which may be broken"
    ticket = queue.ticket
    assert rows(queue.rank(1, 2, 2)) == [2, 3]
    assert queue.answers[ticket].extra_info["end_of_stream"]


# ---------------------------------------------------------------- waiting for keys


def test_only_the_changes_that_matter_wake() -> None:
    """Rows without a key, other partitions and other tags wake nobody; a restart of the state wakes all."""
    queue = Driver()
    assert wait(queue, where={"s": [1]}, count=2) is None
    assert wait(queue, keys=("a", "b")) is None
    first, second = queue.ticket - 1, queue.ticket
    queue.put(1, ["x"])
    queue.put(2, (), keys=["a", "b"], partition_id="q", tags=[{"s": 1}] * 2)
    queue.put(1, (), keys=["a"], tags=[{"s": 1}])
    assert not queue.answers
    located = queue.locate(keys=("a",))
    queue.put(1, (), keys=["c"])
    queue.set_tags(queue.locate(keys=("c",)), {"s": 1})
    assert queue.answers.keys() == {first} and answer(queue, first).keys == ("a", "c")
    queue.clear(located)
    queue.put(1, (), keys=["b"])
    assert second not in queue.answers
    queue.put(1, (), keys=["a"])
    assert answer(queue, second).keys == ("b", "a")


def test_a_partition_that_is_cleared_and_made_anew() -> None:
    queue = Driver()
    queue.put(2, (), keys=["a", "b"])
    cursor = listing(queue).cursor
    assert wait(queue, count=3) is None
    assert wait(queue, since=cursor) is None
    counting, changed = queue.ticket - 1, queue.ticket
    queue.clear("p")
    assert answer(queue, changed).removed == ("a", "b")
    queue.put(2, (), keys=["c", "d"])
    assert counting not in queue.answers
    queue.put(1, (), keys=["a"])
    assert answer(queue, counting).keys == ("c", "d", "a")
    assert listing(queue, cursor).removed == ("b",)


def test_deadline_and_cancel_forget() -> None:
    queue = Driver()
    assert wait(queue, keys=("a",), timeout_s=5.0) is None
    assert wait(queue, since="", timeout_s=50.0) is None
    late, gone = queue.ticket - 1, queue.ticket
    queue.later(6.0)
    assert isinstance(answer(queue, late), GetMetaTimeout) and "'a' (not there)" in str(answer(queue, late))
    assert queue.cancel(gone) and queue.ledger.next_deadline() is None
    queue.put(1, (), keys=["a"])
    assert gone not in queue.answers and not queue.ledger.serving.keys.feed.dirty
    with pytest.raises(InvalidArgument, match="not both"):
        wait(queue, keys=("a",), count=1)


def test_equal_wishes_share_what_is_known_of_them() -> None:
    """A hundred that wait for the same are answered together, each under its own ticket."""
    queue = Driver()
    tickets = []
    for n in range(100):
        assert wait(queue, where={"s": [n % 2]}) is None
        tickets.append(queue.ticket)
    queue.put(1, (), keys=["a"], tags=[{"s": 1}])
    assert sorted(queue.answers) == tickets[1::2]
    assert queue.cancel(tickets[0])
    queue.put(1, (), keys=["b"], tags=[{"s": 0}])
    assert sorted(queue.answers) == tickets[1:]


def test_a_put_without_data_needs_no_block() -> None:
    """What a key-value put of tags alone sends."""
    request = put_request(1, (), 0, keys=["a"], tags=[{"s": 1}], tell=True)
    queue = Driver()
    done = queue.after(queue.ledger.put, request, 1, "writer", queue.now)
    assert (done.tags, done.fields) == (({"s": 1},), ())
