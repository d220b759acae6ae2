"""The faults that a run injects, one at a time, and the rows of the fault matrix that they belong to."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as NotReached
from dataclasses import dataclass, field
from random import Random
from typing import Any

from tests.chaos.armed import KINDS as STEPS
from tests.chaos.proxy import DOWN, UP, Proxy
from tests.chaos.proxy import KINDS as MESSAGE_FAULTS
from tests.chaos.queue_under_test import QueueUnderTest, wait_until
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

    def unit(self) -> str:
        return self.random.choice([name for name in self.queue.names if name != "controller"])


Inject = Callable[[Scene], str]


@dataclass(frozen=True)
class Fault:
    """`rows` of the fault matrix; `how` it is injected; `inject` returns what came of it, after recovery."""

    name: str
    rows: str
    how: str
    inject: Inject
    needs_proxy: bool = False


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


_SIGKILL = "SIGKILL at a random moment under load"
_ARMED = "SIGKILL at a random journal or message step under load"
_PROXY = "a proxy on the socket, a random message either way"

FAULTS = (
    Fault("kill producer", "F04 F05 F06", _SIGKILL, _kill_worker("producer")),
    Fault("kill consumer (adds a field)", "F01 F02 F03", _SIGKILL, _kill_worker("scorer")),
    Fault("kill consumer (groups)", "F01 F02 F03", _SIGKILL, _kill_worker("looker")),
    Fault("kill trainer rank", "F01 F02 F03", _SIGKILL, _kill_worker("trainer")),
    Fault("kill cleaner", "F03", _SIGKILL, _kill_worker("cleaner")),
    Fault("kill controller", "F09 F10", _SIGKILL, _kill_server("controller")),
    Fault("kill controller at a step", "F09", _ARMED, _trip("controller")),
    Fault("kill unit", "F11", _SIGKILL, _kill_server("unit")),
    Fault("kill unit at a step", "F11", _ARMED, _trip("unit")),
    Fault("zombie consumer", "F15 F33", "SIGSTOP beyond the lease, SIGCONT", _stop_worker("scorer")),
    Fault("zombie trainer rank", "F15 F33", "SIGSTOP beyond the lease, SIGCONT", _stop_worker("trainer")),
    Fault("slow controller", "P4", "SIGSTOP 0.5–3 s, SIGCONT", _pause("controller")),
    Fault("slow unit", "P4", "SIGSTOP 0.5–3 s, SIGCONT", _pause("unit")),
    Fault("SIGTERM controller", "F32", "SIGTERM under load", _terminate("controller")),
    Fault("SIGTERM unit", "F32", "SIGTERM under load", _terminate("unit")),
    Fault("janitor beside a dead controller", "F37", "SIGKILL, janitor before the restart",
          _kill_server("controller", janitor=True)),
    Fault("janitor beside a dead unit", "F37", "SIGKILL, janitor before the restart",
          _kill_server("unit", janitor=True)),
    Fault("full memory", "F16", "consumers stand still, producers run into the limit", _slow_consumers),
    Fault("full disk (journal of the controller)", "F26", "ENOSPC from all file calls for 1–3 s", _full("controller")),
    Fault("full disk (journal and arenas of a unit)", "F17 F26", "ENOSPC from all file calls for 1–3 s",
          _full("unit")),
    *(Fault(f"{kind} message", "F18", _PROXY, _message(kind), needs_proxy=True) for kind in MESSAGE_FAULTS),
)  # fmt: skip

BY_NAME = {fault.name: fault for fault in FAULTS}
