"""What must be true of deliveries and leases: who got a sample when, under which token, and how that ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from tests.chaos.endings import BROKEN
from tests.chaos.record import Record
from tests.chaos.roles import MOST_ROWS, PARTITIONS, TASKS
from tests.chaos.sidelog import OK, Life, Told

_LATE_S = 0.5  # between the moment when a draw is granted and that when its answer is written down
_RESTARTS = ("kill controller", "kill controller at a step", "SIGTERM controller", "janitor beside a dead controller")
_UNKNOWN = (None, "ConnectionLost")  # the call may have taken effect


def consumption(record: Record) -> Iterator[str]:
    """Every sample is acknowledged for every task, under one lease only."""
    seen = record.seen()
    for task in TASKS:
        under: dict[int, set[int]] = defaultdict(set)
        maybe: set[int] = set()
        for call in _of_task(record, task, "ack"):
            if call.last.outcome == OK:
                for sequence in call.facts["sequences"]:
                    under[sequence].add(call.facts["token"])
            elif call.last.outcome in _UNKNOWN:
                # Its caller was killed or gave up, so nobody knows; the accounts tell whether it is consumed.
                maybe.update(call.facts["sequences"])
        for sequence, tokens in under.items():
            if len(tokens) > 1:
                yield f"task {task} consumed sample {sequence} under leases {tokens}: {record.story(sequence)}"
        for sequence in sorted(seen - set(under) - maybe):
            yield f"nobody acknowledged sample {sequence} for task {task}: {record.story(sequence)}"


def deliveries(record: Record) -> Iterator[str]:
    """A sample goes to the next one only when the lease of the last one is over; never after it was consumed."""
    for task in TASKS:
        done = {call.facts["token"] for call in _of_task(record, task, "ack") if call.last.outcome == OK}
        given_back = {call.facts["token"] for call in _of_task(record, task, "release")
                      if call.last.outcome in (OK, *_UNKNOWN)}  # fmt: skip
        by_sample: dict[str, dict[int, Told]] = defaultdict(dict)
        for call in _of_task(record, task, "draw"):
            if call.last.outcome == OK and not call.get("replayed"):  # else a rank that got its slice again
                for key in call.get("keys"):
                    by_sample[key][call.get("token")] = call
        for key, by_token in by_sample.items():
            for (token, first), (_, second) in pairwise(sorted(by_token.items())):  # tokens rise with each grant
                if token in done:
                    yield f"task {task} got sample {key} again after it was consumed: {record.story(int(key))}"
                elif token not in given_back and not _was_over(record, first, second):
                    yield f"task {task} got sample {key} while it was leased: {record.story(int(key))}"


def _was_over(record: Record, first: Told, second: Told) -> bool:
    """Whether the lease of the first draw, that nobody settled, can have been over when the second was answered."""
    holder, answered = record.lives[first.life], second.last.ended or 0.0
    if record.meddled(first.life, answered):
        return True  # a lease ends with the connection of its holder
    if first.life in record.killed and holder.calls[-1].began <= answered:
        return True  # a lease ends at once with its holder, who made no call after this
    return bool(answered >= first.began + holder.notes[0]["lease_s"])


def duplicates(record: Record) -> Iterator[str]:
    """What ran out is what holders did not settle, and nothing was delivered more often than leases were granted."""
    for task in TASKS:
        draws = list(_of_task(record, task, "draw"))
        settled = {call.facts["token"] for call in _of_task(record, task, "ack", "release") if call.last.outcome == OK}
        leases = {(call.get("partition"), call.get("token")): call for call in draws if call.last.outcome == OK}
        excused = sum(len(call.get("keys")) for (_, token), call in leases.items() if token not in settled)
        # What nobody got the answer of may have been granted, how many samples nobody knows; and so may its repetition.
        attempts = [attempt for call in draws for attempt in (call, *call.again)]
        excused += MOST_ROWS * sum(attempt.outcome in (None, *BROKEN) for attempt in attempts)
        delivered = sum(len(call.get("keys")) for call in leases.values())
        accounts = [found["tasks"].get(task, {}) for name, found in record.audit["partitions"].items()
                    if name in PARTITIONS]  # fmt: skip
        granted, expired = (
            sum(each.get("leases", {}).get(what, 0) for each in accounts) for what in ("granted", "expired")
        )
        again = sum(each.get("redelivered", 0) for each in accounts)
        if expired > excused:
            yield f"task {task}: {expired} deliveries ran out, and only {excused} were not settled by their holders"
        if again != expired:  # everything was consumed in the end, so what ran out was delivered again
            yield f"task {task}: {expired} deliveries ran out, and {again} are counted as delivered again"
        if delivered > granted:
            yield f"task {task}: {delivered} samples were delivered under leases, and only {granted} granted"


def lease_ends(record: Record) -> Iterator[str]:
    """No lease ends before its time while its holder is there, none outlives it, none loses its rows."""
    for life in record.lives.values():
        drawn = {call.get("token"): call for call in life.calls if call.op == "draw" and call.last.outcome == OK}
        gone = {call.facts["token"]: call for call in life.calls if call.outcome == "StaleSampleError"
                and call.op == "read"}  # fmt: skip
        for call in life.calls:
            if call.op in ("ack", "release", "score"):
                yield from _end(record, life, call, drawn.get(call.facts["token"]), gone.get(call.facts["token"]))


def _end(record: Record, life: Life, call: Told, draw: Told | None, gone: Told | None) -> Iterator[str]:
    lease_s = life.notes[0]["lease_s"]
    if call.last.outcome == OK and call.op == "ack" and gone is not None and call.get("count"):
        # With a count of 0 it is a rank that started again: its earlier life acknowledged it, and it was cleared since.
        yield f"rows were gone under a lease that was good: {gone}"
    if draw is None:
        return
    if call.last.outcome == "LeaseExpired" and not draw.get("replayed"):
        # Not for a slice that a rank got again under the lease that an earlier life of it had. A lease also ends with
        # the connection of its holder.
        ended = call.last.ended or 0.0
        held_s = ended - draw.began
        if held_s < lease_s and not record.meddled(life.name, ended):
            yield f"a lease ended {held_s:.2f} s after it was asked for: {call} drawn by {draw}"
    late_s = call.began - _counted_from(record, draw, call) - lease_s
    if call.last.outcome == OK and late_s > _LATE_S and call.get("count", 1):
        # With a count of 0 nothing was done: all of it had been acknowledged before.
        yield f"a lease was good {late_s:.2f} s after its time: {call} drawn by {draw}"


def _counted_from(record: Record, draw: Told, call: Told) -> float:
    """When the lease began at the latest: a controller that is started again lets all leases last anew from then on."""
    drawn = draw.last.ended or call.began
    restarts = (one.ended for one in record.disturbances if one.fault in _RESTARTS and drawn <= one.ended <= call.began)
    return max(restarts, default=drawn)


def _of_task(record: Record, task: str, *ops: str) -> Iterator[Told]:
    yield from (call for call in record.calls(*ops) if call.facts["task"] == task)
