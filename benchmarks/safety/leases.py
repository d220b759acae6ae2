"""Throughput of a consumer that acknowledges what it drew, against one whose draws count as consumed at once."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from benchmarks import whole
from benchmarks.batches import touch
from benchmarks.control import BATCH, SAMPLE_VALUES, TASK
from benchmarks.figures import FASTER, Report
from benchmarks.safety.calls import LEASE_S
from benchmarks.safety.sides import WITHOUT, Compared, Sides, SideStage, turns
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

LEASED = "leased and acknowledged"
AT_LEAST = 0.9  # of the throughput without leases, of a consumer that reads what it draws

_SIDES = (WITHOUT, LEASED)
_RAGGED, _FIXED = "ragged samples", "12 KiB samples"


class Writer(whole.Writer):
    def fill(self, partition: str, rows: int) -> None:
        """Put samples of 12 KiB, as many at a time as are drawn together."""
        for _ in range(rows // BATCH):
            self._client.put({"x": torch.rand(BATCH, SAMPLE_VALUES)}, partition_id=partition)


class Consumer:
    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def consume(self, partition: str, fields: list[str], rows: int, how: str, reads: bool) -> list[float]:
        """Return the seconds of each batch, drawn and, if so told, read to the last byte; `how` is one of the sides."""
        lease, batch = LEASE_S if how == LEASED else None, min(BATCH, rows)
        durations_s = []
        for _ in range(rows // batch):
            begin = time.perf_counter()
            meta = self._client.get_meta(fields, batch, partition, task_name=TASK, lease=lease)
            if reads:
                touch(self._client.get_data(meta))
            if lease is not None:
                self._client.ack(meta)
            durations_s.append(time.perf_counter() - begin)
        self._client.reset_consumption(partition, TASK)
        return durations_s


def measure(report: Report, scale: Scale) -> None:
    """The two take turns on the same samples."""
    with Sides({side: {} for side in _SIDES}) as sides:
        writer, consumer = sides.stage(Writer), sides.stage(Consumer)
        rows = max(BATCH, scale.partition_rows[0])
        writer.call(WITHOUT, "fill", _FIXED, rows)
        _take_turns(report, scale, consumer, f"{BATCH} {_FIXED} drawn and read", _FIXED, ["x"], rows, reads=True)
        _take_turns(report, scale, consumer, f"{BATCH} samples drawn", _FIXED, ["x"], rows, reads=False)
        facts = writer.call(WITHOUT, "prepare", "ragged", scale)
        writer.call(WITHOUT, "put", "ragged", max(1, facts.rows // BATCH))
        name = f"{BATCH} {_RAGGED} drawn and read"
        _take_turns(report, scale, consumer, name, whole.PARTITION, list(facts.fields), facts.rows, reads=True)


def _take_turns(
    report: Report,
    scale: Scale,
    consumer: SideStage,
    case: str,
    partition: str,
    fields: list[str],
    rows: int,
    *,
    reads: bool,
) -> None:
    aims = {LEASED: {"at_least": AT_LEAST}} if reads else None
    compared = Compared(report, case, _SIDES, unit=FASTER, aims=aims)
    for side, counts in turns(_SIDES, scale.turns, scale.warm_up):
        compared.add(side, counts, consumer.call(side, "consume", partition, fields, rows, side, reads))
