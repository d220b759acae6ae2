"""Batches on their way from the queue to whoever iterates."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDict

from transfer_queue.client.client import TransferQueueClient
from transfer_queue.errors import InvalidArgument, LeaseExpired, WrongType
from transfer_queue.metadata import BatchMeta

log = logging.getLogger("transfer_queue")


class StreamedBatch(tuple[Any, BatchMeta]):
    """(data, meta), and where it belongs in the stream.

    batch_index   of the batch it was cut from
    piece         it is the batch's piece number so and so, from 0 ...
    is_last       ... and the last one
    """

    batch_index: int
    piece: int
    is_last: bool

    @classmethod
    def of(cls, data: Any, meta: BatchMeta, batch_index: int, piece: int, is_last: bool) -> StreamedBatch:
        batch = cls((data, meta))
        batch.batch_index, batch.piece, batch.is_last = batch_index, piece, is_last
        return batch

    @property
    def meta(self) -> BatchMeta:
        return self[1]


def handed_out(client: TransferQueueClient, pieces: Iterable[StreamedBatch]) -> Iterator[StreamedBatch]:
    """The pieces that still are this process's; leased ones are acknowledged when the next is asked for, or none more.

    What a process that dies had in hand is so handed out again, to it or to others.
    """
    for piece in pieces:
        meta = piece.meta
        if not meta.is_leased:
            yield piece
        elif _is_held(client, meta):
            try:
                yield piece
            finally:
                _acknowledge(client, meta)


def _is_held(client: TransferQueueClient, meta: BatchMeta) -> bool:
    """Whether the lease lasts; one that may have run out while the piece waited in a queue is renewed if it can be."""
    if (meta.lease_deadline_s or 0.0) > time.monotonic():
        return True
    try:
        client.renew(meta)
    except LeaseExpired:
        return False
    return True


def _acknowledge(client: TransferQueueClient, meta: BatchMeta) -> None:
    try:
        client.ack(meta)
    except LeaseExpired as error:
        log.warning("%d samples took longer than their lease and are handed out again: %s", meta.size, error)


def chunk_batch_fn(
    td: TensorDict, batch_meta: BatchMeta, micro_batch_size: int = 1
) -> Iterator[tuple[TensorDict, BatchMeta]]:
    """Cut a batch into micro-batches, data and meta at the same rows; the last may be smaller. Layouts are kept.

    Raises `WrongType` for what is no `TensorDict`; `InvalidArgument` for a size that is no positive int or larger than
    the batch, and for data without a batch dimension.
    """
    if not isinstance(td, TensorDict):
        raise WrongType(f"a batch to cut is a TensorDict, not {type(td).__name__}")
    if isinstance(micro_batch_size, bool) or not isinstance(micro_batch_size, int) or micro_batch_size < 1:
        raise InvalidArgument(f"micro_batch_size must be a positive int, not {micro_batch_size!r}")
    if not td.batch_size:
        raise InvalidArgument("the data has no batch dimension to cut along")
    rows = td.batch_size[0]
    if micro_batch_size > rows:
        raise InvalidArgument(f"micro_batch_size {micro_batch_size} is larger than the batch of {rows} rows")
    return _chunks(td, batch_meta, micro_batch_size)


def _chunks(td: TensorDict, meta: BatchMeta, size: int) -> Iterator[tuple[TensorDict, BatchMeta]]:
    rows = td.batch_size[0]
    for begin in range(0, rows, size):
        end = min(begin + size, rows)
        columns = {name: _rows(value, begin, end) for name, value in td.items()}
        yield TensorDict(columns, batch_size=[end - begin]), meta[begin:end]


def _rows(values: Any, begin: int, end: int) -> Any:
    """Rows [begin, end) of a column; nested tensors cannot be sliced."""
    if not isinstance(values, torch.Tensor) or not values.is_nested:
        return values[begin:end]
    if values.layout != torch.jagged:
        return torch.nested.as_nested_tensor(list(values.unbind()[begin:end]), layout=values.layout)
    nested: Any = values  # its class, NestedTensor, is not public
    offsets = nested.offsets()[begin : end + 1]
    return torch.nested.nested_tensor_from_jagged(values.values()[offsets[0] : offsets[-1]], offsets - offsets[0])
