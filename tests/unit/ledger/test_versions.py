"""The version window: what is too old is never handed out, what is lost by that is counted, and who may start more."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from tests.unit.ledger.driver import Driver, admission, ints, part, put_request, rows
from transfer_queue import GRPOSampler
from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.ledger import Ledger
from transfer_queue.ledger.limits import Limits
from transfer_queue.ledger.versions import MOST_NAMES, OTHERS
from transfer_queue.messages import SetVersion
from transfer_queue.samplers import BaseSampler

# ---------------------------------------------------------------- the window


def test_a_raise_drops_what_is_too_old() -> None:
    """Rows at the bound stay, and so do rows without a version."""
    queue = Driver(max_staleness=1)
    queue.put(4, version=[0, 1, 2, -1])
    assert queue.raise_version(1) == 0
    assert queue.raise_version(2) == 1
    assert rows(queue.draw(3)) == [1, 2, 3]
    assert queue.account()["dropped"] == {"cleared_before_task": 1}
    assert part(queue)["dropped"] == {"stale": 1}


def test_the_version_only_rises() -> None:
    """The same one again changes nothing, a lower one is refused."""
    queue = Driver(max_staleness=0)
    queue.raise_version(3)
    before = queue.snapshot()
    assert queue.raise_version(3) == 0
    for wrong in (2, -1, True, 4.0):
        with pytest.raises(InvalidArgument, match="has version 3, which only rises"):
            queue.raise_version(wrong)  # type: ignore[arg-type]
    assert queue.snapshot() == before


def test_without_a_bound_nothing_is_too_old() -> None:
    """Versions are known all the same."""
    queue = Driver()
    queue.put(2, version=0)
    assert queue.raise_version(1000) == 0
    assert rows(queue.draw(2)) == [0, 1]
    assert admission(queue) == {"policy_version": 1000, "samples": None, "bytes": None, "bounded_by": None}


@pytest.mark.parametrize("bound", [-1, True, 1.0, "1"])
def test_the_bound_is_a_whole_number(bound: Any) -> None:
    """Anything else is refused."""
    with pytest.raises(InvalidArgument, match="max_staleness must be a whole number of at least 0"):
        Ledger(max_staleness=bound)


def test_a_put_that_is_too_late_is_accepted_and_dropped() -> None:
    """Its rows are counted, are gone when it is answered, and their slots and blocks are free."""
    queue = Driver(max_staleness=1)
    queue.raise_version(5)
    done = queue.put(3, version=[3, 4, 3], client="slow")
    assert (part(queue)["dropped"], part(queue)["stale"]["by_producer"]) == ({"stale": 2}, {"slow": 2})
    with pytest.raises(StaleSampleError):
        queue.locate(done)
    assert rows(queue.draw(1)) == [1]
    assert queue.freed_slots == [(queue.latest_block, 0), (queue.latest_block, 2)]


def test_a_row_gets_its_version_once() -> None:
    """With the put that inserts it or a later one; another version is refused, before anything changes."""
    queue = Driver(max_staleness=1)
    done = queue.put(2)
    queue.put(fields=(), to=done, version=2)
    queue.put(fields=("y",), to=done, version=[2, -1])
    queue.put(1, keys=["k"], version=1)
    before = queue.snapshot()
    with pytest.raises(InvalidArgument, match="sample 1 has policy version 2, which does not change; this put says 3"):
        queue.put(fields=("z",), to=done, version=[2, 3])
    with pytest.raises(InvalidArgument, match="has policy version 1"):
        queue.put(2, keys=["new", "k"], version=0)
    three = dataclasses.replace(put_request(2, (), 0), versions=ints(1, 2, 3))
    with pytest.raises(InvalidArgument, match="3 versions for 2 rows"):
        queue.ledger.put(three, 99, "writer", queue.now)
    assert queue.snapshot() == before
    assert queue.raise_version(4) == 3


def test_a_slot_that_is_used_again_has_no_version() -> None:
    """The version of the row that was there before does not count."""
    queue = Driver(max_staleness=0)
    first = queue.put(2, version=0)
    queue.clear(first)
    assert rows(queue.put(2)) == rows(first)
    assert queue.raise_version(9) == 0
    assert len(rows(queue.draw(2))) == 2


def test_parked_draws_get_nothing_that_a_raise_made_too_old() -> None:
    """A draw that waits for two rows waits for two that are new enough."""
    queue = Driver(max_staleness=0)
    queue.put(1, version=0)
    assert queue.draw(2) is None
    waiting = queue.ticket
    queue.raise_version(1)
    queue.put(1, version=1)
    assert waiting not in queue.answers
    queue.put(1, version=1)
    assert len(rows(queue.answers[waiting])) == 2


# ---------------------------------------------------------------- what somebody has


@pytest.mark.parametrize("how", ["release", "expire", "gone"])
def test_leased_rows_are_dropped_when_they_come_back(how: str) -> None:
    """In the same step: nobody gets them in between, though somebody waits."""
    queue = Driver(max_staleness=0)
    queue.put(2, version=0)
    lease = queue.lease(2, client="c/1")
    assert lease is not None
    assert queue.raise_version(1) == 0
    assert queue.draw(1) is None
    if how == "release":
        assert queue.release(lease) == 2
    elif how == "expire":
        queue.later(10.0)
    else:
        queue.gone("c/1")
    assert part(queue)["live"] == 0
    assert queue.account()["dropped"] == {"stale": 2}
    assert queue.ticket not in queue.answers


def test_leased_rows_can_be_finished() -> None:
    """Who has them may write to them and acknowledge them; another task does not get them."""
    queue = Driver(max_staleness=0)
    done = queue.put(2, version=0)
    assert queue.draw(1, task="other", fields=["reward"]) is None
    waiting = queue.ticket
    lease = queue.lease(2)
    assert lease is not None
    queue.raise_version(1)
    queue.put(fields=("reward",), to=done)
    assert waiting not in queue.answers
    assert "0 of 2 samples ready" in queue.explain(2, task="other") and "0 of" in queue.explain(2, task="new")
    assert queue.ack(lease) == 2
    assert queue.account()["consumed"] == 2
    assert queue.account("other")["dropped"] == {"stale": 2}


def test_what_every_task_consumed_stays_until_it_is_cleared() -> None:
    """It is not lost; but it is dropped if a task that is new, or reset, would get it."""
    for again in ("clear", "reset", "task", "undo"):
        queue = Driver(max_staleness=0)
        done = queue.put(2, version=0)
        assert queue.draw(2) is not None
        drawn = queue.ticket
        assert queue.raise_version(1) == 0
        assert queue.locate(done).indexes.tolist() == [0, 1]
        if again == "clear":
            assert queue.clear(done) == 2
            assert part(queue)["dropped"] == {"cleared": 2}
            continue
        if again == "reset":
            queue.reset()
        elif again == "task":
            assert queue.draw(1, task="late") is None
            assert queue.account("late")["dropped"] == {"stale": 2}
        else:
            assert queue.cancel(drawn)
        assert (part(queue)["live"], part(queue)["dropped"]) == (0, {"stale": 2})


def test_slices_that_no_rank_has_break() -> None:
    """The rank that has its slice keeps it, the other is told that its own is gone; what is young is drawn again."""
    queue = Driver(max_staleness=0)
    queue.put(4, version=[0, 1, 0, 1])
    mine = queue.rank(0, 2, 2, group="g")
    assert rows(mine) == [0, 1]
    assert queue.raise_version(1) == 1
    again = queue.rank(0, 2, 2, group="g")
    assert rows(again) == [0, 1] and again is not None and again.extra_info["replayed"]
    with pytest.raises(StaleSampleError, match="came too late"):
        queue.rank(1, 2, 2, group="g")
    assert rows(queue.draw(1)) == [3]
    assert queue.account()["consumed"] == 3


def test_a_slice_breaks_although_another_task_has_its_rows() -> None:
    """What a lease of that task keeps alive is not handed out for the first time."""
    queue = Driver(max_staleness=0)
    queue.put(2, version=0)
    assert rows(queue.rank(0, 2, 1, group="g")) == [0]
    lease = queue.lease(2, task="other")
    assert lease is not None
    assert queue.raise_version(1) == 0
    with pytest.raises(StaleSampleError, match="cleared or dropped"):
        queue.rank(1, 2, 1, group="g")
    assert queue.release(lease) == 2
    assert part(queue)["dropped"] == {"stale": 2}
    assert queue.account("other")["dropped"] == {"stale": 2}


def test_the_slice_of_a_leased_rank_is_not_granted_again() -> None:
    """Its lease runs out: the slice is dropped instead of waiting for its rank."""
    queue = Driver(max_staleness=0)
    queue.put(2, version=[0, 0])
    assert queue.rank(0, 2, 1, group="g", lease_s=5.0) is not None
    assert queue.raise_version(1) == 1
    queue.later(5.0)
    assert part(queue)["live"] == 0
    with pytest.raises(StaleSampleError):
        queue.rank(0, 2, 1, group="g", lease_s=5.0)
    queue.account()


def test_groups_settle_without_what_was_dropped() -> None:
    """A group of three with one row too old is complete with two."""
    queue = Driver(max_staleness=0, num_n_samples=3, sampler=GRPOSampler())
    queue.put(3, group_ids=["a"] * 3, version=[1, 0, 1])
    queue.put(3, version=[1, 1, 0])
    queue.raise_version(1)
    assert rows(queue.draw(3)) == [0, 2]
    assert rows(queue.draw(3)) == [3, 4]


def test_samplers_see_versions_and_no_row_that_is_too_old() -> None:
    """Also those with a filter of their own, which look at the status of all rows."""
    seen: dict[str, Any] = {}

    class Everything(BaseSampler):
        def filter_ready_indices(self, all_indices: Any, production: Any, consumption: Any, *_: Any, **__: Any) -> Any:
            return [row for row in all_indices if consumption[row] == 0]

        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            seen["versions"] = dict(kwargs["versions"])
            return ready_indices[:batch_size]

    queue = Driver(max_staleness=0)
    queue.put(3, version=[0, 1, -1])
    lease = queue.lease(1, task="other")
    assert rows(lease) == [0]
    queue.raise_version(1)
    queue.register("t", Everything())
    assert rows(queue.draw(2)) == [1, 2]
    assert seen["versions"] == {0: 0, 1: 1}


# ---------------------------------------------------------------- what is told


def test_losses_are_counted_by_producer_and_source() -> None:
    """A slow data set does not vanish unseen, and the counters outlive the process."""
    queue = Driver(max_staleness=0)
    queue.put(2, version=0, client="rollout-0", tags=[{"source": "math"}, {"source": "code"}])
    queue.put(2, version=0, client="rollout-1", tags=[{"source": "math"}, {"difficulty": 3}])
    queue.put(1, client="rollout-1")
    assert queue.raise_version(1) == 4
    expected = {"by_producer": {"rollout-0": 2, "rollout-1": 2}, "by_source": {"math": 2, "code": 1}}
    assert part(queue)["stale"] == expected
    queue.restart()
    assert part(queue)["stale"] == expected
    text = queue.explain()
    assert "4 were dropped as stale (the policy has version 1, and only samples of version 1 and later" in text


def test_names_are_bounded() -> None:
    """Who comes after the first thousand is counted with all the others."""
    ledger = Ledger(max_staleness=0)
    for number in range(MOST_NAMES + 10):
        tags = [{"source": f"set-{number}"}]
        ledger.put(put_request(1, (), 0, version=0, tags=tags), number, f"client-{number}", 0.0)
    ledger.set_policy_version(SetVersion(version=1), 0.0)
    stale = ledger.reports.audit("p")["partitions"]["p"]["stale"]
    for by in ("by_producer", "by_source"):
        assert len(stale[by]) == MOST_NAMES + 1 and stale[by][OTHERS] == 10


def test_admission_keeps_a_producer_within_the_window() -> None:
    """(version + max_staleness + 1) × samples of a step, less those that have a version and were not dropped."""
    queue = Driver(max_staleness=1, global_batch_size=2, num_n_samples=2)
    assert admission(queue) == {"policy_version": 0, "samples": 8, "bytes": None, "bounded_by": "limits.max_staleness"}
    done = queue.put(3, version=0)
    queue.put(1)
    assert admission(queue)["samples"] == 5
    queue.put(fields=(), to=done, version=0)
    queue.drop(queue.locate(partition_id="p", fields=()), "bad")
    assert admission(queue)["samples"] == 8
    queue.put(5, version=0)
    assert queue.draw(5) is not None
    queue.clear()
    assert admission(queue)["samples"] == 3
    queue.put(2, version=0)
    assert queue.raise_version(2) == 2
    assert admission(queue) | {"bytes": 0} == {
        "policy_version": 2,
        "samples": 16 - 5,
        "bytes": 0,
        "bounded_by": "limits.max_staleness",
    }
    queue.restart()
    assert admission(queue)["samples"] == 11


def test_admission_tells_what_limits_leave() -> None:
    """The least of the total, the producer and the partition that is named; what is used up goes first."""
    queue = Driver(limits=Limits(total_samples=10, partition_samples=6, producer_samples=8, total_bytes=1000))
    queue.put(5, size_bytes=400)
    assert admission(queue) == {
        "policy_version": 0,
        "samples": 3,
        "bytes": 600,
        "bounded_by": "limits.producer_samples",
    }
    assert admission(queue, "p")["samples"] == 1 and admission(queue, "q", "other")["samples"] == 5
    queue.put(fields=("y",), to=queue.locate(partition_id="p"), size_bytes=700)
    found = admission(queue)
    assert (found["samples"], found["bytes"], found["bounded_by"]) == (3, 0, "limits.total_bytes")


def test_a_checkpoint_is_cut_to_the_window_of_the_queue_that_loads_it() -> None:
    """Its version is the checkpoint's; leases are over, and what they kept is dropped with what is too old here."""
    queue = Driver(max_staleness=2)
    queue.put(4, version=[0, 0, 1, 2])
    assert rows(queue.lease(1)) == [0]
    queue.raise_version(2)
    other = Ledger(max_staleness=1)
    block = ints(queue.latest_block)
    assert other.replace(queue.ledger.state(), block, block + 1) == 2
    found = other.reports.audit("p")["partitions"]["p"]
    assert (found["dropped"], found["tasks"]["t"]["dropped"]) == ({"stale": 2}, {"stale": 2})
    with pytest.raises(InvalidArgument, match="has version 2"):
        other.set_policy_version(SetVersion(version=1), 0.0)
