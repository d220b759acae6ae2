"""What the queue costs when it does nothing: its start, its idle processor time, its memory.

Starts are timed in a fresh process that has imported everything and, for Ray, has joined the running cluster. Idle
time and memory are those of the server processes of the placement; under Ray an actor that does nothing stands beside.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import transfer_queue
from benchmarks.accounting import private_bytes, process_usage, server_processes
from benchmarks.figures import Report
from benchmarks.interrupts import held_back
from benchmarks.placement import PATIENCE_S, Placement, RayPlacement
from benchmarks.scale import Scale

CASE = "cost of nothing"


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add the start of a session, and idle time and memory of each server process."""
    names = server_processes()
    if isinstance(placement, RayPlacement):
        import ray

        idle: Any = ray.remote(num_cpus=0)(_Idle).remote()
        names[ray.get(idle.pid.remote(), timeout=PATIENCE_S)] = "an actor that does nothing"
        _measure_idle(report, scale, names)
        ray.kill(idle)
        starts_s = _in_fresh_process(_start_under_ray, ray.get_runtime_context().gcs_address, scale.starts)
        report.series(CASE, "start of a session beyond ray.init").add(*starts_s)
    else:
        _measure_idle(report, scale, names)
        starts_s = _in_fresh_process(_start_embedded, scale.starts)
        report.series(CASE, "start of an embedded session beyond imports").add(*starts_s)


def _measure_idle(report: Report, scale: Scale, names: dict[int, str]) -> None:
    before = {pid: process_usage(pid).cpu_s for pid in names}
    begin = time.monotonic()
    time.sleep(scale.idle_s)
    elapsed_s = time.monotonic() - begin
    for pid, name in names.items():
        share = (process_usage(pid).cpu_s - before[pid]) / elapsed_s
        report.quantity(CASE, f"idle processor time, {name}", 100 * share, "%")
        report.quantity(CASE, f"private memory beyond arenas, {name}", private_bytes(pid) / 1e6, "MB")


# ---------------------------------------------------------------- in other processes


class _Idle:
    def pid(self) -> int:
        return os.getpid()


def _in_fresh_process(function: Any, *arguments: Any) -> list[float]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as executor:
        with held_back():
            answer = executor.submit(function, *arguments)
        result: list[float] = answer.result(PATIENCE_S)
        return result


def _start_embedded(times: int) -> list[float]:
    import transfer_queue.runtime.embedded
    import transfer_queue.session  # noqa: F401  what `init` imports is not its start

    return [_timed_start({"runtime": "embedded"}) for _ in range(times)]


def _start_under_ray(address: str, times: int) -> list[float]:
    """Each time in a namespace of its own, beside the session that runs."""
    import logging

    import ray

    import transfer_queue.runtime.ray
    import transfer_queue.session  # noqa: F401  as above

    ray.init(address=address, logging_level=logging.WARNING)
    try:
        return [_timed_start({"runtime": "ray", "namespace": f"costs-{number}"}) for number in range(times)]
    finally:
        ray.shutdown()


def _timed_start(conf: dict[str, Any]) -> float:
    begin = time.perf_counter()
    transfer_queue.init(conf)
    duration_s = time.perf_counter() - begin
    transfer_queue.close()
    return duration_s
