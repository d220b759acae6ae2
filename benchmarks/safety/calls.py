"""Small calls of a writer and a reader, as many per turn as one needs to take a median."""

from __future__ import annotations

import time
from collections.abc import Mapping

from benchmarks import control
from benchmarks.control import BATCH, IN_FLIGHT, TASK
from benchmarks.figures import Report
from benchmarks.safety.sides import Compared, SideStage, measured
from benchmarks.scale import Scale

LEASE_S = 60.0
GET_META = f"get_meta({BATCH})"
PUT = "put of one 12 KiB sample"
PUTS = f"{PUT}, {IN_FLIGHT} in flight"
ACK = f"ack of {BATCH}"
LIST = "a request that changes nothing"

_PARTITION = "draws"
_PUTS_TOGETHER = 4  # rounds of a turn


class Reader(control.Reader):
    def ack(self, partition: str, rows: int, calls: int) -> list[float]:
        """Return the seconds of each `ack` of `BATCH` samples; they are given back in between, and at the end."""
        durations_s = []
        for call in range(calls):
            if call % (rows // BATCH) == 0:
                self._client.reset_consumption(partition, TASK)
            meta = self._client.get_meta(["x"], BATCH, partition, task_name=TASK, lease=LEASE_S)
            begin = time.perf_counter()
            self._client.ack(meta)
            durations_s.append(time.perf_counter() - begin)
        self._client.reset_consumption(partition, TASK)
        return durations_s

    def ask(self, calls: int) -> list[float]:
        """Return the seconds of each request for the names of the partitions."""
        durations_s = []
        for _ in range(calls):
            begin = time.perf_counter()
            self._client.get_partition_list()
            durations_s.append(time.perf_counter() - begin)
        return durations_s


def measure_calls(
    report: Report,
    scale: Scale,
    writer: SideStage,
    reader: SideStage,
    *,
    prefix: str,
    sides: list[str],
    base: str,
    aims: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Compare the calls that training makes all the time; `prefix` begins the name of each case."""
    rows, calls = scale.partition_rows[0], scale.turn_calls
    for side in sides:
        writer.call(side, "fill", _PARTITION, rows)
    table = {
        GET_META: lambda side: reader.call(side, "draw", _PARTITION, rows, calls),
        ACK: lambda side: reader.call(side, "ack", _PARTITION, rows, calls // 2),
        PUT: lambda side: writer.call(side, "put_samples", "single", calls),
        PUTS: lambda side: writer.call(side, "put_together", "together", _PUTS_TOGETHER),
        LIST: lambda side: reader.call(side, "ask", calls),
    }
    compared = {case: Compared(report, f"{prefix}: {case}", sides, base=base, aims=aims) for case in table}
    measured(table, compared, sides=sides, rounds=scale.turns, warm_up=scale.warm_up)
    for side in sides:
        writer.call(side, "clear", _PARTITION)
