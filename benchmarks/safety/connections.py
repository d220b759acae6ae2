"""What it costs to be let in, and to speak in secret.

The proof of the token cannot be switched off, so there is no run without it: it is timed alone, beside what a new
connection takes in all. After it no message carries anything of it, on Unix sockets and over TCP alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import TYPE_CHECKING

from benchmarks import control, whole
from benchmarks.figures import Report
from benchmarks.safety.calls import Reader, measure_calls
from benchmarks.safety.data import measure_batches
from benchmarks.safety.sides import Conf, Sides
from benchmarks.scale import Scale
from transfer_queue.wire.security import Gate, Introduction, new_token

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

PLAIN = "TCP"
SECRET = "TCP with CURVE"
LOCAL = "Unix socket"

_PROOF = "proof of the token"
_CONFS: dict[str, Conf] = {
    LOCAL: {},
    PLAIN: {"transport": "tcp"},
    SECRET: {"transport": "tcp", "security": {"encrypt": True}},
}
_LESS_DATA = 4  # over TCP a fourth of the batch does


class Newcomer:
    """Connects again and again."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def come(self, times: int, transport: str) -> list[tuple[float, float]]:
        """Return the seconds of the first request of each new client, which connects, and of its second."""
        from transfer_queue import TransferQueueClient

        moments = []
        for number in range(times):
            with TransferQueueClient(f"new-{number}", self._client.controller_info, transport=transport) as client:
                times_s = [time.perf_counter()]
                for _ in range(2):
                    client.get_partition_list()
                    times_s.append(time.perf_counter())
            first_s, second_s = (after - before for before, after in itertools.pairwise(times_s))
            moments.append((first_s, second_s))
        return moments


def measure(report: Report, scale: Scale) -> None:
    """Add the first and the second request of a new client, and what of it is the proof."""
    proofs = report.series(_PROOF, "both ends computing, no socket", skip=scale.calls // 10)
    proofs.add(*prove(scale.calls + proofs.skip))
    with Sides(_CONFS) as sides:
        newcomer = sides.stage(Newcomer)
        for side, conf in _CONFS.items():
            first = report.series(f"new client, {side}", "connect, proof and first request", skip=scale.warm_up)
            second = report.series(f"new client, {side}", "second request", skip=scale.warm_up)
            times = scale.connections + scale.warm_up
            for first_s, second_s in newcomer.call(side, "come", times, str(conf.get("transport", "auto"))):
                first.add(first_s)
                second.add(second_s)
            share = f"{_PROOF}, share of a new client's first request"
            report.quantity(f"new client, {side}", share, 100 * proofs.p50_s / first.p50_s, "%")


def prove(times: int) -> list[float]:
    """Let the two ends of a connection prove the token to each other; return the seconds of each time."""
    token = new_token()
    gate = Gate(token)
    durations_s = []
    for number in range(times):
        begin = time.perf_counter()
        client = Introduction(token, "client")
        answer: bytes | None = client.hello()
        while answer is not None:
            answer = client.receive(gate.receive(number, [answer]))
        durations_s.append(time.perf_counter() - begin)
        assert client.welcomed
        gate.forget(number)
    return durations_s


def measure_encryption(report: Report, scale: Scale) -> None:
    """The same over TCP with CURVE and without."""
    sides = [PLAIN, SECRET]
    with Sides({side: _CONFS[side] for side in sides}) as both:
        stages = both.stage(control.Writer), both.stage(Reader)
        measure_calls(report, scale, *stages, prefix="calls", sides=sides, base=PLAIN)
    less = dataclasses.replace(scale, dense_rows=max(1, scale.dense_rows // _LESS_DATA))
    with Sides({side: _CONFS[side] for side in sides}) as both:
        data = both.stage(whole.Writer), both.stage(whole.Reader)
        measure_batches(
            report, less, *data, ("dense", "small"), prefix="data", sides=sides, base=PLAIN, rounds=scale.rounds
        )
