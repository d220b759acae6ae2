"""The processes of the workload. Each runs its loop until a file in the control folder tells it to stop.

producer   puts new samples, in whole groups, of random number and size
scorer     draws under a lease, adds the field `score`, acknowledges or releases
looker     draws whole groups under a lease, acknowledges or releases
trainer    a data-parallel rank: its slices of named groups, under leases
cleaner    clears what every task has consumed
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.chaos.caller import Caller
from tests.chaos.proxy import ProxyConnector
from tests.chaos.samples import GROUP, SCORE, damaged, fields_of, scores_of
from tests.chaos.sidelog import SideLog
from transfer_queue import TransferQueueClient
from transfer_queue.errors import (
    BlockLost,
    CapacityExceeded,
    ConnectionLost,
    DeadlineExceeded,
    LeaseExpired,
    RemoteError,
    StaleSampleError,
)
from transfer_queue.metadata import BatchMeta, ZMQServerInfo

PARTITIONS = ("a", "b")
TASKS = ("score", "look", "train")
MOST_ROWS = 8  # of one draw
RANKS = 2
SLICE = 4  # samples of one rank
STOP, STOP_PRODUCING = "stop", "stop-producing"

_DRAW_S = 0.5
_LAST_DRAW_S = 0.05  # once nothing more comes, the other partition may be the one with samples
_PAUSE_S = 0.3  # of the cleaner
_EXPECTED = (BlockLost, ConnectionLost, DeadlineExceeded, LeaseExpired, RemoteError)  # the judge knows when each may be
_REFUSED_S = 0.05  # until the next try, where there was no room


@dataclass(frozen=True)
class Order:
    """What a process of the workload is told; plain values, so that it travels as JSON.

    first   the sequence number (producer) or the steps by partition (trainer) to begin with, behind earlier lives
    proxy   folder of the sockets of a proxy, by which the process reaches the servers; None: directly
    """

    role: str
    number: int
    life: int
    seed: int
    controller: dict[str, Any]
    control: str
    logs: str
    first: Any = None
    lease_s: float = 4.0
    timeout_s: float = 20.0
    transport: str = "auto"
    checksums: bool = False
    proxy: str | None = None

    @property
    def name(self) -> str:
        return f"{self.role}-{self.number}-{self.life}"


def client_of(order: Order) -> TransferQueueClient:
    """Return a client as the order says."""
    info = ZMQServerInfo.from_record(order.controller)
    connector = None if order.proxy is None else ProxyConnector(info, order.proxy)
    return TransferQueueClient(
        order.name, info, transport=order.transport, checksums=order.checksums, connector=connector
    )


class Worker:
    """What all roles have: a logged client, the same random choices for the same order, and an end."""

    def __init__(self, order: Order) -> None:
        self.order = order
        self.random = random.Random(f"{order.seed} {order.name}")
        self.log = SideLog(Path(order.logs) / f"{order.name}.log")
        self.client = client_of(order)
        self.caller = Caller(self.client, self.log)

    def run(self) -> None:
        """Work until told to stop; what the library may raise under faults only ends one turn."""
        turn = TURNS[self.order.role](self)
        stop = STOP_PRODUCING if self.order.role == "producer" else STOP
        path = Path(self.order.control) / stop
        self.log.note("start", lease_s=self.order.lease_s)
        while not path.exists():
            with contextlib.suppress(*_EXPECTED):
                try:
                    turn()
                except CapacityExceeded:
                    time.sleep(_REFUSED_S)
        self.client.close()
        self.log.note("stop")
        self.log.close()

    @property
    def draining(self) -> bool:
        return (Path(self.order.control) / STOP_PRODUCING).exists()

    def size(self, least: int) -> int:
        """How many samples to draw, a multiple of `least`; as few as possible once nothing more comes."""
        if self.draining:
            return least
        return least * self.random.randint(1, MOST_ROWS // least)

    def draw(self, task: str, fields: tuple[str, ...], size: int, partition: str, **more: Any) -> BatchMeta:
        timeout_s = _LAST_DRAW_S if self.draining else _DRAW_S

        def draw() -> BatchMeta:
            return self.client.get_meta(
                fields, size, partition, task_name=task, lease=self.order.lease_s, timeout=timeout_s, **more
            )

        facts = {"task": task, "partition": partition}
        meta: BatchMeta = self.caller.call("draw", draw, timeout_s=timeout_s, **facts, **_shown(more))
        return meta

    def read(self, meta: BatchMeta, fields: tuple[str, ...]) -> list[int]:
        """Read and check the rows; return their sequence numbers."""
        timeout_s = self.order.timeout_s
        copy = self.random.random() < 0.7
        data = self.caller.call(
            "read",
            lambda: self.client.get_data(meta, fields, copy=copy, timeout=timeout_s),
            timeout_s=timeout_s,
            token=meta.lease_token,
        )
        sequences = sequences_of(meta)
        wrong = damaged(self.order.seed, sequences, data)
        if wrong:
            self.log.note("damaged", wrong=wrong[:5], token=meta.lease_token)
        return sequences

    def settle(self, op: str, meta: BatchMeta, task: str) -> None:
        """Acknowledge or release."""
        timeout_s = self.order.timeout_s
        facts = {"task": task, "token": meta.lease_token, "sequences": sequences_of(meta)}
        method = getattr(self.client, op)
        self.caller.call(op, lambda: method(meta, timeout=timeout_s), timeout_s=timeout_s, **facts)

    def read_drawn(self, meta: BatchMeta, fields: tuple[str, ...], task: str) -> list[int]:
        """Read what was drawn. Where its rows are gone the lease must be over too, which the judge looks at."""
        try:
            return self.read(meta, fields)
        except StaleSampleError:
            self.settle("ack", meta, task)
            raise LeaseExpired("the lease was good, though its rows are gone") from None


def work(order: Order) -> None:
    """Take a role in this process."""
    Worker(order).run()


def sequences_of(meta: BatchMeta) -> list[int]:
    """Keys are sequence numbers."""
    return [int(key) for key in meta.keys or () if key is not None]


def _shown(more: dict[str, Any]) -> dict[str, Any]:
    return {"group": more["sampler_params"]["dp_group_id"]} if "sampler_params" in more else {}


# ---------------------------------------------------------------- the roles


def _producer(worker: Worker) -> Callable[[], None]:
    sequence = worker.order.first
    timeout_s = worker.order.timeout_s

    def turn() -> None:
        nonlocal sequence
        count = GROUP * worker.random.randint(1, 6)
        sequences = list(range(sequence, sequence + count))
        partition = PARTITIONS[worker.random.random() < 0.5]
        sequence += count
        while not put_rows(worker.caller, worker.order.seed, sequences, partition, timeout_s):
            if worker.draining:
                return

    return turn


def put_rows(caller: Caller, seed: int, sequences: list[int], partition: str, timeout_s: float) -> bool:
    """Put samples; return False if there was no room, so that nothing was put."""
    groups = [f"g{sequence - sequence % GROUP}" for sequence in sequences]

    def put() -> BatchMeta:
        return caller.client.put(
            fields_of(seed, sequences),
            partition_id=partition,
            keys=[str(sequence) for sequence in sequences],
            group_ids=groups,
            group_size=GROUP,
            timeout=timeout_s,
        )

    try:
        caller.call("put", put, timeout_s=timeout_s, partition=partition, sequences=sequences)
    except CapacityExceeded:
        return False
    return True


def _scorer(worker: Worker) -> Callable[[], None]:
    fields = ("seq", "body")

    def turn() -> None:
        partition = PARTITIONS[worker.random.random() < 0.5]
        meta = worker.draw("score", fields, worker.size(1), partition)
        sequences = worker.read_drawn(meta, fields, "score")
        if worker.random.random() < 0.1:
            worker.settle("release", meta, "score")
            return
        _score(worker, meta, sequences)
        worker.settle("ack", meta, "score")

    return turn


def _score(worker: Worker, meta: BatchMeta, sequences: list[int]) -> None:
    timeout_s = worker.order.timeout_s

    def put() -> BatchMeta:
        return worker.client.put({SCORE: scores_of(worker.order.seed, sequences)}, metadata=meta, timeout=timeout_s)

    while True:
        try:
            worker.caller.call("score", put, timeout_s=timeout_s, token=meta.lease_token, sequences=sequences)
        except CapacityExceeded:  # without room for the field; the lease will tell when to give up
            time.sleep(_REFUSED_S)
            continue
        return


def _looker(worker: Worker) -> Callable[[], None]:
    fields = ("seq", "tokens", "note")

    def turn() -> None:
        partition = PARTITIONS[worker.random.random() < 0.5]
        meta = worker.draw("look", fields, worker.size(GROUP), partition, get_n_samples=True)
        worker.read_drawn(meta, fields, "look")
        worker.settle("release" if worker.random.random() < 0.1 else "ack", meta, "look")

    return turn


def _trainer(worker: Worker) -> Callable[[], None]:
    fields = ("seq", "tokens", SCORE)
    steps: dict[str, int] = dict(worker.order.first)

    def turn() -> None:
        for partition in PARTITIONS:
            params = {"dp_rank": worker.order.number, "dp_size": RANKS, "dp_group_id": f"step-{steps[partition]}"}
            try:
                meta = worker.draw("train", fields, SLICE, partition, sampler_params=params)
            except StaleSampleError:  # an earlier life was done with it
                steps[partition] += 1
                continue
            except _EXPECTED:
                continue
            worker.read_drawn(meta, fields, "train")
            worker.settle("ack", meta, "train")
            steps[partition] += 1

    return turn


def _cleaner(worker: Worker) -> Callable[[], None]:
    def consumed_by_all(partition: str) -> BatchMeta | None:
        client, done = worker.client, None
        meta = client.get_meta(["seq"], 1, partition, mode="force_fetch")
        for task in TASKS:
            indexes, consumed = client.get_consumption_status(task, partition)
            if indexes is None:
                return None
            rows = indexes.numpy()[consumed.numpy() == 1]
            done = rows if done is None else np.intersect1d(done, rows)
        return meta.select_samples(np.flatnonzero(np.isin(meta.indexes, done)))

    def turn() -> None:
        time.sleep(_PAUSE_S)
        for partition in PARTITIONS:
            meta = worker.caller.call("status", lambda: consumed_by_all(partition), timeout_s=240.0)  # noqa: B023
            if meta is not None and len(meta):
                clear(meta)

    def clear(meta: BatchMeta) -> None:
        facts = {"sequences": sequences_of(meta)}
        worker.caller.call("clear", lambda: worker.client.clear_samples(meta), timeout_s=60.0, **facts)

    return turn


TURNS: dict[str, Callable[[Worker], Callable[[], None]]] = {
    "producer": _producer,
    "scorer": _scorer,
    "looker": _looker,
    "trainer": _trainer,
    "cleaner": _cleaner,
}
