"""The judge finds each thing that must not be, in the log of a run that was right but for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.chaos.judge import judge
from tests.chaos.record import PROXIED, STOPPED, Disturbance, Record
from tests.chaos.roles import TASKS
from tests.chaos.sidelog import Life, Told

LEASE_S = 4.0
ACCOUNT = {
    "inserted": 2,
    "pending": 0,
    "reserved": 0,
    "consumed": 2,
    "dropped": {},
    "leases": {"granted": 2, "acked": 2, "open": 0},
    "redelivered": 0,
    "balanced": True,
}
FIGURES = {
    "bytes_live": 0,
    "bytes_pinned": 0,
    "bytes_reserved": 10,
    "bytes_overhead": 0,
    "bytes_free": 90,
    "bytes_arenas": 100,
    "bytes_capacity": 100,
}
FULL_DISK = Disturbance("full disk", 0.0, 3.0, frozenset({("draw", "CapacityExceeded")}))
LOST = Disturbance("lost message", 0.0, 3.0, frozenset({("draw", "ConnectionLost")}), PROXIED)


def told(life: str, op: str, at_s: float, outcome: str | None = "ok", took_s: float = 0.1, **facts: Any) -> Told:
    timeout_s = facts.pop("timeout_s", 1.0)
    return Told(life, op, at_s, timeout_s, facts, outcome, None if outcome is None else at_s + took_s)


def draw(life: str, task: str, at_s: float, token: int, **more: Any) -> Told:
    """Both samples."""
    return told(life, "draw", at_s, task=task, partition="a", keys=["1", "2"], token=token, **more)


def ack(life: str, task: str, at_s: float, token: int, outcome: str = "ok") -> Told:
    return told(life, "ack", at_s, outcome, task=task, token=token, sequences=[1, 2], count=2)


@pytest.fixture
def record() -> Record:
    """Two samples are put, drawn for each task under leases 1 to 3, acknowledged and cleared."""
    lives = {
        name: Life(name, notes=[{"note": "start", "lease_s": LEASE_S}]) for name in ("producer-0-0", "cleaner-0-0")
    }
    lives["producer-0-0"].calls.append(told("producer-0-0", "put", 1.0, partition="a", sequences=[1, 2]))
    for token, task in enumerate(TASKS, 1):
        name = f"{task}er-0-0"
        calls = [draw(name, task, 2.0, token), told(name, "read", 2.5, token=token), ack(name, task, 3.0, token)]
        lives[name] = Life(name, calls, [{"note": "start", "lease_s": LEASE_S}])
    lives["cleaner-0-0"].calls.append(told("cleaner-0-0", "clear", 5.0, sequences=[1, 2]))
    tasks = {task: copy.deepcopy(ACCOUNT) for task in TASKS}
    found = {"inserted": 2, "dropped": {"cleared": 2}, "lost": {}, "quarantined": [], "tasks": tasks}
    audit = {"partitions": {"a": found}}
    return Record(lives, set(), {}, audit, set(), units={"unit-0": dict(FIGURES)}, held={"unit-0": 0})


def test_a_run_that_was_right_is_found_right(record: Record) -> None:
    verdict = judge(record)
    assert verdict.violations == []
    assert verdict.counts["samples"] == 2


def looker(record: Record) -> list[Told]:
    return record.lives["looker-0-0"].calls


def account(record: Record, task: str = "look") -> dict[str, Any]:
    found: dict[str, Any] = record.audit["partitions"]["a"]["tasks"][task]
    return found


def lose_a_sample(record: Record) -> None:
    for life in record.lives.values():
        for call in life.calls:
            if call.op in ("draw", "ack"):
                call.facts |= {name: call.facts[name][:1] for name in ("keys", "sequences") if name in call.facts}


def drop_for_a_reason(record: Record) -> None:
    record.audit["partitions"]["a"]["dropped"] = {"stale": 2}


def consume_twice(record: Record) -> None:
    looker(record).extend([draw("looker-0-0", "look", 7.5, 9), ack("looker-0-0", "look", 8.0, 9)])


def deliver_what_is_leased(record: Record) -> None:
    looker(record).pop()
    looker(record).extend([draw("looker-0-0", "look", 4.0, 9), ack("looker-0-0", "look", 4.5, 9)])
    account(record).update(leases={"granted": 4, "acked": 2, "expired": 2, "open": 0}, redelivered=2)


def deliver_before_the_holder_was_killed(record: Record) -> None:
    excused_by_death(record)
    looker(record).append(told("looker-0-0", "read", 4.2, token=2))


def count_no_duplicate(record: Record) -> None:
    looker(record).pop()
    looker(record).extend([draw("looker-0-0", "look", 6.5, 9), ack("looker-0-0", "look", 7.0, 9)])
    account(record)["leases"] = {"granted": 4, "acked": 2, "expired": 2, "open": 0}


def expire_what_was_settled(record: Record) -> None:
    account(record).update(leases={"granted": 4, "acked": 2, "expired": 2, "open": 0}, redelivered=2)


def grant_less_than_was_delivered(record: Record) -> None:
    account(record)["leases"] = {"granted": 1, "acked": 1, "open": 0}


def end_a_lease_early(record: Record) -> None:
    looker(record)[2].outcome = "LeaseExpired"


def let_a_lease_live_on(record: Record) -> None:
    looker(record)[2].began += 5.0
    looker(record)[2].ended = looker(record)[2].began + 0.1


def restart_before_the_lease(record: Record) -> None:
    let_a_lease_live_on(record)
    record.disturbances.append(Disturbance("kill controller", 1.0, 1.5))


def clear_under_a_lease(record: Record) -> None:
    looker(record)[1].outcome = "StaleSampleError"


def read_other_bytes(record: Record) -> None:
    record.lives["looker-0-0"].notes.append({"note": "damaged", "wrong": ["seq of sample 1"]})


def forget_to_acknowledge(record: Record) -> None:
    looker(record).pop()


def never_end(record: Record) -> None:
    looker(record).append(told("looker-0-0", "read", 4.0, None))


def end_late(record: Record) -> None:
    looker(record).append(told("looker-0-0", "read", 4.0, took_s=60.0, token=1))


def break_off_without_a_fault(record: Record) -> None:
    looker(record).append(told("looker-0-0", "draw", 4.0, "ConnectionLost", task="look", partition="a"))


def break_off_long_after_the_fault(record: Record) -> None:
    record.disturbances.append(LOST)
    record.proxied.add("looker-0-0")
    looker(record).append(told("looker-0-0", "draw", 12.0, "ConnectionLost", task="look", partition="a"))


def break_off_where_the_fault_does_not_reach(record: Record) -> None:
    record.disturbances.append(LOST)
    looker(record).append(told("looker-0-0", "draw", 2.0, "ConnectionLost", task="look", partition="a"))


def refuse_a_draw_long_after_the_disk_was_full(record: Record) -> None:
    record.disturbances.append(FULL_DISK)
    looker(record).append(told("looker-0-0", "draw", 9.0, "CapacityExceeded", task="look", partition="a"))


def refuse_a_put_without_waiting(record: Record) -> None:
    refused = told("producer-0-0", "put", 4.0, "CapacityExceeded", partition="a", sequences=[3, 4], timeout_s=20.0)
    record.lives["producer-0-0"].calls.append(refused)


def give_up_a_draw_early(record: Record) -> None:
    looker(record).append(told("looker-0-0", "draw", 4.0, "GetMetaTimeout", task="look", partition="a"))


def put_in_part(record: Record) -> None:
    broken = told("producer-0-0", "put", 1.0, None, partition="a", sequences=[3, 4])
    record.lives["producer-0-0"].calls.append(broken)
    record.killed.add("producer-0-0")
    record.live.add(3)


def keep_what_was_refused(record: Record) -> None:
    refused = told("producer-0-0", "put", 4.0, "CapacityExceeded", 1.1, partition="a", sequences=[3, 4])
    record.lives["producer-0-0"].calls.append(refused)
    record.live.update({3, 4})


def unbalance(record: Record) -> None:
    account(record)["pending"] = 1  # and still called balanced


def unbalance_leases(record: Record) -> None:
    account(record)["leases"]["released"] = 1


def forget_a_partition(record: Record) -> None:
    record.audit["partitions"].clear()


def miscount_bytes(record: Record) -> None:
    record.units["unit-0"]["bytes_free"] -= 64


def keep_bytes(record: Record) -> None:
    record.held["unit-0"] = 4096


def leave_a_folder(record: Record) -> None:
    record.left.append("/dev/shm/tq-0-123")


def crash(record: Record) -> None:
    record.crashed.append("Traceback …")


@pytest.mark.parametrize(
    ("doctor", "expected"),
    [
        (lose_a_sample, "sample 2 was put and never seen again"),
        (drop_for_a_reason, "partition a has lost samples"),
        (consume_twice, "task look consumed sample 1 under leases"),
        (consume_twice, "task look got sample 1 again after it was consumed"),
        (deliver_what_is_leased, "task look got sample 1 while it was leased"),
        (deliver_before_the_holder_was_killed, "task look got sample 1 while it was leased"),
        (count_no_duplicate, "2 deliveries ran out, and 0 are counted as delivered again"),
        (expire_what_was_settled, "2 deliveries ran out, and only 0 were not settled by their holders"),
        (grant_less_than_was_delivered, "2 samples were delivered under leases, and only 1 granted"),
        (end_a_lease_early, "a lease ended 1.10 s after it was asked for"),
        (let_a_lease_live_on, "a lease was good 1.90 s after its time"),
        (restart_before_the_lease, "a lease was good 1.90 s after its time"),
        (clear_under_a_lease, "rows were gone under a lease that was good"),
        (read_other_bytes, "looker-0-0 read other bytes than were put"),
        (forget_to_acknowledge, "nobody acknowledged sample 1 for task look"),
        (never_end, "a call never ended"),
        (end_late, "a call ended 59.0 s after its deadline"),
        (break_off_without_a_fault, "a call ended as it must not"),
        (break_off_long_after_the_fault, "a call ended as it must not"),
        (break_off_where_the_fault_does_not_reach, "a call ended as it must not"),
        (refuse_a_draw_long_after_the_disk_was_full, "a call ended as it must not"),
        (refuse_a_put_without_waiting, "a call ended as it must not"),
        (give_up_a_draw_early, "a call ended as it must not"),
        (put_in_part, "only [3] of a put that broke off are there"),
        (keep_what_was_refused, "sample 3 is there, which was refused"),
        (unbalance, "partition a, task look: the accounts are wrong"),
        (unbalance_leases, "partition a, task look: the accounts are wrong"),
        (forget_a_partition, "partition a is gone, though nobody removed it"),
        (miscount_bytes, "unit-0: its bytes do not add up"),
        (keep_bytes, "unit-0: 4096 bytes did not come back"),
        (leave_a_folder, "left behind: /dev/shm/tq-0-123"),
        (crash, "a process of the workload crashed"),
    ],
)
def test_the_judge_sees(doctor: Callable[[Record], None], expected: str, record: Record) -> None:
    doctor(record)
    found = judge(record).violations
    assert any(expected in violation for violation in found), found


def excused_by_full_disk(record: Record) -> None:
    record.disturbances.append(FULL_DISK)
    looker(record).append(told("looker-0-0", "draw", 2.0, "CapacityExceeded", task="look", partition="a"))


def excused_by_a_proxy(record: Record) -> None:
    record.disturbances.append(LOST)
    record.proxied.add("looker-0-0")
    looker(record).append(told("looker-0-0", "draw", 2.0, "ConnectionLost", task="look", partition="a"))


def excused_by_being_stopped(record: Record) -> None:
    record.disturbances.append(Disturbance("zombie", 0.0, 6.0, whom=STOPPED))
    record.stopped["looker-0-0"] = 5.0
    looker(record).append(told("looker-0-0", "draw", 4.0, "ConnectionLost", 5.0, task="look", partition="a"))


def excused_by_expiry(record: Record) -> None:
    """The lease runs out, the sample goes to the next one, and both are counted."""
    count_no_duplicate(record)
    account(record)["redelivered"] = 2
    looker(record).append(ack("looker-0-0", "look", 6.2, 2, "LeaseExpired"))


def excused_by_death(record: Record) -> None:
    """The lease of a holder that was killed is over at once."""
    deliver_what_is_leased(record)
    next_life = Life("looker-0-1", looker(record)[-2:], [{"note": "start", "lease_s": LEASE_S}])
    for call in next_life.calls:
        call.life = next_life.name
    del looker(record)[-2:]
    record.lives[next_life.name] = next_life
    record.killed.add("looker-0-0")


def excused_by_a_restart(record: Record) -> None:
    """Leases last anew from the moment at which the controller is there again."""
    let_a_lease_live_on(record)
    record.disturbances.append(Disturbance("kill controller", 2.0, 4.5))


def excused_by_waiting(record: Record) -> None:
    looker(record).append(told("looker-0-0", "draw", 4.0, "GetMetaTimeout", 1.0, task="look", partition="a"))


@pytest.mark.parametrize(
    "doctor",
    [
        excused_by_full_disk,
        excused_by_a_proxy,
        excused_by_being_stopped,
        excused_by_expiry,
        excused_by_death,
        excused_by_a_restart,
        excused_by_waiting,
    ],
)
def test_what_a_fault_explains_is_no_violation(doctor: Callable[[Record], None], record: Record) -> None:
    doctor(record)
    assert judge(record).violations == []
