"""What can be done to the log of a run that was right: what the judge is to find, and what faults explain."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

from tests.chaos.faults import BY_NAME
from tests.chaos.record import STOPPED, Disturbance, Record
from tests.chaos.right_log import FULL_DISK, LEASE_S, LOST, account, ack, draw, draw_of, looker, told
from tests.chaos.sidelog import Life

Doctor: TypeAlias = Callable[[Record], None]

# ---------------------------------------------------------------- what must not be


def lose_a_sample(record: Record) -> None:
    for life in record.lives.values():
        for call in life.calls:
            if call.op in ("draw", "ack"):
                call.facts |= {name: call.facts[name][:1] for name in ("keys", "sequences") if name in call.facts}


def drop_for_a_reason(record: Record) -> None:
    record.audit["partitions"]["a"]["dropped"] = {"stale": 4}


def consume_twice(record: Record) -> None:
    looker(record).extend([draw("looker-0-0", "look", 7.5, 9, deliveries=[2] * 4), ack("looker-0-0", "look", 8.0, 9)])


def deliver_what_is_leased(record: Record) -> None:
    looker(record).pop()
    looker(record).extend([draw("looker-0-0", "look", 4.0, 9, deliveries=[2] * 4), ack("looker-0-0", "look", 4.5, 9)])
    account(record).update(leases={"granted": 8, "acked": 4, "expired": 4, "open": 0}, redelivered=4)


def deliver_before_the_holder_was_killed(record: Record) -> None:
    excused_by_death(record)
    looker(record).append(told("looker-0-0", "read", 4.2, token=2))


def count_no_duplicate(record: Record) -> None:
    looker(record).pop()
    looker(record).extend([draw("looker-0-0", "look", 6.5, 9, deliveries=[2] * 4), ack("looker-0-0", "look", 7.0, 9)])
    account(record)["leases"] = {"granted": 8, "acked": 4, "expired": 4, "open": 0}


def expire_what_was_settled(record: Record) -> None:
    account(record).update(leases={"granted": 8, "acked": 4, "expired": 4, "open": 0}, redelivered=4)


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
    refused = told("producer-0-0", "put", 4.0, "CapacityExceeded", partition="a", sequences=[4, 5], timeout_s=20.0)
    record.lives["producer-0-0"].calls.append(refused)


def give_up_a_draw_early(record: Record) -> None:
    looker(record).append(told("looker-0-0", "draw", 4.0, "GetMetaTimeout", task="look", partition="a"))


def put_in_part(record: Record) -> None:
    broken = told("producer-0-0", "put", 1.0, None, partition="a", sequences=[4, 5])
    record.lives["producer-0-0"].calls.append(broken)
    record.killed.add("producer-0-0")
    record.live.add(4)


def keep_what_was_refused(record: Record) -> None:
    refused = told("producer-0-0", "put", 4.0, "CapacityExceeded", 1.1, partition="a", sequences=[4, 5])
    record.lives["producer-0-0"].calls.append(refused)
    record.live.update({4, 5})


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


def tear_a_group(record: Record) -> None:
    draw_of(record, "look").facts["keys"] = ["0", "2", "1", "3"]


def draw_a_sample_twice(record: Record) -> None:
    draw_of(record, "score").facts["keys"].append("3")


def shorten_a_slice(record: Record) -> None:
    draw_of(record, "train").facts["keys"].pop()


def change_a_slice(record: Record) -> None:
    again = draw("trainer-0-0", "train", 2.2, 9, keys=["4", "5", "6", "7"])
    record.lives["trainer-0-0"].calls.insert(1, again)


def give_a_slice_to_two_ranks(record: Record) -> None:
    record.lives["trainer-1-0"] = Life("trainer-1-0", [draw("trainer-1-0", "train", 2.0, 9)])


def grant_a_token_twice(record: Record) -> None:
    record.lives["looker-1-0"] = Life("looker-1-0", [draw("looker-1-0", "look", 2.0, 2)])


def deliver_again_under_the_first_number(record: Record) -> None:
    excused_by_expiry(record)
    del looker(record)[-3].facts["deliveries"]


def consume_without_acknowledgement(record: Record) -> None:
    account(record)["leases"] = {"granted": 4, "acked": 3, "expired": 1, "open": 0}


def count_an_acknowledgement_twice(record: Record) -> None:
    looker(record).append(ack("looker-0-0", "look", 3.5, 2))


def give_back_what_nobody_gave_back(record: Record) -> None:
    account(record)["leases"] = {"granted": 8, "acked": 4, "released": 4, "open": 0}


def lose_a_block_without_a_fault(record: Record) -> None:
    lost = told("producer-0-0", "put", 4.0, "BlockLost", 1.1, partition="a", sequences=[4, 5])
    record.lives["producer-0-0"].calls.append(lost)


def lose_a_block_before_the_deadline(record: Record) -> None:
    lose_a_block_without_a_fault(record)
    record.lives["producer-0-0"].calls[-1].timeout_s = 20.0
    record.disturbances.append(Disturbance("kill unit", 3.0, 4.5))


def keep_what_was_lost(record: Record) -> None:
    excused_by_a_lost_block(record)
    record.live.update({4, 5})


def leave_an_outcome_open(record: Record) -> None:
    excused_by_a_proxy(record)
    looker(record)[-1].again = [told("looker-0-0", "draw", 2.0, "ConnectionLost")] * 4


def break_off_an_acknowledgement_though_a_unit_died(record: Record) -> None:
    record.disturbances.append(Disturbance("kill unit", 2.0, 3.5, BY_NAME["kill unit"].allows))
    looker(record)[2].outcome = "ConnectionLost"


def end_a_lease_early_before_a_proxy_meddles(record: Record) -> None:
    end_a_lease_early(record)
    record.proxied.add("looker-0-0")
    record.disturbances.append(dataclasses.replace(LOST, began=4.0, ended=5.0))


def bring_back_what_was_cleared(record: Record) -> None:
    record.live.add(1)


def draw_what_was_cleared(record: Record) -> None:
    excused_by_expiry(record)
    record.lives["cleaner-0-0"].calls[0] = told("cleaner-0-0", "clear", 5.0, sequences=[0, 1, 2, 3], count=4)


def clear_a_sample_twice(record: Record) -> None:
    record.lives["cleaner-0-0"].calls.append(told("cleaner-0-0", "clear", 12.0, sequences=[1], count=1))


def drop_more_than_is_gone(record: Record) -> None:
    record.lives["cleaner-0-0"].calls.clear()
    record.live.update({2, 3})


WRONG: tuple[tuple[Doctor, str], ...] = (
    (lose_a_sample, "sample 2 was put and never seen again"),
    (drop_for_a_reason, "partition a has lost samples"),
    (consume_twice, "task look consumed sample 1 under leases"),
    (consume_twice, "task look got sample 1 again after it was consumed"),
    (deliver_what_is_leased, "task look got sample 1 while it was leased"),
    (deliver_before_the_holder_was_killed, "task look got sample 1 while it was leased"),
    (count_no_duplicate, "4 deliveries ran out, and 0 are counted as delivered again"),
    (expire_what_was_settled, "4 deliveries ran out, and only 0 were not settled by their holders"),
    (grant_less_than_was_delivered, "4 samples were delivered under leases, and only 1 granted"),
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
    (put_in_part, "only [4] of a put that broke off are there"),
    (keep_what_was_refused, "sample 4 is there, which was refused"),
    (unbalance, "partition a, task look: the accounts are wrong"),
    (unbalance_leases, "partition a, task look: the accounts are wrong"),
    (forget_a_partition, "partition a is gone, though nobody removed it"),
    (miscount_bytes, "unit-0: its bytes do not add up"),
    (keep_bytes, "unit-0: 4096 bytes did not come back"),
    (leave_a_folder, "left behind: /dev/shm/tq-0-123"),
    (crash, "a process of the workload crashed"),
    (tear_a_group, "a draw returned groups that are not whole"),
    (draw_a_sample_twice, "a draw returned a sample more than once"),
    (shorten_a_slice, "a rank got 3 samples for"),
    (change_a_slice, "rank 0 got ['4', '5', '6', '7'] for"),
    (give_a_slice_to_two_ranks, "samples ['0', '1', '2', '3'] went to several ranks"),
    (grant_a_token_twice, "task look: lease 2 was granted twice"),
    (deliver_again_under_the_first_number, "task look: the deliveries of sample 0 have numbers [1, 1]"),
    (consume_without_acknowledgement, "task look: 4 samples are consumed, and 3 were acknowledged"),
    (count_an_acknowledgement_twice, "task look: acknowledgements counted 8 samples, and 4 are consumed"),
    (give_back_what_nobody_gave_back, "task look: 4 samples count as given back, and their holders gave back 0"),
    (lose_a_block_without_a_fault, "a call ended as it must not"),
    (lose_a_block_before_the_deadline, "a call ended as it must not"),
    (keep_what_was_lost, "sample 4 is there, which was refused"),
    (leave_an_outcome_open, "the outcome of a call stayed open, 4 times asked for"),
    (break_off_an_acknowledgement_though_a_unit_died, "a call ended as it must not"),
    (bring_back_what_was_cleared, "sample 1 was cleared and is there"),
    (draw_what_was_cleared, "samples ['0', '1', '2', '3'] were cleared before this draw was asked for"),
    (clear_a_sample_twice, "5 samples were cleared, of 4 that were put, and 0 are there"),
    (drop_more_than_is_gone, "4 samples count as dropped, of 4 that were put, and 2 are there"),
    (end_a_lease_early_before_a_proxy_meddles, "a lease ended 1.10 s after it was asked for"),
)
"""What is done to the log, and what the judge says of it."""


# ---------------------------------------------------------------- what a fault explains


def excused_by_full_disk(record: Record) -> None:
    record.disturbances.append(FULL_DISK)
    looker(record).append(told("looker-0-0", "draw", 2.0, "CapacityExceeded", task="look", partition="a"))


def excused_by_a_proxy(record: Record) -> None:
    record.disturbances, record.stopped = [LOST], {"looker-0-0": 5.0}  # stopped at another time
    record.proxied.add("looker-0-0")
    looker(record).append(told("looker-0-0", "draw", 2.0, "ConnectionLost", task="look", partition="a"))


def excused_by_being_stopped(record: Record) -> None:
    record.disturbances.append(Disturbance("zombie", 0.0, 6.0, whom=STOPPED))
    record.stopped["looker-0-0"] = 5.0
    looker(record).append(told("looker-0-0", "draw", 4.0, "ConnectionLost", 5.0, task="look", partition="a"))


def excused_by_expiry(record: Record) -> None:
    """The lease runs out, the sample goes to the next one, and both are counted."""
    count_no_duplicate(record)
    account(record)["redelivered"] = 4
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


def excused_by_a_lost_block(record: Record) -> None:
    """A unit loses what a put stored until the deadline of the put: it ends, and nothing of it is there."""
    lose_a_block_without_a_fault(record)
    record.disturbances.append(Disturbance("kill unit", 3.0, 4.5))


def excused_by_a_broken_connection(record: Record) -> None:
    """A lease ends with the connection of its holder, which a proxy broke."""
    end_a_lease_early(record)
    looker(record).extend([draw("looker-0-0", "look", 4.0, 9, deliveries=[2] * 4), ack("looker-0-0", "look", 4.5, 9)])
    account(record).update(leases={"granted": 8, "acked": 4, "expired": 4, "open": 0}, redelivered=4)
    record.proxied.add("looker-0-0")
    record.disturbances.append(LOST)


def excused_by_asking_again(record: Record) -> None:
    """What a call that broke off had been granted runs out; asked again, it is granted anew."""
    looker(record)[0].outcome, looker(record)[0].again = "ConnectionLost", [draw("looker-0-0", "look", 2.2, 2)]
    expire_what_was_settled(record)
    record.disturbances.append(dataclasses.replace(LOST, whom=""))


def excused_by_the_same_slice(record: Record) -> None:
    """The next life of a rank gets the slice that the one before it had."""
    again = draw("trainer-0-1", "train", 2.3, 3, replayed=True)
    record.lives["trainer-0-1"] = Life("trainer-0-1", [again], [{"note": "start", "lease_s": LEASE_S}])


def excused_by_waiting(record: Record) -> None:
    looker(record).append(told("looker-0-0", "draw", 4.0, "GetMetaTimeout", 1.0, task="look", partition="a"))


EXPLAINED: tuple[Doctor, ...] = (
    excused_by_full_disk,
    excused_by_a_proxy,
    excused_by_being_stopped,
    excused_by_expiry,
    excused_by_death,
    excused_by_a_restart,
    excused_by_a_lost_block,
    excused_by_a_broken_connection,
    excused_by_asking_again,
    excused_by_the_same_slice,
    excused_by_waiting,
)
