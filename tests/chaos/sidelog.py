"""What a process was told, line by line in a file that outlives it.

Each call is two lines: `begin` before it and `end` with its outcome after it. A call that was sent again under its
request id is a call of its own that names the first one in `of`. Times are those of `time.monotonic`, which all
processes of a host share.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

OK = "ok"


class SideLog:
    """Appends events to a file of this process; every line is one write, so a kill can only cut the last one.

    Several threads may write at once.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._numbers = itertools.count(1)

    def begin(self, op: str, timeout_s: float, **facts: Any) -> int:
        """Note that a call is made; return its number."""
        number = next(self._numbers)
        self._write({"call": number, "op": op, "began": time.monotonic(), "timeout_s": timeout_s, **facts})
        return number

    def end(self, call: int, outcome: str, **facts: Any) -> None:
        self._write({"call": call, "outcome": outcome, "ended": time.monotonic(), **facts})

    def note(self, what: str, **facts: Any) -> None:
        self._write({"note": what, "at": time.monotonic(), **facts})

    def close(self) -> None:
        os.close(self._descriptor)

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        while line:
            line = line[os.write(self._descriptor, line) :]


@dataclass
class Told:
    """One call as the log has it. `outcome` is None if it never ended; `again` are the calls that repeated it."""

    life: str
    op: str
    began: float
    timeout_s: float
    facts: dict[str, Any]
    outcome: str | None = None
    ended: float | None = None
    again: list[Told] = field(default_factory=list)

    @property
    def last(self) -> Told:
        """The attempt whose outcome counts."""
        return self.again[-1] if self.again else self

    def get(self, name: str, default: Any = None) -> Any:
        """What the call was made with, or what came of it."""
        return self.last.facts.get(name, self.facts.get(name, default))

    def __str__(self) -> str:
        took = "never ended" if self.ended is None else f"{self.ended - self.began:.2f} s"
        return f"{self.life} {self.op} {self.outcome or 'open'} ({took}) {json.dumps(self.facts)[:300]}"


@dataclass
class Life:
    """All that one process was told."""

    name: str
    calls: list[Told] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)

    @property
    def role(self) -> str:
        return self.name.split("-")[0]


def read_life(path: Path) -> Life:
    """Read a log; the last line may be cut."""
    life = Life(path.stem)
    by_number: dict[int, Told] = {}
    for event in _events(path):
        if "note" in event:
            life.notes.append(event)
        elif "op" in event:
            number = event.pop("call")
            told = Told(life.name, event.pop("op"), event.pop("began"), event.pop("timeout_s"), event)
            by_number[number] = told
            first = by_number.get(event.get("of", 0))
            (life.calls if first is None else first.again).append(told)
        else:
            told = by_number[event.pop("call")]
            told.outcome, told.ended = event.pop("outcome"), event.pop("ended")
            told.facts = told.facts | event
    return life


def read_all(folder: Path) -> dict[str, Life]:
    """All lives whose logs are in a folder, by name."""
    return {path.stem: read_life(path) for path in sorted(folder.glob("*.log"))}


def _events(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().split(b"\n"):
        if line:
            try:
                yield json.loads(line)
            except ValueError:
                return
