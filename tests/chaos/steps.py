"""Kill at every step: one process is killed at each journal and message boundary of one operation, in turn.

The n-th boundary of a kind is tried for n = 1, 2, … until the operation ends before it comes to that. After each kill
the operation was not done or was done once, and was done if that was acknowledged.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.chaos.actor import CLIENT_KINDS, FILE_KINDS
from tests.chaos.armed import KINDS
from tests.chaos.operations import DONE, OPERATIONS, Place, Violated, completed
from tests.chaos.queue_under_test import QueueUnderTest, wait_until
from tests.chaos.roles import Order
from tests.chaos.zygote import Zygote
from transfer_queue import TransferQueueClient
from transfer_queue.errors import TransferQueueError

VICTIMS = ("client", "controller", "unit-0")

_MOST_STEPS = 60
_CONF = {"backend": {"SimpleStorage": {"capacity_bytes": 64 << 20, "arena_bytes": 8 << 20}}}


@dataclass
class StepReport:
    """How many kills there were and what came of the operations; `violations` name seedless, exact steps."""

    kills: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # operation, victim, outcome
    violations: list[str] = field(default_factory=list)

    def as_plain(self) -> dict[str, Any]:
        rows = [{"operation": o, "victim": v, "outcome": w, "kills": n} for (o, v, w), n in sorted(self.kills.items())]
        return {"kills": rows, "violations": self.violations}


def every_step(
    zygote: Zygote, operations: list[str] | None = None, tell: Callable[[str], None] = lambda text: None
) -> StepReport:
    """All steps of all operations, of all three processes; `tell` gets progress in words."""
    pairs = [(name, victim) for name in operations or OPERATIONS for victim in VICTIMS]
    with Bench(zygote) as bench:
        for name, victim in pairs:
            before, bad = bench.report.kills.total(), len(bench.report.violations)
            for kind in _kinds(name, victim):
                for number in range(1, _MOST_STEPS):
                    if not bench.trial(name, victim, kind, number):
                        break
            kills, violations = bench.report.kills.total() - before, bench.report.violations[bad:]
            tell(f"{name}: {victim} killed at {kills} steps, {len(violations)} violations")
            for violation in violations:
                tell(f"  {violation}")
        return bench.report


def some_steps(zygote: Zygote, seed: int, seconds: float) -> StepReport:
    """Random ones of them, for so long."""
    deadline = time.monotonic() + seconds
    with Bench(zygote) as bench:
        for name, victim, kind, number in _random_steps(seed):
            bench.trial(name, victim, kind, number)
            if time.monotonic() > deadline:
                break
        return bench.report


def _random_steps(seed: int) -> Iterator[tuple[str, str, str, int]]:
    """Without end; each operation and victim in turn."""
    chance = random.Random(f"{seed} steps")
    pairs = [(name, victim) for name in OPERATIONS for victim in VICTIMS]
    while True:
        for name, victim in chance.sample(pairs, len(pairs)):
            yield name, victim, chance.choice(_kinds(name, victim)), chance.randint(1, 4)


def _kinds(name: str, victim: str) -> tuple[str, ...]:
    if victim != "client":
        return KINDS
    return CLIENT_KINDS + (FILE_KINDS if OPERATIONS[name].files else ())


class Bench:
    """One session in which trials are made one after the other."""

    def __init__(self, zygote: Zygote) -> None:
        self.report = StepReport()
        self._zygote = zygote
        self._trials = 0
        self._folder = TemporaryDirectory(prefix="tq-steps-")
        self._queue = QueueUnderTest(Path(self._folder.name), _CONF)
        self._live_bytes = self._bytes_live()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: Any, *exc_info: object) -> None:
        try:
            if kind is None:
                self._check_space()
        finally:
            left = self._queue.close()
            self._folder.cleanup()
        self.report.violations += [f"left behind: {what}" for what in left]

    def trial(self, name: str, victim: str, kind: str, number: int) -> bool:
        """Kill the victim at its `number`-th step of this kind in the operation; return whether it came to that."""
        self._trials += 1
        place = Place(f"{name}-{self._trials}", Path(self._folder.name) / f"trial-{self._trials}")
        place.folder.mkdir()
        operation = OPERATIONS[name]
        run = self._client_dies if victim == "client" else self._server_dies
        where = f"{name} with {victim} killed at {kind} {number}"
        try:
            reached, acknowledged = run(name, victim, kind, number, place)
            outcome = operation.check(self._queue.client, place, acknowledged)
            self._queue.client.clear_partition(place.partition)
        except (Violated, TransferQueueError, TimeoutError, AssertionError, KeyError) as error:
            self.report.violations.append(f"{where}: {type(error).__name__}: {error}")
            return True
        if reached:
            self.report.kills[name, victim, outcome] += 1
        elif outcome != DONE:
            self.report.violations.append(f"{where}: not done, though nobody was killed")
        return reached

    def _server_dies(self, name: str, victim: str, kind: str, number: int, place: Place) -> tuple[bool, bool]:
        queue, operation = self._queue, OPERATIONS[name]
        with TransferQueueClient(f"actor-{self._trials}", queue.runtime.info) as client:
            prepared = operation.prepare(client, place)
            child = queue.child(victim)
            restarts = child.restarts.total
            queue.arm(victim, kind, number)
            acknowledged = True
            try:
                completed(client, lambda: operation.act(client, place, prepared))
            except TransferQueueError:
                if not operation.may_fail:
                    raise
                acknowledged = False
            reached = not queue.disarm(victim)
            if reached:
                wait_until(lambda: child.restarts.total > restarts, f"{victim} dies")
                queue.settle(victim)
        return reached, acknowledged

    def _client_dies(self, name: str, victim: str, kind: str, number: int, place: Place) -> tuple[bool, bool]:
        folder = Path(self._folder.name)
        order = Order(
            role="actor",
            number=self._trials,
            life=0,
            seed=0,
            controller=self._queue.runtime.info.to_record(),
            control=str(folder),
            logs=str(folder),
            first={
                "operation": name,
                "kind": kind,
                "number": number,
                "partition": place.partition,
                "folder": str(place.folder),
            },
        )
        pid = self._zygote.start(order)
        wait_until(lambda: pid in self._zygote.ended, f"{order.name} ends")
        status = self._zygote.ended[pid]
        errors = folder / f"{order.name}.error"
        if errors.exists():
            raise Violated(errors.read_text())
        (folder / f"trip-{order.name}").unlink(missing_ok=True)
        return status < 0, status == 0

    def _check_space(self) -> None:
        """What dead clients had begun to write is free again."""
        try:
            self._queue.first_call("unit-0")
            wait_until(lambda: self._bytes_live() <= self._live_bytes, "the space of dead clients comes back", 20.0)
        except (TimeoutError, TransferQueueError) as error:
            self.report.violations.append(f"{error} ({self._live_bytes} bytes at first)")

    def _bytes_live(self) -> int:
        return self._queue.figures()["unit-0"]["bytes_live"]
