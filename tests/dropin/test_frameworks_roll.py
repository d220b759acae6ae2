"""ROLL: blocking calls from threads and executors, and across forks.

The tests imitate its calls (names of arguments, processes, data); they do not run it.
"""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorStack, TensorDict

import transfer_queue as tq
from tests.dropin.processes import in_processes

USER = {"runtime": "embedded", "layout": "dense", "backend": {"SimpleStorage": {"capacity_bytes": 1 << 25}}}
THREADS = 16
PARTITION = "rollout"


@pytest.fixture
def conf() -> Iterator[Any]:
    tq.close()
    yield tq.init(OmegaConf.create(USER))
    tq.close()


class Store:
    """What the framework has in each process: attached at the first use, under a lock; forgotten in forked children."""

    def __init__(self, conf: Any) -> None:
        self._conf = conf
        self._lock = threading.Lock()
        self._ready_in: int | None = None

    def _attach(self) -> None:
        with self._lock:
            if self._ready_in != os.getpid():
                tq.init(self._conf)
                self._ready_in = os.getpid()

    def put(self, tensors: dict[str, torch.Tensor], others: dict[str, np.ndarray[Any, Any]]) -> list[str]:
        self._attach()
        rows = len(next(iter((tensors | others).values())))
        ids = [str(uuid.uuid4()) for _ in range(rows)]
        fields = TensorDict(tensors, batch_size=rows)
        for name, array in others.items():
            fields[name] = NonTensorStack(*array)
        tq.kv_batch_put(keys=ids, fields=fields, partition_id=PARTITION)
        return ids

    def get(self, ids: list[str], fields: list[str]) -> dict[str, Any]:
        self._attach()
        td = tq.kv_batch_get(keys=ids, select_fields=fields, partition_id=PARTITION)
        assert set(td.keys()) == set(fields)
        assert len(td) == len(ids)
        return {name: td[name] for name in fields}

    def clear(self, ids: list[str]) -> None:
        self._attach()
        tq.kv_clear(keys=ids, partition_id=PARTITION)


def episode(number: int, rows: int = 4) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray[Any, Any]]]:
    """A batch of one environment: tensors of one shape, and arrays of objects."""
    messages = np.empty(rows, dtype=object)
    for row in range(rows):
        messages[row] = [{"role": "user", "content": f"{number}-{row}"}]
    tensors = {"input_ids": torch.full((rows, 6), number), "scores": torch.arange(rows) + float(number)}
    return tensors, {"messages": messages, "traj_id": np.array([f"t{number}"] * rows, dtype=object)}


def one_environment(store: Store, number: int) -> list[str]:
    """Put, read with repeats, clear half of it twice."""
    ids = store.put(*episode(number))
    asked = [ids[0], ids[3], ids[0]]
    found = store.get(asked, ["input_ids", "scores", "messages"])
    assert torch.cat([found["input_ids"], found["input_ids"]]).shape == (6, 6)
    assert found["input_ids"].dtype == torch.int64 and (found["input_ids"] == number).all()
    assert found["scores"].tolist() == [number, number + 3.0, number]
    assert [message[0]["content"] for message in found["messages"]] == [f"{number}-{row}" for row in (0, 3, 0)]
    for _ in range(2):
        store.clear([ids[1], ids[1], ids[3], "never there"])
    return [ids[0], ids[2]]


def _worker(conf: Any, numbers: list[int]) -> list[str]:
    """A worker never closes; its attachment ends with it."""
    store = Store(conf)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda number: one_environment(store, number), numbers)
        return [key for ids in found for key in ids]


def forked(child: Callable[[], bool]) -> Callable[[], bool]:
    """Start a child that inherits this process as it is; returns what waits for it and tells whether it did well."""
    pid = os.fork()
    if pid == 0:
        well = False
        try:
            well = child()
        finally:
            os._exit(0 if well else 1)
    return lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_sixteen_threads_in_each_of_two_workers(conf: Any) -> None:
    """Ids of all of them are one batch for the driver."""
    numbers = list(range(2 * THREADS))
    ids = [key for keys in in_processes(_worker, [(conf, numbers[::2]), (conf, numbers[1::2])]) for key in keys]
    assert sorted(tq.kv_list(PARTITION)[PARTITION]) == sorted(ids)
    found = Store(conf).get(ids, ["input_ids", "scores", "traj_id"])
    assert [f"t{number}" for number in found["input_ids"][:, 0].tolist()] == list(found["traj_id"])
    assert found["scores"].shape == (len(ids),)
    td = tq.kv_batch_get(keys=ids, select_fields=["input_ids"], partition_id=PARTITION)
    index = torch.tensor([3, 1])
    assert torch.equal(td[index]["input_ids"], td["input_ids"][index])
    Store(conf).clear(ids + ids)
    assert tq.kv_list(PARTITION) == {PARTITION: {}}


def test_forked_children_beside_their_busy_parent(conf: Any) -> None:
    """Children of a process with a client and running threads attach anew; the parent's calls go on meanwhile."""
    store = Store(conf)
    ids = store.put(*episode(7))
    stop = threading.Event()
    reads = 0

    def read() -> None:
        nonlocal reads
        while not stop.is_set():
            assert store.get(ids, ["scores"])["scores"].tolist() == [7.0, 8.0, 9.0, 10.0]
            reads += 1

    reader = threading.Thread(target=read)
    reader.start()

    def child(number: int) -> bool:
        try:
            tq.get_client()
        except AssertionError:
            own = one_environment(store, number)
            return store.get([ids[2], own[0]], ["scores"])["scores"].tolist() == [9.0, float(number)]
        return False

    try:
        waits = [forked(lambda number=number: child(number)) for number in range(100, 103)]
        assert [wait() for wait in waits] == [True] * 3
    finally:
        stop.set()
        reader.join()
    assert reads and len(tq.kv_list(PARTITION)[PARTITION]) == 4 + 3 * 2
    more = store.put(*episode(8))
    assert store.get([more[1], ids[1]], ["scores"])["scores"].tolist() == [9.0, 8.0]


def test_a_forked_child_may_use_the_functions_at_once(conf: Any) -> None:
    """Without `init`: they attach to the queue of the parent. So does a child of the child."""
    ids = Store(conf).put(*episode(1))

    def grandchild() -> bool:
        return bool(tq.kv_batch_get(ids[1], PARTITION, "scores")["scores"].tolist() == [2.0])

    def child() -> bool:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda key: tq.kv_batch_get(key, PARTITION, "scores")["scores"].item(), ids))
        return found == [1.0, 2.0, 3.0, 4.0] and forked(grandchild)()

    assert forked(child)()
    assert tq.kv_batch_get(ids[0], PARTITION, "scores")["scores"].tolist() == [1.0]
