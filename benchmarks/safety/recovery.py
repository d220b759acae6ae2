"""From SIGKILL of the controller or of the storage unit to the first call that is served again.

The client does nothing special: its call waits, and is sent again to the successor. Beside it stands a bare start: a
process of the same kind, started in the same minute, that has nothing to recover and nobody to wait for it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.control import BATCH, SAMPLE_VALUES, TASK
from benchmarks.figures import Report
from benchmarks.safety.sides import WITHOUT, Sides
from benchmarks.scale import Scale
from transfer_queue.config import merged, settings
from transfer_queue.errors import TransferQueueError
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.supervisor import Child, Restarts
from transfer_queue.wire.holders import process_id, to_record

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

CONTROLLER, UNIT = "controller", "unit-0"
SERVED = "kill to the first call served"
BARE = "start of a bare process"
BEYOND = "beyond a bare start"
BEYOND_AT_MOST_S = 1.0

_FILLED, _PROBED = "filled", "probed"
_SMALL_VALUES = 64  # float32 of a sample that only fills the queue
_CHAINS = 4  # of puts, draws and gets, where there is load
_START_S = 60.0
_LOOK_S = 0.005


class Load:
    """Puts, draws, reads and clears samples all the time, in threads."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._rounds = [0] * _CHAINS
        self._failed: list[str] = []

    def start(self) -> None:
        self._over.clear()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(_CHAINS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> tuple[int, list[str]]:
        """Return how many rounds were done in all, and the errors of those that raised."""
        self._over.set()
        for thread in self._threads:
            thread.join()
        return sum(self._rounds), self._failed

    def _run(self, number: int) -> None:
        client, partition = self._client, f"load-{number}"
        sample = {"x": torch.zeros(1, SAMPLE_VALUES)}
        while not self._over.is_set():
            try:
                client.put(sample, partition_id=partition)
                meta = client.get_meta(["x"], 1, partition, task_name=TASK)
                client.get_data(meta)
                client.clear_samples(meta)
            except TransferQueueError as error:
                self._failed.append(repr(error))
            self._rounds[number] += 1


def measure(report: Report, scale: Scale, kind: str, loaded: bool) -> None:
    """Add series for each number of samples in the queue; `kind` is `CONTROLLER` or `UNIT`."""
    state = "under load" if loaded else "idle"
    bare = report.series(f"{kind}, {state}", BARE, skip=1)
    with Sides({WITHOUT: {}}) as others:
        starts = _bare_start(kind, others.runtimes[WITHOUT].info)
        bare.add(*(starts() for _ in range(1 + scale.kills)))  # those who use the queue wait while it is away
    with Sides({WITHOUT: {}}) as sides, _load(sides, loaded) as ended:
        for samples in scale.recovered_samples:
            case = f"{kind}, {state}, {samples:,} samples"
            served = report.series(case, SERVED)
            beyond = report.series(case, BEYOND)
            kills = _kills(sides, kind, samples)
            for _ in range(scale.kills):
                served.add(kills())
            beyond.add(*(max(0.0, duration_s - bare.p50_s) for duration_s in served.durations_s))
    if loaded:
        rounds, failed = ended()
        report.quantity(f"{kind}, {state}", "calls beside it that raised", len(failed), f"of {4 * rounds}")


@contextlib.contextmanager
def _load(sides: Sides, wanted: bool) -> Iterator[Callable[[], tuple[int, list[str]]]]:
    """Have a process that uses the queue until the end; what is yielded says afterwards how it fared."""
    if not wanted:
        yield lambda: (0, [])
        return
    told: list[tuple[int, list[str]]] = []
    stage = sides.stage(Load)
    stage.call(WITHOUT, "start")
    try:
        yield lambda: told[0]
    finally:
        told.append(stage.call(WITHOUT, "stop"))


# ---------------------------------------------------------------- kills


def _kills(sides: Sides, kind: str, samples: int) -> Callable[[], float]:
    """Fill the queue; return what kills the process and says how long the next call of it took."""
    client = sides.client(WITHOUT)
    _fill(client, samples)
    client.clear_partition(_PROBED)
    client.put({"x": torch.rand(BATCH, SAMPLE_VALUES)}, partition_id=_PROBED)
    meta = client.get_meta(["x"], BATCH, _PROBED, task_name=TASK)
    [child] = [child for child in sides.runtimes[WITHOUT].children if child.name == kind]
    child.restarts = Restarts(most=sys.maxsize, window_s=0.0)  # at once, however often

    def probe() -> None:
        if kind == CONTROLLER:
            client.reset_consumption(_PROBED, TASK)
            client.get_meta(["x"], BATCH, _PROBED, task_name=TASK)
        else:
            client.get_data(meta)

    def kill() -> float:
        _settled(child)
        probe()
        before = child.pid
        begin = time.perf_counter()
        os.kill(before, signal.SIGKILL)
        probe()
        duration_s = time.perf_counter() - begin
        _settled(child)
        assert child.pid != before
        return duration_s

    return kill


def _fill(client: TransferQueueClient, samples: int) -> None:
    """Have so many samples in the queue, in blocks of `BATCH`."""
    client.clear_partition(_FILLED)
    batch = {"x": torch.rand(BATCH, _SMALL_VALUES)}
    for _ in range(samples // BATCH):
        client.put(batch, partition_id=_FILLED)


def _settled(child: Child) -> None:
    deadline = time.monotonic() + _START_S
    while child.state != "running":
        if time.monotonic() > deadline:
            raise TimeoutError(f"{child} does not come back")
        time.sleep(_LOOK_S)


# ---------------------------------------------------------------- bare starts


def _bare_start(kind: str, controller: ZMQServerInfo) -> Callable[[], float]:
    """Return what starts a new process of that kind, says how long it took to be ready, and ends it."""
    conf = settings(merged({"runtime": "processes"}))

    def order() -> dict[str, Any]:
        server = {"host": conf.host, "key": f"{secrets.token_hex(8)}/bare", "journal": True}
        if kind == CONTROLLER:
            alone = {"role": "controller", "sampler": conf.sampler, "import_path": sys.path, "ledger": conf.ledger}
        else:
            alone = {"role": "unit", "controller": controller.to_record()}
            server["unit_id"] = "bare"
        return {**alone, "server": server, "supervisor": to_record(process_id())}

    def start() -> float:
        begin = time.perf_counter()
        child = Child("bare", order(), lambda: None, restarts=Restarts(0), start_timeout_s=_START_S)
        try:
            child.ready()
            return time.perf_counter() - begin
        finally:
            child.end()
            child.join()

    return start
