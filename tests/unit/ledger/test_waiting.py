"""Parked draws: what wakes them, in which order, and that none stands in another's way."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.ledger.driver import UNIT, Driver, column, ints, put_request, rows
from transfer_queue import BaseSampler, GRPOSampler
from transfer_queue.errors import BlockLost, GetMetaTimeout, InvalidArgument, SamplerError, TransferQueueError
from transfer_queue.messages import Admit, Settle


def test_the_put_that_satisfies_a_draw_wakes_it_and_is_answered_itself() -> None:
    """No poll period lies between; the put is done whatever the waiting draws are."""
    queue = Driver()
    assert queue.draw(3) is None
    waiting = queue.ticket
    queue.put(2)
    assert not queue.answers
    done = queue.put(2)
    assert rows(queue.answers[waiting]) == [0, 1, 2]
    assert rows(done) == [2, 3]
    assert queue.ledger.reports.audit()["waiting"] == 0


def test_of_a_thousand_waiters_one_row_satisfies_the_first_that_fits() -> None:
    """One that wants more does not stand in the way; the others stay parked."""
    queue = Driver()
    for _ in range(1000):
        assert queue.draw(2 if queue.ticket == 0 else 1) is None
    queue.put(1)
    assert {ticket: rows(answer) for ticket, answer in queue.answers.items()} == {2: [0]}
    assert queue.ledger.reports.audit()["waiting"] == 999
    queue.put(3)
    assert {ticket: rows(answer) for ticket, answer in queue.answers.items()} == {1: [1, 2], 2: [0], 3: [3]}


def test_waiters_of_a_task_are_served_in_order_of_arrival() -> None:
    """Equal draws get rows first come, first served; tasks do not compete."""
    queue = Driver()
    for task in ("a", "b", "a", "b"):
        assert queue.draw(2, task=task) is None
    queue.put(3)
    assert {t: rows(answer) for t, answer in queue.answers.items()} == {1: [0, 1], 2: [0, 1]}
    queue.put(1)
    assert {t: rows(answer) for t, answer in queue.answers.items()} == {1: [0, 1], 2: [0, 1], 3: [2, 3], 4: [2, 3]}


def test_a_draw_on_an_unknown_partition_field_or_task_waits() -> None:
    """Nothing is ready there yet; the first put of its kind serves it."""
    queue = Driver()
    assert queue.draw(1, ["new"], "unheard", partition_id="later") is None
    queue.put(1, ["other"], partition_id="later")
    queue.put(1, ["new"], partition_id="later")
    assert rows(queue.answers[1]) == [1]


def test_a_waiting_draw_of_a_cleared_partition_is_served_by_the_next_of_that_name() -> None:
    """Clearing a partition does not end the wait."""
    queue = Driver()
    queue.put(1)
    assert queue.draw(2) is None
    queue.clear()
    queue.put(2)
    assert rows(queue.answers[2]) == [0, 1]


@pytest.mark.parametrize("change", ["reset", "cancel", "seal", "tags"])
def test_every_change_that_may_serve_a_draw_wakes_it(change: str) -> None:
    """Not only puts do."""

    class Tagged(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, *, tags: Any, **kwargs: Any) -> Any:
            return [row for row in ready_indices if row in tags][:batch_size]

    queue = Driver(num_n_samples=2)
    done = queue.put(1, group_ids=["g"])
    if change in ("reset", "cancel"):
        assert queue.draw(1) is not None
    else:
        queue.register("t", GRPOSampler() if change == "seal" else Tagged())
    taken = queue.ticket
    assert queue.draw(2 if change == "seal" else 1) is None
    changes: dict[str, Any] = {
        "reset": queue.reset,
        "cancel": lambda: queue.cancel(taken),
        "seal": lambda: queue.seal("g"),
        "tags": lambda: queue.set_tags(done, {"ready": 1}),
    }
    changes[change]()
    assert rows(queue.answers[queue.ticket]) == [0]


def test_a_cancelled_waiter_gets_nothing() -> None:
    """Its rows go to the next in line."""
    queue = Driver()
    for _ in range(2):
        assert queue.draw(1) is None
    assert queue.cancel(1)
    assert not queue.cancel(1)
    queue.put(1)
    assert {t: rows(answer) for t, answer in queue.answers.items()} == {2: [0]}
    assert queue.ledger.next_deadline() is None


def test_a_deadline_ends_the_wait_with_what_is_missing() -> None:
    """Counts, fields, the last producer and its age, and the names that come near."""
    queue = Driver()
    queue.put(5, ["x"])
    queue.put(2, ["x", "reward"], client="reward-1")
    queue.put(1, ["x"], partition_id="train_0")
    assert queue.draw(8, ["x", "reward"], "actor", timeout_s=12.0) is None
    assert queue.draw(1, ["xx"], "actor", timeout_s=12.0) is None
    assert queue.draw(1, ["x"], "actor", timeout_s=12.5, partition_id="train_1") is None
    queue.later(12.4)
    assert len(queue.answers) == 2
    queue.later(0.1)
    errors = [queue.answers[queue.ticket - back] for back in (2, 1, 0)]
    assert all(isinstance(error, GetMetaTimeout) for error in errors)
    texts = [str(error) for error in errors]
    assert "after 12.4 s: 2 of 8 samples ready in partition 'p' for task 'actor'" in texts[0]
    assert "5 wait for field 'reward' (last produced 12.4 s ago by client 'reward-1')" in texts[0]
    assert "field 'xx' was not produced by anyone (known: reward, x; did you mean 'x'?)" in texts[1]
    assert "no partition 'train_1' yet (known: p, train_0; did you mean 'train_0'?)" in texts[2]
    assert queue.ledger.next_deadline() is None


def test_a_draw_without_time_to_wait_raises_at_once() -> None:
    """`timeout_s=0` asks for what is there now."""
    queue = Driver()
    with pytest.raises(GetMetaTimeout, match="no partition 'p' yet"):
        queue.draw(1, timeout_s=0.0)
    queue.put(1)
    with pytest.raises(GetMetaTimeout, match="1 of 2 samples ready"):
        queue.draw(2, timeout_s=0.0)
    assert rows(queue.draw(1, timeout_s=0.0)) == [0]


def test_a_draw_without_a_deadline_waits_for_ever() -> None:
    """An infinite timeout is no deadline."""
    queue = Driver()
    assert queue.draw(1, timeout_s=float("inf")) is None
    assert queue.ledger.next_deadline() is None
    queue.later(1e12)
    queue.put(1)
    assert rows(queue.answers[1]) == [0]


def test_what_serves_a_draw_at_its_deadline_goes_before_the_timeout() -> None:
    """Rows that are there when the deadline is noticed are handed out."""
    queue = Driver()
    assert queue.draw(1, timeout_s=5.0) is None
    queue.now += 10.0
    queue.put(1)
    assert rows(queue.answers[1]) == [0]


def test_a_sampler_that_fails_for_one_waiter_fails_neither_the_put_nor_the_others() -> None:
    """The error goes to the draw whose sampler raised."""

    class Fails(BaseSampler):
        def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
            raise RuntimeError("broken on purpose")

    queue = Driver()
    queue.register("bad", Fails())
    assert queue.draw(1, task="bad") is None
    assert queue.draw(1, task="good") is None
    assert rows(queue.put(1)) == [0]
    assert isinstance(queue.answers[1], SamplerError)
    assert "broken on purpose" in str(queue.answers[1])
    assert rows(queue.answers[2]) == [0]
    assert queue.account("bad")["pending"] == 1


def test_a_sampler_registered_later_serves_the_draws_that_wait() -> None:
    """And tells those that it can never serve, at once; the registration itself stands."""
    queue = Driver(num_n_samples=2)
    done = queue.put(4)
    part = {"indexes": done.indexes[1:], "generations": done.generations[1:]}
    assert queue.draw(2, ["x", "y"]) is None
    assert queue.draw(3, ["x", "y"]) is None
    queue.register("t", GRPOSampler())
    error = queue.answers[queue.ticket]
    assert isinstance(error, InvalidArgument)
    assert "(3) must be divisible by num_n_samples (2)" in str(error)
    queue.put(3, ["y"], **part)
    assert rows(queue.answers[queue.ticket - 2]) == [2, 3]


class Rewarded(BaseSampler):
    """Looks at a field that the draw does not ask for."""

    def filter_ready_indices(self, all_indices: Any, production_status: Any, *args: Any, **kwargs: Any) -> list[int]:
        reward = args[2].get("reward")
        return [] if reward is None else [row for row in all_indices if production_status[row, reward]]

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        return ready_indices[:batch_size]


@pytest.mark.parametrize("registered_later", [False, True])
def test_a_sampler_with_a_filter_is_asked_whatever_field_comes(registered_later: bool) -> None:
    """It may look at any field, so any put may bring what it waits for."""
    queue = Driver(sampler=None if registered_later else Rewarded())
    first = queue.put(2)
    assert queue.draw(3) is None
    waiting = queue.ticket
    if registered_later:
        queue.register("t", Rewarded())
    second = queue.put(1)
    queue.put(fields=["reward"], to=first)
    assert waiting not in queue.answers
    queue.put(fields=["reward"], to=second)
    assert rows(queue.answers[waiting]) == [0, 1, 2]


def test_a_put_that_was_admitted_and_is_refused_lets_others_in() -> None:
    """The room that was kept for it is free, though it was exactly what it needed."""
    queue = Driver(limits={"total_samples": 4})
    queue.put(1)
    admit = Admit(partition_id="p", global_step=None, num_rows=3, size_bytes=100, timeout_s=0.0, keys=None)
    admitted = queue.after(queue.ledger.admit, admit, 80, "writer", queue.now)
    assert queue.put(2, timeout_s=60.0) is None
    waiting = queue.ticket
    wrong = {"columns": (column("x", "int64"),), "admission": admitted.admission, "size_bytes": 100}
    with pytest.raises(TransferQueueError, match="int64"):
        queue.put(3, **wrong)
    assert rows(queue.answers[waiting]) == [1, 2]


def test_a_put_that_waits_hears_that_its_block_is_refused() -> None:
    """At once: its unit took its writer for dead."""
    queue = Driver(limits={"total_samples": 1})
    queue.put(1)
    late = put_request(1, ("x",), UNIT + 77, timeout_s=60.0)
    assert queue.after(queue.ledger.put, late, 80, "writer", queue.now) is None
    queue.after(queue.ledger.settle, Settle(blocks=ints(UNIT + 77)), queue.now)
    assert isinstance(queue.answers[80], BlockLost)
