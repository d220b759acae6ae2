"""Faults that take a scene of their own beside the workload: what is done, and what must come of it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tests.chaos.armed import BROKEN_WRITE
from tests.chaos.clock import arm_clock, disarm_clock, set_clock
from tests.chaos.operations import Violated
from transfer_queue import TransferQueueClient
from transfer_queue.errors import LeaseExpired, RemoteError
from transfer_queue.wire.folder import remove_abandoned

if TYPE_CHECKING:
    from tests.chaos.faults import Scene

_LARGE = 600_000  # int64 per sample: two of them are more than one message of 8 MiB
_PUTS_S = 10.0
_HOUR_S = 3600.0
_HELD_S = 2.0  # the lease that the clock is not to touch
_LATE_S = 2.0  # until samples whose lease ran out have reached the one who waits, on a machine that is busy
_NEGATIVE = re.compile(r"(?<![\w.])-\d[\d.]* ?s\b")


# ---------------------------------------------------------------- one unit of several fails


def unit_fails(scene: Scene) -> bool:
    """One of several units raises at a request to write, in the middle of puts; return whether it came to that.

    A put that met it raised and nothing of it is there; it can be repeated; those at other units are as ever.
    """
    queue, unit, partition = scene.queue, scene.unit(), f"halves-{scene.number()}"
    with TransferQueueClient("writer", queue.runtime.info, transport="tcp") as client:
        queue.fail_writes(unit, scene.random.randint(1, 4))
        try:
            good, failed = _put_until_failed(scene, client, partition)
        finally:
            queue.fail_writes(unit, None)
        if not failed:
            client.clear_partition(partition)
            return False
        _check_keys(client, partition, good)
        for sequence in failed:
            _put_large(client, partition, sequence)
        _check_keys(client, partition, good + failed)
        client.clear_partition(partition)
    return True


def _put_until_failed(scene: Scene, client: TransferQueueClient, partition: str) -> tuple[list[int], list[int]]:
    good, failed = list[int](), list[int]()
    deadline = time.monotonic() + _PUTS_S
    sequence = 0
    while (not good or not failed) and time.monotonic() < deadline and sequence < 16:
        try:
            _put_large(client, partition, sequence)
            good.append(sequence)
        except RemoteError as error:
            _must(BROKEN_WRITE in error.message, f"a put failed for another reason: {error}")
            failed.append(sequence)
        sequence += 1
        time.sleep(scene.random.uniform(0.0, 0.05))
    return good, failed


def _put_large(client: TransferQueueClient, partition: str, sequence: int) -> None:
    keys = [f"{sequence}-{row}" for row in range(2)]
    values = torch.arange(2 * _LARGE).reshape(2, _LARGE) + sequence
    client.put({"large": values}, partition_id=partition, keys=keys, timeout=20.0)


def _check_keys(client: TransferQueueClient, partition: str, sequences: list[int]) -> None:
    """These puts are there, whole, each once, and no others."""
    expected = sorted(f"{sequence}-{row}" for sequence in sequences for row in range(2))
    if partition not in client.get_partition_list():
        _must(not expected, f"of the puts {sequences} nothing is there")
        return
    meta = client.get_meta(["large"], 1, partition, mode="force_fetch")
    found = sorted(map(str, meta.keys or ()))
    _must(found == expected, f"samples {found} are there after a unit failed, not {expected}")
    for key, row in zip(meta.keys or (), client.get_data(meta, ["large"])["large"], strict=True):
        sequence, at = (int(part) for part in str(key).split("-"))
        whole = torch.arange(at * _LARGE, (at + 1) * _LARGE) + sequence
        _must(torch.equal(row, whole), f"sample {key} has other bytes than were put")


# ---------------------------------------------------------------- fork


def fork_in_calls(scene: Scene) -> None:
    """A client forks some times while calls are in flight in other threads; see `tests.chaos.forking`."""
    scene.workload.run_beside("forker", scene.number())


# ---------------------------------------------------------------- clock


def wall_clock_jumps(scene: Scene) -> None:
    """The wall clock of all processes jumps an hour ahead, an hour back, and to what it was, while a lease runs."""
    with _lease_ends_in_time(scene), _clock(scene) as jump:
        for off_s in scene.random.sample([_HOUR_S, -_HOUR_S, 0.0], 3):
            jump(off_s)
            remove_abandoned()  # the folders of the session have an owner, whatever the clock says
            _explained(scene)
            time.sleep(scene.random.uniform(0.1, 0.5))


def everything_stops(scene: Scene) -> None:
    """All processes of the session stand still, for part of a lease or beyond it, and the wall clock goes on.

    A machine that sleeps also stops `time.monotonic`; here it goes on, so leases run out on time in any case.
    """
    stop_s = scene.random.choice([0.3 * _HELD_S, 0.7 * _HELD_S, _HELD_S + 1.0, scene.lease_s + 1.0])
    with _lease_ends_in_time(scene, stop_s), _clock(scene) as jump:
        time.sleep(scene.random.uniform(0.0, 0.5))
        scene.workload.stop_everything(stop_s, lambda: jump(_HOUR_S))
        _explained(scene)


@contextmanager
def _clock(scene: Scene) -> Iterator[Callable[[float], None]]:
    """Yield what sets the wall clock of the processes under test and of this one; it is right again in the end."""
    control = scene.queue.control
    arm_clock(control)
    try:
        yield lambda off_s: set_clock(control, off_s)
    finally:
        set_clock(control, 0.0)
        disarm_clock()


@contextmanager
def _lease_ends_in_time(scene: Scene, stop_s: float = 0.0) -> Iterator[None]:
    """A lease is held over the block: who waits for its samples gets them when `time.monotonic` says so.

    `stop_s`: for how long nobody can answer at all; the answer may come so much later.
    """
    client, partition = scene.queue.client, "clock"
    client.put({"x": torch.arange(4)}, partition_id=partition)
    before = time.monotonic()
    held = client.get_meta(["x"], 4, partition, task_name="clock", lease=_HELD_S)
    after = time.monotonic()
    got: list[tuple[float, Any]] = []

    def wait() -> None:
        drawn = client.get_meta(["x"], 4, partition, task_name="clock", lease=60.0, timeout=_HELD_S + stop_s + 20.0)
        got.append((time.monotonic(), drawn))

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        yield
    finally:
        waiting.join()
    _must(bool(got), "who waited for the samples of a lease that ran out did not get them")
    at, drawn = got[0]
    _must(at - before >= _HELD_S, f"a lease of {_HELD_S} s ended {at - before:.3f} s after it was asked for")
    late_s = at - after - _HELD_S
    _must(late_s <= _LATE_S + stop_s, f"a lease of {_HELD_S} s ended {late_s:.3f} s late, with {stop_s} s stopped")
    try:
        client.ack(held)
        raise Violated("a lease that was over could be acknowledged")
    except LeaseExpired:
        pass
    _must(client.ack(drawn) == 4, "the samples of a lease that ran out could not be acknowledged by the next one")
    client.clear_partition(partition)


def _explained(scene: Scene) -> None:
    """No age or time left is negative, whatever the wall clock says."""
    text = scene.queue.client.explain("clock", "clock", ["x"], 4)
    _must(not _NEGATIVE.search(text), f"a negative time: {text}")


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise Violated(what)
