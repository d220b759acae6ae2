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
NOT_WAITED = "leased, acknowledged without waiting"
AT_LEAST = 0.9  # of the throughput without leases, of a consumer that reads what it draws

_SIDES = (WITHOUT, LEASED, NOT_WAITED)
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
        """Return the seconds that a batch took on average, drawn and, if so told, read to the last byte.

        `how` is one of the sides. The clock stops when the last acknowledgement is answered.
        """
        lease, batch = None if how == WITHOUT else LEASE_S, min(BATCH, rows)
        begin = time.perf_counter()
        for _ in range(rows // batch):
            meta = self._client.get_meta(fields, batch, partition, task_name=TASK, lease=lease)
            if reads:
                touch(self._client.get_data(meta))
            if lease is not None:
                self._client.ack(meta, wait=how == LEASED)
        self._client.get_partition_list()  # comes behind all acknowledgements
        duration_s = time.perf_counter() - begin
        self._client.reset_consumption(partition, TASK)
        return [duration_s / (rows // batch)]


def measure(report: Report, scale: Scale) -> None:
    """The three take turns on the same samples."""
    with Sides({side: {} for side in _SIDES}) as sides:
        writer, consumer = sides.stage(Writer), sides.stage(Consumer)
        rows = 4 * max(BATCH, scale.partition_rows[0])  # so that the last acknowledgements of a turn weigh little
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
    aims = {NOT_WAITED: {"at_least": AT_LEAST}} if reads else None
    compared = Compared(report, case, _SIDES, unit=FASTER, aims=aims)
    for side, counts in turns(_SIDES, scale.turns, scale.warm_up):
        compared.add(side, counts, consumer.call(side, "consume", partition, fields, rows, side, reads))
