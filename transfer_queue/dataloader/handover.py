"""How the workers of a loader hand over tensors: through memory that both sides have mapped and use again and again.

What `multiprocessing` does for each tensor, a file of fresh pages whose descriptor is passed over a connection that is
made and proved for it, takes more processor time than all the rest of a micro-batch of 1 MiB.

Each worker has a shelf of a few slots. It copies the tensors of a piece into a free slot and sends where they lie; the
loader makes tensors that are views of the slot. When none of them, nor any view of theirs, is left, the slot is free.
While all slots are taken, because pieces are kept, pieces go the way of `multiprocessing`; so do tensors that do not
fit, and all but contiguous ones of the CPU.

A slot holds its pages until the loader and all views of the shelf are gone. A child that the loader's process forks
frees no slots; it must not read pieces that its parent has given up.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import mmap
import os
import pickle
import weakref
from multiprocessing.reduction import DupFd, ForkingPickler
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import get_worker_info

log = logging.getLogger("transfer_queue")

SLOT_BYTES = 64 << 20  # of addresses: a slot has the memory that its largest piece took

_SPARE_SLOTS = 3  # one that is filled, and two pieces that the loop still names: the last and the next
_ALIGNMENT = 64
_HEAD_BYTES = mmap.PAGESIZE  # a byte per slot: 1 while it is taken

_Place: TypeAlias = "tuple[int, torch.dtype, tuple[int, ...]]"  # of a tensor: offset in the slot, dtype, shape


class Handover:
    """The `collate_fn` of a loader whose workers are about to start. It must live as long as their messages may come.

    prefetched  pieces of one worker that may be on their way
    """

    def __init__(self, workers: int, prefetched: int) -> None:
        slots = min(prefetched + _SPARE_SLOTS, _HEAD_BYTES)
        self._shelves: list[_Shelf] = []
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            self._shelves += (_Shelf(slots) for _ in range(workers))
            undo.pop_all()

    @classmethod
    def if_possible(cls, workers: int, prefetched: int) -> Handover | None:
        """None, with a warning, where the system gives no such memory: pieces then go the way of `multiprocessing`."""
        try:
            return cls(workers, prefetched)
        except OSError as error:
            log.warning("workers hand over their batches the slower way, through new memory for each: %s", error)
            return None

    def __call__(self, piece: Any) -> Any:
        """Called in a worker: what it sends for this piece, which arrives as an equal one."""
        info = get_worker_info()
        assert info is not None
        return self._shelves[info.id].packed(piece)

    def close(self) -> None:
        """The workers were started: no others can be."""
        for shelf in self._shelves:
            shelf.close()


class _Shelf:
    """The slots of one worker, in the loader's process and in the worker.

    Only the worker marks a slot as taken, and only the loader's process marks it as free: no lock is needed.
    """

    def __init__(self, slots: int) -> None:
        self._token = next(_tokens)
        self._slots = slots
        self._file = _file_of(os.memfd_create("transfer_queue loader"))
        try:
            os.ftruncate(self._file.fileno(), _HEAD_BYTES + slots * SLOT_BYTES)
            self._memory = mmap.mmap(self._file.fileno(), 0)
        except OSError:
            self.close()
            raise
        _shelves[self._token] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"token": self._token, "slots": self._slots, "file": DupFd(self._file.fileno())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._token, self._slots = state["token"], state["slots"]
        with _file_of(state["file"].detach()) as self._file:
            self._memory = mmap.mmap(self._file.fileno(), 0)

    def close(self) -> None:
        """Keep the mapping alone. May be called twice."""
        self._file.close()

    def packed(self, piece: Any) -> Any:
        """Put the tensors of a piece into a free slot; the piece itself if there is none."""
        slot = self._memory.find(b"\0", 0, self._slots)
        if slot < 0:
            return piece
        self._memory[slot] = 1
        stream = io.BytesIO()
        packer = _Packer(stream, self._memory, _start(slot))
        try:
            packer.dump(piece)
        except BaseException:
            self._memory[slot] = 0
            raise
        return _Parcel(self._token, slot, packer.used_bytes, stream.getvalue())

    def opened(self, slot: int, used_bytes: int, content: bytes) -> Any:
        """The piece that lies in this slot."""
        lying = np.frombuffer(self._memory, np.uint8, max(used_bytes, 1), _start(slot))
        # Tensors made from it, their storages and views of them keep it alive.
        weakref.finalize(lying, _free, self._memory, slot, os.getpid()).atexit = False
        return _Opener(io.BytesIO(content), lying).load()


_tokens = itertools.count()
_shelves: weakref.WeakValueDictionary[int, _Shelf] = weakref.WeakValueDictionary()  # of this process, by token


def _file_of(descriptor: int) -> io.FileIO:
    return io.FileIO(descriptor, "r+")


def _start(slot: int) -> int:
    return _HEAD_BYTES + slot * SLOT_BYTES


def _free(memory: mmap.mmap, slot: int, pid: int) -> None:
    if os.getpid() == pid:
        memory[slot] = 0


class _Parcel:
    """What a worker sends for a piece; it arrives as the piece."""

    def __init__(self, token: int, slot: int, used_bytes: int, content: bytes) -> None:
        self._arguments = token, slot, used_bytes, content

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, self._arguments


def _opened(token: int, slot: int, used_bytes: int, content: bytes) -> Any:
    return _shelves[token].opened(slot, used_bytes, content)


class _Packer(ForkingPickler):
    """Pickles a piece; its tensors go into a slot as far as there is room."""

    def __init__(self, stream: io.BytesIO, memory: mmap.mmap, start: int) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._memory = memory
        self._start = start
        self.used_bytes = 0
        self._places: dict[int, tuple[torch.Tensor, _Place]] = {}  # by id; what is pickled twice arrives as one tensor

    def persistent_id(self, value: Any) -> _Place | None:
        """Where a tensor lies now; None for what is pickled."""
        if type(value) is not torch.Tensor or not _is_plain(value):
            return None
        if id(value) in self._places:
            return self._places[id(value)][1]
        begin = -(-self.used_bytes // _ALIGNMENT) * _ALIGNMENT
        end = begin + value.nbytes
        if end > SLOT_BYTES:
            return None
        lying = torch.frombuffer(self._memory, dtype=torch.uint8, count=value.nbytes, offset=self._start + begin)
        lying.copy_(value.view(-1).view(torch.uint8))
        self.used_bytes = end
        place = begin, value.dtype, tuple(value.shape)
        self._places[id(value)] = value, place
        return place


class _Opener(pickle.Unpickler):
    """Loads what a `_Packer` pickled; `lying` are the bytes of the slot."""

    def __init__(self, stream: io.BytesIO, lying: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        super().__init__(stream)
        self._lying = lying
        self._tensors: dict[int, torch.Tensor] = {}  # by offset

    def persistent_load(self, place: _Place) -> torch.Tensor:
        begin, dtype, shape = place
        if begin not in self._tensors:
            tensor = torch.frombuffer(self._lying, dtype=dtype, count=math.prod(shape), offset=begin)
            self._tensors[begin] = tensor.view(shape)
        return self._tensors[begin]


def _is_plain(value: torch.Tensor) -> bool:
    """Whether its bytes, dtype and shape are all there is to it, and nobody else has it in shared memory."""
    return (
        value.layout is torch.strided
        and value.device.type == "cpu"
        and not (value.is_nested or value.is_quantized or value.requires_grad or value.is_conj() or value.is_neg())
        and value.is_contiguous()
        and value.numel() > 0
        and not value.untyped_storage().is_shared()
    )
