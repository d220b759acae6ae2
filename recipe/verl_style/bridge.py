"""Between a driver that holds metadata and workers that hold rows.

A worker's method is written from `DataProto` to `DataProto`; `on_batch` makes of it one from `KVBatchMeta` to
`KVBatchMeta`, as verl's `tqbridge` does. A `WorkerGroup` cuts the batch of a call into one piece per worker and puts
their answers together, as verl's dispatch mode `DP_COMPUTE_PROTO` does. No row passes through the driver.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from recipe.verl_style.protocol import DataProto, from_data_proto, to_data_proto
from transfer_queue import KVBatchMeta

if TYPE_CHECKING:
    from recipe.grpo_tiny.runtimes import Runtime
    from transfer_queue import TransferQueueClient

METRICS = "metrics"  # in `meta_info` of what a worker returns: {name: number}; of a group's answer: {name: [number]}


class BatchWorker:
    """A worker that reads and writes the rows of the batches it is called with."""

    def __init__(self, client: TransferQueueClient) -> None:
        self.client = client

    def read(self, batch: KVBatchMeta, fields: Sequence[str]) -> DataProto:
        """All of these rows and fields; raises `KeyNotFound` or `UnknownName` for what is missing."""
        rows = self.client.kv_batch_get(batch.keys, batch.partition_id, list(fields), strict=True)
        return to_data_proto(rows, batch.extra_info)

    def write(
        self, batch: KVBatchMeta, result: DataProto, tags: Sequence[Mapping[str, Any]] | None = None
    ) -> KVBatchMeta:
        """Add fields and tag entries to the rows; returns their metadata, with the batch's and the result's info."""
        rows, meta_info = from_data_proto(result)
        written = self.client.kv_batch_put(batch.keys, batch.partition_id, rows, tags)
        written.extra_info = {**batch.extra_info, **meta_info}
        return written


WorkerT = TypeVar("WorkerT", bound=BatchWorker)


def on_batch(
    *fields: str,
) -> Callable[[Callable[[WorkerT, DataProto], DataProto]], Callable[[WorkerT, KVBatchMeta], KVBatchMeta]]:
    """The method gets these fields of the rows, and what it returns becomes fields of the same rows."""

    def bridge(method: Callable[[WorkerT, DataProto], DataProto]) -> Callable[[WorkerT, KVBatchMeta], KVBatchMeta]:
        @functools.wraps(method)
        def bridged(self: WorkerT, batch: KVBatchMeta) -> KVBatchMeta:
            return self.write(batch, method(self, self.read(batch, fields)))

        return bridged

    return bridge


class WorkerGroup:
    """`size` workers of one kind, started on a runtime; `worker(connect, *arguments, rank)` makes each."""

    def __init__(self, runtime: Runtime, worker: Callable[..., Any], size: int, *arguments: Any) -> None:
        self._runtime = runtime
        self.workers = [runtime.spawn(worker, *arguments, rank) for rank in range(size)]

    def start(self, method: str, *arguments: Any) -> list[Any]:
        """Call all workers; return one future each, at once."""
        return [self._runtime.call(worker, method, *arguments) for worker in self.workers]

    def call(self, method: str, *arguments: Any) -> list[Any]:
        return self._runtime.gather(self.start(method, *arguments))

    def dispatch(self, method: str, batch: KVBatchMeta) -> KVBatchMeta:
        """Call each worker with its contiguous share of the batch; what they measured is in `extra_info`."""
        shares = zip(self.workers, batch.chunk(len(self.workers)), strict=True)
        pieces = self._runtime.gather([self._runtime.call(worker, method, share) for worker, share in shares])
        measured = [piece.extra_info.pop(METRICS, {}) for piece in pieces]
        whole = KVBatchMeta.concat(pieces)
        whole.extra_info[METRICS] = _by_name(measured)
        return whole


def _by_name(measured: Iterable[Mapping[str, float]]) -> dict[str, list[float]]:
    columns: dict[str, list[float]] = defaultdict(list)
    for numbers in measured:
        for name, number in numbers.items():
            columns[name].append(number)
    return dict(columns)
