"""From SIGKILL of the controller or of the storage unit to the first call that is served again.

The client does nothing special: its call waits, and is sent again to the successor. Beside it stands a bare start: a
process of the same kind, started right before the kill, that has nothing to recover and nobody to wait for it. It has
the machine to itself, as the successor of a killed process has: whoever uses that one waits until it serves.
"""

from __future__ import annotations

import contextlib
import itertools
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
from benchmarks.safety.sides import WITHOUT, Sides, SideStage
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

_FILLED, _PROBED = "filled", "probed"
_SMALL_VALUES = 64  # float32 of a sample that only fills the queue
_CHAINS = 4  # of puts, draws and gets, where there is load
_CALLS = 4  # of a round: put, draw, get, clear
_LOADED_S = 0.1  # of load before each kill
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

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def told(self) -> tuple[int, list[str]]:
        """Return how many rounds were done in all, and the errors of those that raised."""
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
    """Add series for each number of samples in the queue; `kind` is `CONTROLLER` or `UNIT`.

    Each kill has a bare start right before it. `BEYOND` are the differences of such pairs, which may be negative.
    """
    state = f"{kind}, {'under load' if loaded else 'idle'}"
    with Sides({WITHOUT: {}}) as others, Sides({WITHOUT: {}}) as sides:
        start = _bare_start(kind, others.runtimes[WITHOUT].info)
        start()  # a first one may find nothing in the caches of the machine
        load = sides.stage(Load) if loaded else None
        for samples in scale.recovered_samples:
            series = [report.series(f"{state}, {samples:,} samples", measure) for measure in (SERVED, BARE, BEYOND)]
            kill = _kills(sides, kind, samples)
            for _ in range(scale.kills):
                bare_s = start()  # without load: those who use a server that is away wait
                with _while(load):
                    served_s = kill()
                for one, duration_s in zip(series, (served_s, bare_s, served_s - bare_s), strict=True):
                    one.add(duration_s)
        if load is not None:
            rounds, failed = load.call(WITHOUT, "told")
            report.quantity(state, "calls beside it that raised", len(failed), f"of {_CALLS * rounds}")


@contextlib.contextmanager
def _while(load: SideStage | None) -> Iterator[None]:
    """Have a process that uses the queue, if there is one, from a moment before."""
    if load is None:
        yield
        return
    load.call(WITHOUT, "start")
    try:
        time.sleep(_LOADED_S)
        yield
    finally:
        load.call(WITHOUT, "stop")


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
    conf, numbers = settings(merged({"runtime": "processes"})), itertools.count()

    def order() -> dict[str, Any]:
        server = {"host": conf.host, "key": f"{secrets.token_hex(8)}/bare", "journal": True}
        if kind == CONTROLLER:
            alone = {"role": "controller", "sampler": conf.sampler, "import_path": sys.path, "ledger": conf.ledger}
        else:
            alone = {"role": "unit", "controller": controller.to_record()}
            server["unit_id"] = f"bare-{next(numbers)}"  # the controller has never heard of it
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
