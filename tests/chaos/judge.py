"""Compares what the processes were told with what the queue says of itself at the end.

The rules hold whatever was injected. Each exception from them is tied to the fault that explains it, and to its time.
`python -m tests.chaos.judge FOLDER…` judges again the rounds whose evidence was kept.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos.draw_rules import clears, counted, grants, groups, slices
from tests.chaos.endings import endings
from tests.chaos.lease_rules import consumption, deliveries, duplicates, lease_ends
from tests.chaos.record import Record
from tests.chaos.roles import PARTITIONS, TASKS
from tests.chaos.sidelog import OK, Told

_MOST_SHOWN = 50


@dataclass
class Verdict:
    """`violations` are sentences with what was told to whom; `counts` sum up the run."""

    violations: list[str]
    counts: dict[str, int]


def judge(record: Record) -> Verdict:
    """Check a run."""
    violations = [violation for rule in _RULES for violation in rule(record)]
    if len(violations) > _MOST_SHOWN:
        violations[_MOST_SHOWN:] = [f"and {len(violations) - _MOST_SHOWN} more"]
    return Verdict(violations, _counts(record))


def _leftovers(record: Record) -> Iterator[str]:
    yield from (f"a process of the workload crashed: {text}" for text in record.crashed)
    yield from (f"left behind: {what}" for what in record.left)


def _contents(record: Record) -> Iterator[str]:
    for life in record.lives.values():
        for note in life.notes:
            if note["note"] == "damaged":
                yield f"{life.name} read other bytes than were put: {note}"
            if note["note"] == "not drained":
                yield f"not everything was consumed in the end: {note['task']} of {note['partition']}: {note['why']}"
            if note["note"] == "violated":
                yield f"{life.name}: {note['why']}"


def _accounts(record: Record) -> Iterator[str]:
    """The identities hold, and everything was consumed."""
    for partition in PARTITIONS:
        found = record.audit["partitions"].get(partition)
        if found is None:
            if any(call.facts["partition"] == partition and call.last.outcome == OK for call in record.calls("put")):
                yield f"partition {partition} is gone, though nobody removed it"
            continue
        if set(found["dropped"]) - {"cleared"} or found["lost"] or found["quarantined"]:
            yield f"partition {partition} has lost samples: {found}"
        for task in TASKS:
            account = found["tasks"].get(task)
            if account is None:
                yield f"partition {partition}: task {task} never drew, of {found['inserted']} samples"
            elif not _adds_up(account) or not _is_settled(account, found["inserted"]):
                yield f"partition {partition}, task {task}: the accounts are wrong: {account}"


def _adds_up(account: dict[str, Any]) -> bool:
    """The identities of samples and of leases, reckoned here and not believed."""
    parts = account["pending"] + account["reserved"] + account["consumed"] + sum(account["dropped"].values())
    leases = dict(account.get("leases", {"granted": 0}))
    return (
        bool(account["balanced"]) and parts == account["inserted"] and leases.pop("granted") == sum(leases.values())
    )  # fmt: skip


def _is_settled(account: dict[str, Any], inserted: int) -> bool:
    """Whether all was consumed and nothing is held."""
    held = account["pending"] + account["reserved"] + account.get("leases", {}).get("open", 0)
    return bool(account["consumed"] == inserted == account["inserted"] and not held)


def _bytes(record: Record) -> Iterator[str]:
    """The bytes of each unit are accounted for, within its limit; all come back when everything is cleared."""
    for name, found in record.units.items():
        parts = sum(found[f"bytes_{use}"] for use in ("live", "pinned", "reserved", "overhead", "free"))
        most = found["bytes_capacity"] + found.get("bytes_disk_capacity", 0)
        if parts != found["bytes_arenas"] or found["bytes_arenas"] > most:
            yield f"{name}: its bytes do not add up: {found}"
    for name, held in record.held.items():
        if held:
            yield f"{name}: {held} bytes did not come back when everything was cleared"


def _puts(record: Record) -> Iterator[str]:
    """What a put returned for is there; what it raised for is not; what broke off is whole or not at all."""
    seen = record.seen()
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
        yield f"sample {sequence} was put and never seen again: {record.story(sequence)}"
    for sequence in sorted(seen - done):
        known = "which was refused" if sequence in refused else "which nobody put"
        yield f"sample {sequence} is there, {known}: {record.story(sequence)}"
    inserted = sum(found["inserted"] for name, found in record.audit["partitions"].items() if name in PARTITIONS)
    if inserted != len(seen):
        yield f"the queue counts {inserted} samples, the processes have seen {len(seen)}"


_RULES: tuple[Callable[[Record], Iterator[str]], ...] = (
    *(_leftovers, endings, _contents, _accounts, _bytes, _puts),
    *(consumption, deliveries, duplicates, lease_ends),
    *(groups, slices, grants, counted, clears),
)


def _counts(record: Record) -> dict[str, int]:
    counts = {"samples": len(record.seen()), "calls": 0, "resent": 0}
    for life in record.lives.values():
        for call in life.calls:
            counts["calls"] += 1 + len(call.again)
            counts["resent"] += len(call.again)
            if call.last.outcome not in (OK, "GetMetaTimeout"):
                name = f"{call.op} {call.last.outcome or 'cut off'}"
                counts[name] = counts.get(name, 0) + 1
    for name, found in record.audit["partitions"].items():
        for account in found["tasks"].values() if name in PARTITIONS else ():
            counts["redelivered"] = counts.get("redelivered", 0) + account.get("redelivered", 0)
            counts["expired"] = counts.get("expired", 0) + account.get("leases", {}).get("expired", 0)
    return counts


def main(folders: list[str]) -> int:
    """Print what the rules find; return whether it is anything."""
    found = {folder: judge(Record.kept(Path(folder))).violations for folder in folders}
    for folder, violations in found.items():
        sys.stdout.write("\n  ".join([f"{folder}: {len(violations)} violations", *violations]) + "\n")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
