"""The faults that a run injects, one at a time, and the rows of the fault matrix that they belong to."""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import TimeoutError as NotReached
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.chaos.armed import KINDS as STEPS
from tests.chaos.endings import BROKEN
from tests.chaos.proxy import DOWN, TCP, UNIX, UP, Proxy
from tests.chaos.proxy import KINDS as MESSAGE_FAULTS
from tests.chaos.queue_under_test import QueueUnderTest, wait_until
from tests.chaos.record import PROXIED, STOPPED
from tests.chaos.scenarios import everything_stops, fork_in_calls, unit_fails, wall_clock_jumps
from tests.chaos.workload import Workload
from transfer_queue.wire.folder import remove_abandoned

RECOVERED, NOT_REACHED = "recovered", "not reached"

_REACH_S = 15.0


@dataclass
class Scene:
    """What faults work on."""

    queue: QueueUnderTest
    workload: Workload
    proxy: Proxy | None
    random: Random
    lease_s: float
    recoveries: list[dict[str, Any]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def number(self) -> int:
        """A number that no other fault of the round has."""
        return next(self.numbers)

    def unit(self) -> str:
        return self.random.choice([name for name in self.queue.names if name != "controller"])


Inject = Callable[[Scene], str]


@dataclass(frozen=True)
class Fault:
    """`rows` of the fault matrix; `how` it is injected; `inject` returns what came of it, after recovery.

    through  the kind of socket whose messages it meddles with by a proxy
    units    how many there must be
    allows   how calls may end that it meets, (operation, outcome); `whom` it meets, see `tests.chaos.record`
    """

    name: str
    rows: str
    how: str
    inject: Inject
    through: str | None = None
    units: int = 1
    allows: frozenset[tuple[str, str]] = frozenset()
    whom: str = ""


def _kill_worker(role: str) -> Inject:
    def inject(scene: Scene) -> str:
        scene.workload.kill(role)
        return RECOVERED

    return inject


def _stop_worker(role: str) -> Inject:
    def inject(scene: Scene) -> str:
        scene.workload.stop(role, scene.lease_s + 1.0)
        return RECOVERED

    return inject


def _name(scene: Scene, server: str) -> str:
    return "controller" if server == "controller" else scene.unit()


def _kill_server(server: str, *, janitor: bool = False) -> Inject:
    def inject(scene: Scene) -> str:
        name = _name(scene, server)
        if janitor:
            scene.queue.kill(name)
            remove_abandoned()
            scene.queue.settle(name)
        else:
            took_s, beyond_s = scene.queue.recover(name)
            scene.recoveries.append({"server": server, "took_s": took_s, "beyond_s": beyond_s})
        return RECOVERED

    return inject


def _terminate(server: str) -> Inject:
    def inject(scene: Scene) -> str:
        name = _name(scene, server)
        scene.queue.kill(name, signal.SIGTERM)
        scene.queue.settle(name)
        return RECOVERED

    return inject


def _trip(server: str) -> Inject:
    def inject(scene: Scene) -> str:
        name = _name(scene, server)
        child = scene.queue.child(name)
        pid, restarts = child.pid, child.restarts.total
        scene.queue.arm(name, scene.random.choice(STEPS), scene.random.randint(1, 40))
        try:
            wait_until(lambda: child.restarts.total > restarts and child.pid != pid, "the step", _REACH_S)
        except TimeoutError:
            if scene.queue.disarm(name):
                return NOT_REACHED
        scene.queue.settle(name)
        return RECOVERED

    return inject


def _pause(server: str) -> Inject:
    def inject(scene: Scene) -> str:
        name = _name(scene, server)
        scene.queue.pause(name, scene.random.uniform(0.5, 3.0))
        scene.queue.first_call(name)
        return RECOVERED

    return inject


def _message(kind: str) -> Inject:
    def inject(scene: Scene) -> str:
        assert scene.proxy is not None
        server = scene.random.choice(["controller", "controller", scene.unit()])
        direction = scene.random.choice([UP, DOWN])
        done = scene.proxy.arm(kind, server, direction, scene.random.randint(1, 20))
        try:
            done.result(_REACH_S)
        except NotReached:
            scene.proxy.disarm()
            return NOT_REACHED
        return RECOVERED

    return inject


def _full(server: str) -> Inject:
    def inject(scene: Scene) -> str:
        name = _name(scene, server)
        scene.queue.fill_disk(name, True)
        try:
            time.sleep(scene.random.uniform(1.0, 3.0))
        finally:
            scene.queue.fill_disk(name, False)
        scene.queue.first_call(name)
        return RECOVERED

    return inject


def _slow_consumers(scene: Scene) -> str:
    scene.workload.stop_all("scorer", 3.0)
    return RECOVERED


def _unit_fails(scene: Scene) -> str:
    return RECOVERED if unit_fails(scene) else NOT_REACHED


def _scenario(play: Callable[[Scene], None]) -> Inject:
    def inject(scene: Scene) -> str:
        play(scene)
        return RECOVERED

    return inject


_OPERATIONS = ("put", "score", "draw", "read", "ack", "release", "clear", "status")

# A call that a server's death or a lost message meets is sent again by itself, and by the caller under its id; if that
# takes longer than its deadline, its outcome is open (HAZARDS P1).
_CUT = frozenset((op, outcome) for op in _OPERATIONS for outcome in BROKEN)
_CUT_AT_UNIT = frozenset((op, outcome) for op in ("put", "score", "read") for outcome in BROKEN)  # all that units do
# HAZARDS F26: while its journal cannot grow the controller refuses what would commit more, grants among it; acks,
# releases and clears have a reserve. F17, F26: a unit without space lends none, and cannot write down a pin.
_NO_JOURNAL = frozenset((op, "CapacityExceeded") for op in ("put", "score", "draw"))
_NO_UNIT_SPACE = frozenset((op, "CapacityExceeded") for op in ("put", "score", "read"))
_RAISES = frozenset((op, "RemoteError") for op in ("put", "score"))

_SIGKILL = "SIGKILL at a random moment under load"
_ARMED = "SIGKILL at a random journal or message step under load"
_MESSAGE = "a proxy on the Unix socket, a random message either way"
_BYTES = {
    "drop": "a proxy on TCP: all bytes of a connection vanish from a random moment on",
    "duplicate": "a proxy on TCP: all that a connection has sent is sent again over a second one",
    "delay": "a proxy on TCP: a connection stands still for 1 s",
    "split": "a proxy on TCP: bytes come one by one",
    "truncate": "a proxy on TCP: the connection breaks in the middle of a random sending",
    "cut": "a proxy on TCP: the connection breaks between two sendings",
}

FAULTS = (
    Fault("kill producer", "F04 F05 F06", _SIGKILL, _kill_worker("producer")),
    Fault("kill consumer (adds a field)", "F01 F02 F03", _SIGKILL, _kill_worker("scorer")),
    Fault("kill consumer (groups)", "F01 F02 F03", _SIGKILL, _kill_worker("looker")),
    Fault("kill trainer rank", "F01 F02 F03", _SIGKILL, _kill_worker("trainer")),
    Fault("kill cleaner", "F03", _SIGKILL, _kill_worker("cleaner")),
    Fault("unit raises", "F07", "a unit raises at a random step of writing, others serve", _unit_fails,
          units=2, allows=_RAISES),
    Fault("kill controller", "F09 F10", _SIGKILL, _kill_server("controller"), allows=_CUT),
    Fault("kill controller at a step", "F09", _ARMED, _trip("controller"), allows=_CUT),
    Fault("kill unit", "F11", _SIGKILL, _kill_server("unit"), allows=_CUT_AT_UNIT),
    Fault("kill unit at a step", "F11", _ARMED, _trip("unit"), allows=_CUT_AT_UNIT),
    Fault("fork", "F13 F14", "fork at random moments, while other threads put, draw, read, acknowledge and wait",
          _scenario(fork_in_calls)),
    Fault("zombie consumer", "F15 F33", "SIGSTOP beyond the lease, SIGCONT", _stop_worker("scorer"), whom=STOPPED),
    Fault("zombie trainer rank", "F15 F33", "SIGSTOP beyond the lease, SIGCONT", _stop_worker("trainer"),
          whom=STOPPED),
    Fault("slow controller", "P4", "SIGSTOP 0.5–3 s, SIGCONT", _pause("controller")),
    Fault("slow unit", "P4", "SIGSTOP 0.5–3 s, SIGCONT", _pause("unit")),
    Fault("wall clock", "F23", "the wall clock of all processes jumps by ±1 h while leases run",
          _scenario(wall_clock_jumps)),
    Fault("suspend", "F23", "SIGSTOP of all processes for 0.3–2.5 leases, wall clock 1 h ahead, SIGCONT",
          _scenario(everything_stops), whom=STOPPED),
    Fault("SIGTERM controller", "F32", "SIGTERM under load", _terminate("controller"), allows=_CUT),
    Fault("SIGTERM unit", "F32", "SIGTERM under load", _terminate("unit"), allows=_CUT_AT_UNIT),
    Fault("janitor beside a dead controller", "F37", "SIGKILL, janitor before the restart",
          _kill_server("controller", janitor=True), allows=_CUT),
    Fault("janitor beside a dead unit", "F37", "SIGKILL, janitor before the restart",
          _kill_server("unit", janitor=True), allows=_CUT_AT_UNIT),
    Fault("full memory", "F16", "consumers stand still, producers run into the limit", _slow_consumers, whom=STOPPED),
    Fault("full disk (journal of the controller)", "F26", "ENOSPC from all file calls for 1–3 s", _full("controller"),
          allows=_NO_JOURNAL),
    Fault("full disk (journal and arenas of a unit)", "F17 F26", "ENOSPC from all file calls for 1–3 s",
          _full("unit"), allows=_NO_UNIT_SPACE),
    *(Fault(f"{kind} message", "F18", _MESSAGE, _message(kind), through=UNIX, allows=_CUT, whom=PROXIED)
      for kind in MESSAGE_FAULTS[UNIX]),
    *(Fault(f"{kind} bytes", "F18 F20" if kind == "duplicate" else "F18", _BYTES[kind], _message(kind), through=TCP,
            allows=_CUT, whom=PROXIED)
      for kind in MESSAGE_FAULTS[TCP]),
)  # fmt: skip

BY_NAME = {fault.name: fault for fault in FAULTS}
