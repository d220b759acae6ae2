"""A dataset whose batches are drawn from the queue as they become ready."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from torch.utils.data import IterableDataset, get_worker_info

from transfer_queue import environment
from transfer_queue.client.client import TransferQueueClient
from transfer_queue.dataloader.batches import StreamedBatch, chunk_batch_fn, handed_out
from transfer_queue.errors import GetMetaTimeout, InvalidArgument, WrongType
from transfer_queue.metadata import BatchMeta, ZMQServerInfo

__all__ = ["StreamingDataset", "chunk_batch_fn", "default_fetch_batch_fn"]

log = logging.getLogger("transfer_queue")

Fetched = tuple[Any, BatchMeta]  # (data or None, meta)

NOTHING_YET = StreamedBatch.of(None, BatchMeta(), -1, 0, False)

_NOTHING: Fetched = (None, BatchMeta())
_LOOK_AGAIN_S = 1.0
_SHARED_WAIT_S = 0.1  # of one worker of several, whose loader waits for them in turn


class FetchBatch(Protocol):
    """How the next batch is fetched. Without one, the data is None."""

    def __call__(
        self,
        *,
        tq_client: TransferQueueClient,
        data_fields: Sequence[str],
        batch_size: int,
        partition_id: str,
        task_name: str,
        sampling_config: Mapping[str, Any],
        batch_index: int,
    ) -> Fetched: ...


def default_fetch_batch_fn(
    tq_client: TransferQueueClient,
    data_fields: Sequence[str],
    batch_size: int,
    partition_id: str,
    task_name: str,
    sampling_config: Mapping[str, Any],
    batch_index: int,
    lease: float | None = None,
    wait_s: float | None = None,
) -> Fetched:
    """Draw a batch and read it; `(None, empty meta)` if there is none within `wait_s`.

    The draw waits at the controller, so data that becomes ready ends the wait at once. `wait_s=None`: a second, or what
    `TQ_STREAMING_DATASET_EMPTY_BATCH_SLEEP_INTERVAL` says.
    """
    if wait_s is None:
        wait_s = environment.seconds("TQ_STREAMING_DATASET_EMPTY_BATCH_SLEEP_INTERVAL") or _LOOK_AGAIN_S
    try:
        meta = tq_client.get_meta(
            data_fields=list(data_fields),
            batch_size=batch_size,
            partition_id=partition_id,
            task_name=task_name,
            sampling_config={**sampling_config, "batch_index": batch_index},
            timeout=wait_s,
            lease=lease,
        )
    except GetMetaTimeout:
        return None, BatchMeta()
    return (tq_client.get_data(meta), meta) if meta.size else (None, meta)


class StreamingDataset(IterableDataset[tuple[Any, BatchMeta]]):
    """Iterates over (data, meta) of micro-batches, drawn by one rank of a task from one partition.

    config            of the queue, as `init` returned it
    batch_size        rows of one draw
    micro_batch_size  rows of what is yielded; the last of a batch may have fewer
    data_fields       that a row must have to be drawn, and that are read
    dp_rank           goes to the sampler, with the number of the batch, so that ranks agree on a batch
    should_check_consumption_status  end when the task consumed the partition, or it is sealed and drained. Otherwise
                      the iteration goes on for ever
    fetch_batch_fn    in place of `default_fetch_batch_fn`
    process_batch_fn  `(data, meta, micro_batch_size=)` -> what is yielded, in place of `chunk_batch_fn`
    lease             draw under leases of so many seconds: samples count as consumed when who iterates asks for the
                      next ones, and what a process had in hand or drawn ahead when it died is drawn again. `None`:
                      consumed when drawn
    keep_batches      keep what was yielded in `buffer`, for `reset`

    While a batch is worked on the next one is drawn and read by a thread. In a worker of a `DataLoader` the batches are
    w, w + W, w + 2 W … for worker w of W. The client is made in the process that iterates, from `config` alone.
    """

    def __init__(
        self,
        config: Any,
        batch_size: int,
        micro_batch_size: int,
        data_fields: Sequence[str],
        partition_id: str,
        task_name: str,
        dp_rank: int,
        should_check_consumption_status: bool = False,
        fetch_batch_fn: FetchBatch | None = None,
        process_batch_fn: Callable[..., Iterable[Fetched]] | None = None,
        *,
        lease: float | None = None,
        keep_batches: bool = True,
    ) -> None:
        _check_positive("batch_size", batch_size)
        _check_positive("micro_batch_size", micro_batch_size)
        if isinstance(data_fields, str):
            raise WrongType(f"data_fields is a list of names, not {data_fields!r}")
        if not data_fields:
            raise InvalidArgument("data_fields is empty: name the fields that a sample must have")
        if isinstance(dp_rank, bool) or not isinstance(dp_rank, int) or dp_rank < 0:
            raise InvalidArgument(f"dp_rank must be an int of at least 0, not {dp_rank!r}")
        if lease is not None and fetch_batch_fn is not None:
            raise InvalidArgument("lease is for the default fetch_batch_fn: pass it to get_meta in your own")
        self.config = config
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.data_fields = list(data_fields)
        self.partition_id = partition_id
        self.task_name = task_name
        self.dp_rank = dp_rank
        self.should_check_consumption_status = should_check_consumption_status
        self.fetch_batch_fn = fetch_batch_fn
        self.process_batch_fn = process_batch_fn or chunk_batch_fn
        self.lease = lease
        self.keep_batches = keep_batches
        self._batches: list[tuple[int, Fetched]] = []
        self._replay: deque[tuple[int, Fetched]] = deque()
        self._current: tuple[int, Fetched] | None = None  # of which maybe not all pieces were yielded
        self._positions: dict[int, _Position] = {}  # per worker
        self._consumed = False  # all was, when this process last looked
        self._fewer: int | None = None  # rows that are left at the end of the stream
        self._local: _Local | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_local": None}

    # ------------------------------------------------------------ iterating

    def __iter__(self) -> Iterator[StreamedBatch]:
        """Go on behind the last piece that was yielded; after `reset`, yield the batches of the buffer first.

        A leased piece is acknowledged when the next one is asked for; those of workers are by the loader.
        """
        info = get_worker_info()
        if info is not None:
            for piece in self.pieces(info.id, info.num_workers):
                if piece is not NOTHING_YET:
                    self.note(piece, info.num_workers)  # a worker that persists goes on here
                yield piece
            return
        while self._replay:
            index, fetched = self._replay.popleft()
            yield from self._cut(fetched, index)
        for piece in handed_out(self.client(), self.pieces(0, 1)):
            self.note(piece, 1)
            yield piece

    def pieces(self, worker: int, workers: int) -> Iterator[StreamedBatch]:
        """What this worker of so many yields from its position on.

        One of several that draw under leases yields `NOTHING_YET` from time to time when nothing comes: the stream ends
        when everything is acknowledged, and the loader can do that only with what it is handed.
        """
        begun = self._positions.get(worker, _Position(worker))
        index, done = begun.batch, begun.pieces
        while True:
            if self._current is None or self._current[0] != index:
                fetched = self._next(index, workers)
                if fetched is None:
                    return
                if fetched is _NOTHING:
                    if workers > 1 and self.lease is not None:
                        yield NOTHING_YET
                    continue
                self._current = index, fetched
                if done and not begun.lies_in(fetched[1]):
                    done = 0  # the draw got another batch than the one that was begun
                if self.keep_batches and workers == 1:
                    self._batches.append(self._current)
            yield from itertools.islice(self._cut(self._current[1], index), done, None)
            index, done = index + workers, 0

    def note(self, piece: StreamedBatch, workers: int) -> None:
        """This piece was handed out: another iteration goes on behind it."""
        index, meta = piece.batch_index, piece.meta
        last_row = (int(meta.indexes[-1]), int(meta.generations[-1])) if meta.size else ()
        goes_on = _Position(index + workers) if piece.is_last else _Position(index, piece.piece + 1, *last_row)
        self._positions[index % workers] = goes_on

    def _cut(self, fetched: Fetched, index: int) -> Iterator[StreamedBatch]:
        data, meta = fetched
        size = self.micro_batch_size
        if self.process_batch_fn is chunk_batch_fn:
            size = min(size, meta.size)  # a sampler may choose fewer rows than were asked for
        pieces = iter(self.process_batch_fn(data, meta, micro_batch_size=size))
        piece = next(pieces, None)
        for number in itertools.count():
            if piece is None:
                return
            following = next(pieces, None)
            yield StreamedBatch.of(*piece, index, number, following is None)
            piece = following

    def _next(self, index: int, step: int) -> Fetched | None:
        """The batch of this number, None at the end of the stream. Draws what comes then in the background."""
        here = self._here()
        data, meta = here.take(index)
        if data is not None:
            self._consumed, self._fewer = False, None
            here.begin(index + step, at_once=self.should_check_consumption_status)
            return data, meta
        if self._consumed:
            return None
        if _is_end(meta):
            self._fewer = meta.extra_info["batch_size"] or None
            if self._fewer is None and self.should_check_consumption_status:
                if meta.extra_info["left"]:
                    log.warning("the last %d rows are too few for groups or ranks", meta.extra_info["left"])
                return None
        # a batch that a peer drew meanwhile may be there for this rank too: when all is consumed, look once more
        self._consumed = self.should_check_consumption_status and self._is_consumed(here.client)
        here.begin(index, at_once=self._consumed)
        return _NOTHING

    def _is_consumed(self, client: TransferQueueClient) -> bool:
        return client.check_consumption_status(self.task_name, self.partition_id)

    def _fetch(self, client: TransferQueueClient, index: int, at_once: bool) -> Fetched:
        """Called in the thread that draws ahead."""
        options: dict[str, Any] = {}
        if self.fetch_batch_fn is None:
            shared = self.lease is not None and get_worker_info() is not None
            options = {"lease": self.lease, "wait_s": 0.0 if at_once else _SHARED_WAIT_S if shared else None}
        sampling = {"dp_rank": self.dp_rank, "task_name": self.task_name, "partition_id": self.partition_id}
        fetch: Any = self.fetch_batch_fn or default_fetch_batch_fn
        fetched: Fetched = fetch(
            tq_client=client,
            data_fields=self.data_fields,
            batch_size=self._fewer or self.batch_size,
            partition_id=self.partition_id,
            task_name=self.task_name,
            sampling_config={**sampling, "batch_index": index},
            batch_index=index,
            **options,
        )
        if fetched[0] is None and not self.should_check_consumption_status and _is_end(fetched[1]):
            time.sleep(_LOOK_AGAIN_S)  # the end is told at once; this stream waits for its partition to begin anew
        return fetched

    # ------------------------------------------------------------ moving on

    @property
    def buffer(self) -> list[Fetched]:
        """(data, meta) of the batches drawn since the last `step`. With the workers of a loader: see there."""
        return [fetched for _, fetched in self._batches]

    def reset(self) -> None:
        """The next iteration begins with the batches of the buffer."""
        self._replay = deque(self._batches)
        if self._batches:
            self._positions[0] = _Position(self._batches[-1][0] + 1)

    def step(self, partition_id: str) -> None:
        """Go on with another partition, from its first batch; the buffer is emptied.

        A batch of the old partition that was drawn ahead is given back if it is leased, and otherwise given up.
        """
        if self._local is not None:
            self._local.drop()
        self.partition_id = partition_id
        self._batches, self._replay, self._current, self._positions = [], deque(), None, {}
        self._consumed, self._fewer = False, None

    def close(self) -> None:
        """Give back what was drawn ahead, and disconnect. The dataset can be iterated again."""
        if self._local is not None:
            self._local.close()
            self._local = None

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, for `load_state_dict` in a process that goes on from here with as many workers."""
        positions = {str(worker): list(position) for worker, position in self._positions.items()}
        return {"partition_id": self.partition_id, "positions": positions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind what another dataset had handed out."""
        self.step(state["partition_id"])
        self._positions = {int(worker): _Position(*position) for worker, position in state["positions"].items()}

    def client(self) -> TransferQueueClient:
        """The client of this process for this dataset."""
        return self._here().client

    def _here(self) -> _Local:
        if self._local is None or self._local.pid != os.getpid():
            self._local = _Local(self)
        return self._local


class _Position(NamedTuple):
    """How far a worker is in the stream.

    batch, pieces      the number of a batch, and how many pieces of it were handed out
    row, generation    of the last sample of these
    """

    batch: int
    pieces: int = 0
    row: int = -1
    generation: int = -1

    def lies_in(self, meta: BatchMeta) -> bool:
        """Whether this is the batch that was begun: a sampler may deal by number, or give what comes next."""
        return bool(((meta.indexes == self.row) & (meta.generations == self.generation)).any())


class _Local:
    """What a dataset has in one process: a client, and a thread that draws ahead."""

    def __init__(self, dataset: StreamingDataset) -> None:
        info = dataset.config["controller"]["zmq_info"]
        if not isinstance(info, ZMQServerInfo):
            raise InvalidArgument(
                f"config.controller.zmq_info is {info!r}: pass the configuration that transfer_queue.init() returned"
            )
        self.pid = os.getpid()
        self.client = TransferQueueClient(f"streaming-{dataset.task_name}-{dataset.dp_rank}-{self.pid}", info)
        self._dataset = dataset
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transfer_queue streaming")
        self._ahead: tuple[int, Future[Fetched]] | None = None

    def begin(self, index: int, at_once: bool = False) -> Future[Fetched]:
        """Start to draw this batch; `at_once`: if it is there, so that the end of the stream is seen without a wait."""
        future = self._thread.submit(self._dataset._fetch, self.client, index, at_once)
        self._ahead = index, future
        return future

    def take(self, index: int) -> Fetched:
        """The batch of this number, drawn ahead or now. Raises what its fetch raised."""
        ahead = self._ahead
        if ahead is not None and ahead[0] != index:
            self.drop()
            ahead = None
        future = self.begin(index) if ahead is None else ahead[1]
        try:
            return future.result()
        finally:
            self._ahead = None

    def drop(self) -> None:
        """Give back a batch that was drawn ahead, if it is leased."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[1].cancel() or ahead[1].exception() is not None:
            return
        _, meta = ahead[1].result()
        if meta.size and meta.is_leased:
            self.client.release(meta)

    def close(self) -> None:
        try:
            self.drop()
        finally:
            self._thread.shutdown()
            self.client.close()


def _is_end(meta: BatchMeta) -> bool:
    """No more rows come, and those that are left are too few for the batch."""
    return bool(meta.extra_info.get("end_of_stream"))


def _check_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidArgument(f"{name} must be a positive int, not {value!r}")
