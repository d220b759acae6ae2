"""The log of a run that was right, and what its parts are made of."""

from __future__ import annotations

import copy
from typing import Any

from tests.chaos.record import PROXIED, Disturbance, Record
from tests.chaos.roles import TASKS
from tests.chaos.sidelog import Life, Told

LEASE_S = 4.0
SEQUENCES = [0, 1, 2, 3]  # two groups, and the slice of one rank
ACCOUNT = {
    "inserted": 4,
    "pending": 0,
    "reserved": 0,
    "consumed": 4,
    "dropped": {},
    "leases": {"granted": 4, "acked": 4, "open": 0},
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
    """All samples."""
    facts = {"keys": [str(sequence) for sequence in SEQUENCES], "group": "step-0", **more}
    return told(life, "draw", at_s, task=task, partition="a", token=token, **facts)


def ack(life: str, task: str, at_s: float, token: int, outcome: str = "ok") -> Told:
    return told(life, "ack", at_s, outcome, task=task, token=token, sequences=SEQUENCES, count=4)


def right() -> Record:
    """Four samples are put, drawn for each task under leases 1 to 3, acknowledged and cleared."""
    lives = {
        name: Life(name, notes=[{"note": "start", "lease_s": LEASE_S}]) for name in ("producer-0-0", "cleaner-0-0")
    }
    lives["producer-0-0"].calls.append(told("producer-0-0", "put", 1.0, partition="a", sequences=SEQUENCES))
    for token, task in enumerate(TASKS, 1):
        name = f"{task}er-0-0"
        calls = [draw(name, task, 2.0, token), told(name, "read", 2.5, token=token), ack(name, task, 3.0, token)]
        lives[name] = Life(name, calls, [{"note": "start", "lease_s": LEASE_S}])
    lives["cleaner-0-0"].calls.append(told("cleaner-0-0", "clear", 10.0, sequences=SEQUENCES, count=4))
    tasks = {task: copy.deepcopy(ACCOUNT) for task in TASKS}
    found = {"inserted": 4, "dropped": {"cleared": 4}, "lost": {}, "quarantined": [], "tasks": tasks}
    audit = {"partitions": {"a": found}}
    return Record(lives, set(), {}, audit, set(), units={"unit-0": dict(FIGURES)}, held={"unit-0": 0})


def looker(record: Record) -> list[Told]:
    return record.lives["looker-0-0"].calls


def account(record: Record, task: str = "look") -> dict[str, Any]:
    found: dict[str, Any] = record.audit["partitions"]["a"]["tasks"][task]
    return found


def draw_of(record: Record, task: str) -> Told:
    return record.lives[f"{task}er-0-0"].calls[0]
