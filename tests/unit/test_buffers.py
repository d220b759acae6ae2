"""The pool: memory is reused only when nothing looks at it any more."""

from __future__ import annotations

import gc
import os
import pickle
import threading

import numpy as np
import pytest
import torch

from transfer_queue.client.buffers import POOLED_BYTES, BufferPool
from transfer_queue.storage.mapping import HUGE_BYTES, Bytes

MIB = 1 << 20


def take(pool: BufferPool, size_bytes: int) -> Bytes:
    """Take a buffer for one column."""
    _, [part] = pool.take(size_bytes, [(0, size_bytes)])
    return part


def test_memory_returns_with_the_last_tensor_made_from_it() -> None:
    """Views, storages and slices of slices keep a buffer; the next result of its size gets the same memory."""
    pool = BufferPool()
    array = take(pool, 4 * MIB)
    address = array.ctypes.data
    tensor = torch.from_numpy(array.view(np.float32)).view(torch.bfloat16).view(-1, 8)
    row = tensor[3]
    del array, tensor
    assert pool.idle_bytes == 0
    assert take(pool, 4 * MIB).ctypes.data != address
    storage = row.untyped_storage()
    del row
    gc.collect()
    assert pool.idle_bytes == 4 * MIB, "only the buffer taken and dropped above"
    del storage
    assert pool.idle_bytes == 8 * MIB
    taken = {take(pool, 4 * MIB - 5).ctypes.data, take(pool, 4 * MIB).ctypes.data}
    assert address in taken


def test_results_in_use_never_share_memory() -> None:
    """Two live results have different memory, whatever was returned before."""
    pool = BufferPool()
    live = []
    for number in range(20):
        array = take(pool, 2 * MIB)
        array[:] = number
        if number % 3:
            live.append((number, array))
        del array
    for number, array in live:
        assert (array == number).all()


def test_a_buffer_returns_with_the_last_of_its_parts() -> None:
    """Parts end one by one, in any order; those that live keep their bytes, and the next result is as any other."""
    pool = BufferPool()
    size = 3 * HUGE_BYTES
    for order in ((0, 1, 2), (2, 0, 1)):
        whole, parts = pool.take(3 * size, [(number * size, size) for number in range(3)])
        whole[:] = np.arange(whole.nbytes) % 251
        address = whole.ctypes.data
        wanted = [int(part.sum()) for part in parts]
        del whole
        left = dict(enumerate(parts))
        parts.clear()
        for number in order[:2]:
            del left[number]
            assert pool.idle_bytes == 0
            sums = {other: int(part.sum()) for other, part in left.items()}
            assert sums == {other: wanted[other] for other in left}
        left.clear()
        assert pool.idle_bytes >= 3 * size
        again = take(pool, 3 * size)
        assert again.ctypes.data == address
        again[:] = 7
        assert (again == 7).all()
        del again


def test_small_results_are_not_pooled_and_idle_memory_is_bounded() -> None:
    """Small arrays are plain ones; beyond the bound a buffer goes back to the system."""
    pool = BufferPool(max_idle_bytes=3 * MIB)
    assert take(pool, POOLED_BYTES - 1).nbytes == POOLED_BYTES - 1
    assert take(pool, 0).nbytes == 0
    held = [take(pool, 2 * MIB) for _ in range(3)]
    assert pool.idle_bytes == 0
    held.clear()
    assert pool.idle_bytes == 2 * MIB
    assert repr(pool) == f"<BufferPool: {2 * MIB} of {3 * MIB} bytes idle>"
    pool.clear()
    assert pool.idle_bytes == 0


def test_a_tensor_of_a_larger_buffer_pickles_to_its_own_size() -> None:
    """A result is pickled without the rest of its buffer."""
    tensor = torch.from_numpy(take(BufferPool(), MIB + 1))
    assert len(pickle.dumps(tensor)) < MIB + 2000


def test_threads_can_share_a_pool() -> None:
    """Buffers taken and dropped by several threads are never given to two at once."""
    pool = BufferPool(max_idle_bytes=8 * MIB)
    failures = []

    def work(number: int) -> None:
        for _ in range(100):
            array = take(pool, MIB + 4096 * (number % 2))
            array[::4096] = number
            if (array[::4096] != number).any():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and pool.idle_bytes <= 8 * MIB


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_write_into_its_parents_results() -> None:
    """After a fork both sides go on with their own copies."""
    pool = BufferPool()
    array = take(pool, MIB)
    array[:] = 1
    child = os.fork()
    if child == 0:
        array[:] = 2
        del array
        take(pool, MIB)[:] = 3
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (array == 1).all()
