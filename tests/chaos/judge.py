"""Compares what the processes were told with what the queue says of itself at the end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.caller import NOTHING_OPEN
from tests.chaos.roles import MOST_ROWS, PARTITIONS, TASKS
from tests.chaos.sidelog import OK, Life, Told

SLACK_S = 20.0  # beside the deadline of a call: four ways to a server and back at 5 s each
_MOST_SHOWN = 50
_BROKEN = ("ConnectionLost", "DeadlineExceeded", NOTHING_OPEN)
_ALLOWED = {
    "put": (OK, "CapacityExceeded", *_BROKEN),
    "score": (OK, "CapacityExceeded", "LeaseExpired", *_BROKEN),
    "draw": (OK, "GetMetaTimeout", *_BROKEN),
    "read": (OK, "StaleSampleError", *_BROKEN),  # then its lease is over, see `_early_ends`
    "ack": (OK, "LeaseExpired", *_BROKEN),
    "release": (OK, "LeaseExpired", *_BROKEN),
    "clear": (OK, "StaleSampleError", *_BROKEN),
    "status": (OK, *_BROKEN),
}


@dataclass
class Record:
    """Everything the judge looks at.

    lives    by name, from the side logs
    killed   names of lives that were killed
    stopped  seconds that a life was stopped, by name
    audit    of the queue, after all samples were drained
    live     sequence numbers of the samples that are still there
    left     what the session left behind
    crashed  tracebacks of processes of the workload
    proxied  names of lives whose messages were meddled with
    full_disk  the journal could not grow for a while, so that draws too were refused
    """

    lives: dict[str, Life]
    killed: set[str]
    stopped: dict[str, float]
    audit: dict[str, Any]
    live: set[int]
    left: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    proxied: set[str] = field(default_factory=set)
    full_disk: bool = False

    def calls(self, *ops: str) -> Iterator[Told]:
        for life in self.lives.values():
            yield from (call for call in life.calls if call.op in ops)


@dataclass
class Verdict:
    """`violations` are sentences with what was told to whom; `counts` sum up the run."""

    violations: list[str]
    counts: dict[str, int]


def judge(record: Record) -> Verdict:
    """Check a run; the rules below hold in every run, whatever was injected."""
    rules = (_crashes, _endings, _contents, _accounts, _puts, _consumption, _duplicates, _early_ends)
    violations = [violation for rule in rules for violation in rule(record)]
    if len(violations) > _MOST_SHOWN:
        violations[_MOST_SHOWN:] = [f"and {len(violations) - _MOST_SHOWN} more"]
    return Verdict(violations, _counts(record))


# ---------------------------------------------------------------- rules


def _crashes(record: Record) -> Iterator[str]:
    yield from (f"a process of the workload crashed: {text}" for text in record.crashed)
    yield from (f"left behind: {what}" for what in record.left)


def _endings(record: Record) -> Iterator[str]:
    """Every call ended, as it may end, before its deadline."""
    for life in record.lives.values():
        for first in life.calls:
            for call in (first, *first.again):
                if call.outcome is None:
                    if life.name not in record.killed:
                        yield f"a call never ended: {call}"
                    continue
                allowed = call.outcome in _ALLOWED.get(first.op, ()) or _of_a_rank(first)
                refused = record.full_disk and first.op == "draw" and call.outcome == "CapacityExceeded"
                if not allowed and not refused:
                    yield f"a call ended as it must not: {call}"
                assert call.ended is not None
                late_s = call.ended - call.began - call.timeout_s - record.stopped.get(life.name, 0.0)
                if late_s > SLACK_S:
                    yield f"a call ended {late_s:.1f} s after its deadline: {call}"


def _of_a_rank(call: Told) -> bool:
    """A rank that starts again learns in this way that its step is done and cleared."""
    return call.op == "draw" and call.get("task") == "train" and call.outcome == "StaleSampleError"


def _contents(record: Record) -> Iterator[str]:
    for life in record.lives.values():
        for note in life.notes:
            if note["note"] == "damaged":
                yield f"{life.name} read other bytes than were put: {note}"
            if note["note"] == "not drained":
                yield f"not everything was consumed in the end: {note['task']} of {note['partition']}: {note['why']}"


def _accounts(record: Record) -> Iterator[str]:
    """The identities hold, and everything was consumed."""
    for partition in PARTITIONS:
        found = record.audit["partitions"].get(partition)
        if found is None:
            continue
        if set(found["dropped"]) > {"cleared"} or found["lost"] or found["quarantined"]:
            yield f"partition {partition} has lost samples: {found}"
        for task in TASKS:
            account = found["tasks"].get(task)
            if account is None:
                yield f"partition {partition}: task {task} never drew, of {found['inserted']} samples"
                continue
            still_held = account.get("leases", {}).get("open", 0)
            settled = account["consumed"] == found["inserted"] == account["inserted"]
            if not account["balanced"] or not settled or account["pending"] or account["reserved"] or still_held:
                yield f"partition {partition}, task {task}: the accounts are wrong: {account}"


def _puts(record: Record) -> Iterator[str]:
    """What a put returned for is there; what it raised for is not; what broke off is whole or not at all."""
    seen = _seen(record)
    done, unsure = set[int](), list[Told]()
    refused = set[int]()
    for call in record.calls("put"):
        sequences = call.facts["sequences"]
        if call.last.outcome == OK:
            done.update(sequences)
        elif call.last.outcome in (None, "ConnectionLost"):
            unsure.append(call)
        else:
            refused.update(sequences)
    for call in unsure:
        there = [sequence for sequence in call.facts["sequences"] if sequence in seen]
        if there and len(there) < len(call.facts["sequences"]):
            yield f"only {there} of a put that broke off are there: {call}"
        done.update(there)
    for sequence in sorted(done - seen):
        yield f"sample {sequence} was put and never seen again: {_story(record, sequence)}"
    for sequence in sorted(seen - done):
        known = "which was refused" if sequence in refused else "which nobody put"
        yield f"sample {sequence} is there, {known}: {_story(record, sequence)}"
    inserted = sum(found["inserted"] for name, found in record.audit["partitions"].items() if name in PARTITIONS)
    if inserted != len(seen):
        yield f"the queue counts {inserted} samples, the processes have seen {len(seen)}"


def _consumption(record: Record) -> Iterator[str]:
    """Every sample is acknowledged for every task, under one lease only."""
    seen = _seen(record)
    for task in TASKS:
        under: dict[int, set[int]] = defaultdict(set)
        maybe: set[int] = set()
        for call in record.calls("ack"):
            if call.facts["task"] == task:
                if call.last.outcome == OK:
                    for sequence in call.facts["sequences"]:
                        under[sequence].add(call.facts["token"])
                elif call.last.outcome in (None, "ConnectionLost"):
                    maybe.update(call.facts["sequences"])
        for sequence, tokens in under.items():
            if len(tokens) > 1:
                yield f"task {task} consumed sample {sequence} under leases {tokens}: {_story(record, sequence)}"
        for sequence in sorted(seen - set(under) - maybe):
            yield f"nobody acknowledged sample {sequence} for task {task}: {_story(record, sequence)}"


def _duplicates(record: Record) -> Iterator[str]:
    """What ran out is what holders did not settle, and nothing was delivered more often than leases were granted."""
    for task in TASKS:
        draws = [call for call in record.calls("draw") if call.facts["task"] == task]
        settled = {
            call.facts["token"]
            for call in record.calls("ack", "release")
            if call.facts["task"] == task and call.last.outcome == OK
        }
        leases = {(call.get("partition"), call.get("token")): call for call in draws if call.last.outcome == OK}
        excused = sum(len(call.get("keys")) for (_, token), call in leases.items() if token not in settled)
        excused += MOST_ROWS * sum(call.last.outcome in (None, *_BROKEN) for call in draws)
        delivered = sum(len(call.get("keys")) for call in leases.values())
        accounts = [found["tasks"].get(task, {}) for name, found in record.audit["partitions"].items()]
        granted, expired = (sum(each.get("leases", {}).get(what, 0) for each in accounts) for what in _COUNTERS)
        if expired > excused:
            yield f"task {task}: {expired} deliveries ran out, and only {excused} were not settled by their holders"
        if delivered > granted:
            yield f"task {task}: {delivered} samples were delivered under leases, and only {granted} granted"


_COUNTERS = ("granted", "expired")


def _early_ends(record: Record) -> Iterator[str]:
    """No lease ends before its time while its holder is there; no sample is cleared under a lease."""
    for life in record.lives.values():
        drawn = {call.get("token"): call for call in life.calls if call.op == "draw" and call.last.outcome == OK}
        gone = {call.facts["token"]: call for call in life.calls if call.outcome == "StaleSampleError"
                and call.op == "read"}  # fmt: skip
        for call in life.calls:
            if call.op not in ("ack", "release", "score"):
                continue
            draw = drawn.get(call.facts["token"])
            if call.op == "ack" and call.last.outcome == OK and call.facts["token"] in gone and not call.get("count"):
                continue  # a rank that started again: its earlier life acknowledged it, and it was cleared since
            if call.op == "ack" and call.last.outcome == OK and call.facts["token"] in gone:
                yield f"rows were gone under a lease that was good: {gone[call.facts['token']]}"
            if call.last.outcome == "LeaseExpired" and draw is not None and life.name not in record.proxied:
                held_s = (call.last.ended or 0.0) - draw.began
                if held_s < life.notes[0]["lease_s"] and not draw.get("replayed"):
                    yield f"a lease ended {held_s:.2f} s after it was asked for: {call} drawn by {draw}"


# ---------------------------------------------------------------- what was seen


def _seen(record: Record) -> set[int]:
    """Sequence numbers of samples that any draw returned, or that are there."""
    drawn = {int(key) for call in record.calls("draw") for key in call.get("keys") or ()}
    return drawn | record.live


def _story(record: Record, sequence: int) -> str:
    """All that anyone was told about a sample, in order of time."""
    told = []
    for life in record.lives.values():
        for call in life.calls:
            if sequence in call.facts.get("sequences", ()) or str(sequence) in (call.get("keys") or ()):
                token = call.get("token")
                lease = f" lease {token}" if token is not None else ""
                told.append((call.began, f"{call.began:.3f} {life.name} {call.op}{lease}: {call.last.outcome}"))
    return "; ".join(text for _, text in sorted(told))


def _counts(record: Record) -> dict[str, int]:
    counts = {"samples": len(_seen(record)), "calls": 0, "resent": 0}
    for life in record.lives.values():
        for call in life.calls:
            counts["calls"] += 1 + len(call.again)
            counts["resent"] += len(call.again)
            if call.last.outcome not in (OK, "GetMetaTimeout"):
                name = f"{call.op} {call.last.outcome or 'cut off'}"
                counts[name] = counts.get(name, 0) + 1
    for found in record.audit["partitions"].values():
        for account in found["tasks"].values():
            counts["redelivered"] = counts.get("redelivered", 0) + account.get("redelivered", 0)
            counts["expired"] = counts.get("expired", 0) + account.get("leases", {}).get("expired", 0)
    return counts
