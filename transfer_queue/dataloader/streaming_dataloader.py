"""The `DataLoader` over a streaming dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.utils.data import DataLoader

from transfer_queue.dataloader.batches import StreamedBatch, handed_out
from transfer_queue.dataloader.handover import Handover
from transfer_queue.dataloader.streaming_dataset import StreamingDataset
from transfer_queue.errors import WrongType
from transfer_queue.metadata import BatchMeta

__all__ = ["StreamingDataLoader"]


class StreamingDataLoader(DataLoader[Any]):
    """Iterates over what a `StreamingDataset` yields; batches are not made anew.

    Arguments are those of `torch.utils.data.DataLoader`. With workers, each draws its own batches ahead, and what is
    handed out is remembered here for `reset` and `get_buffer`. `collate_fn(data, meta)` makes what is handed out.
    """

    dataset: StreamingDataset

    def __init__(
        self,
        dataset: StreamingDataset,
        num_workers: int = 0,
        collate_fn: Callable[[tuple[Any, BatchMeta]], Any] | None = None,
        pin_memory: bool = False,
        worker_init_fn: Callable[[int], None] | None = None,
        multiprocessing_context: Any = None,
        prefetch_factor: int | None = None,
        persistent_workers: bool = False,
        pin_memory_device: str = "",
    ) -> None:
        if not isinstance(dataset, StreamingDataset):
            raise WrongType(f"a StreamingDataLoader takes a StreamingDataset, not {type(dataset).__name__}")
        self._collate = collate_fn
        self._pin = pin_memory
        self._pin_device = pin_memory_device or None
        self._handed_out: list[StreamedBatch] = []  # with workers: their datasets are copies
        self._replay = False
        super().__init__(
            dataset,
            batch_size=None,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=worker_init_fn,
            multiprocessing_context=multiprocessing_context,
            prefetch_factor=prefetch_factor,
            persistent_workers=persistent_workers,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator class
        for piece in self._pieces():
            handed = self._pinned(piece)
            yield handed if self._collate is None else self._collate(handed)

    def _pieces(self) -> Iterator[StreamedBatch]:
        if self.num_workers == 0:
            yield from super().__iter__()
            return
        if self._replay:
            self._replay = False
            yield from list(self._handed_out)
        every = self._iterator_of_workers()
        is_left = True
        try:
            pieces = (piece for piece in every if piece.batch_index >= 0)
            for piece in handed_out(self.dataset.client(), pieces):
                if self.dataset.keep_batches:
                    self._handed_out.append(piece)
                self.dataset.note(piece, self.num_workers)
                yield piece
            is_left = False
        finally:
            if is_left and self._iterator is every:
                self._iterator = None  # workers that persist are ahead of what was handed out

    def _iterator_of_workers(self) -> Iterator[StreamedBatch]:
        if self._iterator is not None:  # workers that persist have their handover, and so has their iterator
            return super().__iter__()
        handover = Handover.if_possible(self.num_workers, self.prefetch_factor or 0)
        if handover is None:
            return super().__iter__()
        self.collate_fn = handover
        try:
            return super().__iter__()  # it keeps the handover
        finally:
            self.collate_fn = _as_it_is
            handover.close()

    def _pinned(self, piece: StreamedBatch) -> tuple[Any, BatchMeta]:
        data, meta = piece
        return (data.pin_memory() if self._pin else data), meta

    def reset(self) -> None:
        """The next iteration begins with what was handed out since the last `step`."""
        self.dataset.reset()
        self._replay = True

    def step(self, partition_id: str) -> None:
        """Go on with another partition; see `StreamingDataset.step`."""
        self.dataset.step(partition_id)
        self._iterator = None  # workers that persist have the old partition
        self._handed_out, self._replay = [], False

    def get_buffer(self) -> list[tuple[Any, BatchMeta]]:
        """What was handed out since the last `step`: batches, or with workers the pieces of them."""
        return list(self._handed_out) if self.num_workers else list(self.dataset.buffer)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is; see `StreamingDataset.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another loader was."""
        self.dataset.load_state_dict(state)

    def close(self) -> None:
        """Give back what was drawn ahead in this process, and disconnect."""
        self.dataset.close()


def _as_it_is(piece: Any) -> Any:
    return piece
