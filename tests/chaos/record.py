"""What a round leaves for the judge: what everybody was told, what was done to whom, what the queue says of itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.sidelog import Life, Told, read_all

STOPPED, PROXIED = "stopped", "proxied"

_FILE = "record.json"
_AFTERWARDS_S = 5.0  # a client may need this long to find its way back to a server that is well again


@dataclass(frozen=True)
class Disturbance:
    """A fault, between two moments of `time.monotonic`, and how calls may end that were under way in this time.

    allows  (operation, outcome)
    whom    the lives that it can reach: all (""), those that were STOPPED, or those that are PROXIED
    """

    fault: str
    began: float
    ended: float
    allows: frozenset[tuple[str, str]] = frozenset()
    whom: str = ""

    def as_plain(self) -> dict[str, Any]:
        return vars(self) | {"allows": sorted(self.allows)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Disturbance:
        return cls(**plain | {"allows": frozenset((op, outcome) for op, outcome in plain["allows"])})

    def meets(self, call: Told) -> bool:
        """Whether the call was under way while the fault lasted, or a moment after it."""
        return call.began <= self.ended + _AFTERWARDS_S and (call.ended or call.began) >= self.began


@dataclass
class Record:
    """Everything the judge looks at.

    lives          by name, from the side logs
    killed         names of lives that were killed
    stopped        seconds that a life was stopped, by name
    audit          of the queue, after all samples were drained
    live           sequence numbers of the samples that are still there
    left           what the session left behind
    crashed        tracebacks of processes of the workload
    proxied        names of lives whose messages were meddled with
    disturbances   what was done, and when
    units          how each unit uses its bytes, by name, after everything was drained
    held           bytes that units did not get back though everything was cleared, by name
    """

    lives: dict[str, Life]
    killed: set[str]
    stopped: dict[str, float]
    audit: dict[str, Any]
    live: set[int]
    left: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    proxied: set[str] = field(default_factory=set)
    disturbances: list[Disturbance] = field(default_factory=list)
    units: dict[str, dict[str, int]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)

    def keep(self, folder: Path) -> None:
        """Write beside the side logs what is not in them."""
        plain = {name: sorted(value) if isinstance(value, set) else value for name, value in vars(self).items()}
        del plain["lives"]
        plain["disturbances"] = [one.as_plain() for one in self.disturbances]
        (folder / _FILE).write_text(json.dumps(plain))

    @classmethod
    def kept(cls, folder: Path) -> Record:
        """That of a round whose evidence is in this folder."""
        plain = json.loads((folder / _FILE).read_text())
        plain |= {name: set(plain[name]) for name in ("killed", "live", "proxied")}
        plain["disturbances"] = [Disturbance.from_plain(one) for one in plain["disturbances"]]
        return cls(read_all(folder), **plain)

    def calls(self, *ops: str) -> Iterator[Told]:
        """All calls of these operations, without their repetitions."""
        for life in self.lives.values():
            yield from (call for call in life.calls if call.op in ops)

    def reaches(self, disturbance: Disturbance, life: str) -> bool:
        """Whether a fault can have met this life."""
        return {"": True, STOPPED: life in self.stopped, PROXIED: life in self.proxied}[disturbance.whom]

    def meddled(self, life: str, until: float) -> bool:
        """Whether a proxy may have broken a connection of this life by then, unseen and for long."""
        began = (one.began for one in self.disturbances if one.whom == PROXIED)
        return life in self.proxied and any(at <= until for at in began)

    def seen(self) -> set[int]:
        """Sequence numbers of samples that any draw returned, or that are there."""
        drawn = {int(key) for call in self.calls("draw") for key in call.get("keys") or ()}
        return drawn | self.live

    def story(self, sequence: int) -> str:
        """All that anyone was told about a sample, in order of time."""
        told = []
        for life in self.lives.values():
            for call in life.calls:
                if sequence in call.facts.get("sequences", ()) or str(sequence) in (call.get("keys") or ()):
                    token = call.get("token")
                    lease = f" lease {token}" if token is not None else ""
                    told.append((call.began, f"{call.began:.3f} {life.name} {call.op}{lease}: {call.last.outcome}"))
        return "; ".join(text for _, text in sorted(told))
