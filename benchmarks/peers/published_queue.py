"""The package `TransferQueue` of PyPI, through its public calls by key, between two actors.

Imported by the Python of its own environment only: its import name is that of this project.
"""

from __future__ import annotations

import asyncio
import time
from importlib import metadata
from typing import Any

from benchmarks import batches
from benchmarks.peers.actors import Actors
from benchmarks.peers.peer import Peer
from benchmarks.scale import Scale

PARTITION = "batch"
DRAWN = "draws"
STORE_BYTES = 256 << 20  # its data does not pass through Ray's object store


class Writer:
    def __init__(self) -> None:
        import transfer_queue

        transfer_queue.init()
        self._queue: Any = transfer_queue

    def prepare(self, workload: str, scale: dict[str, Any]) -> dict[str, int]:
        self._batch = batches.BATCHES[workload](Scale(**scale))
        rows = self._batch.batch_size[0]
        self._keys = _names(0, rows)
        self._tags: list[dict[str, Any]] = [{} for _ in range(rows)]
        return batches.touch(self._batch)

    def put(self) -> float:
        begin = time.perf_counter()
        self._queue.kv_batch_put(keys=self._keys, partition_id=PARTITION, fields=self._batch, tags=self._tags)
        return time.perf_counter() - begin

    def clear(self) -> None:
        self._queue.kv_clear(keys=self._keys, partition_id=PARTITION)

    def put_samples(self, calls: int, values: int) -> list[float]:
        import torch

        sample = {"x": torch.zeros(values)}
        keys = [f"single-{call}" for call in range(calls)]
        durations_s = []
        for key in keys:
            begin = time.perf_counter()
            self._queue.kv_put(key=key, partition_id=PARTITION, fields=sample, tag={})
            durations_s.append(time.perf_counter() - begin)
        self._queue.kv_clear(keys=keys, partition_id=PARTITION)
        return durations_s

    def fill(self, begin: int, end: int) -> None:
        import torch
        from tensordict import TensorDict

        fields = TensorDict({"x": torch.zeros(end - begin)}, batch_size=[end - begin])
        tags: list[dict[str, Any]] = [{} for _ in range(begin, end)]
        self._queue.kv_batch_put(keys=_names(begin, end), partition_id=DRAWN, fields=fields, tags=tags)

    def empty(self, rows: int) -> None:
        self._queue.kv_clear(keys=_names(0, rows), partition_id=DRAWN)

    def put_together(self, rounds: int, in_flight: int, values: int) -> list[float]:
        return asyncio.run(_put_together(self._queue, rounds, in_flight, values))


async def _put_together(queue: Any, rounds: int, in_flight: int, values: int) -> list[float]:
    """Not a method: Ray runs all methods of a class with a coroutine on an event loop."""
    import torch

    sample = {"x": torch.zeros(values)}
    durations_s, keys = [], []
    for number in range(rounds):
        wave = [f"together-{number}-{call}" for call in range(in_flight)]
        begin = time.perf_counter()
        puts = (queue.async_kv_put(key=key, partition_id=PARTITION, fields=sample, tag={}) for key in wave)
        await asyncio.gather(*puts)
        durations_s.append((time.perf_counter() - begin) / in_flight)
        keys += wave
    await queue.async_kv_clear(keys=keys, partition_id=PARTITION)
    return durations_s


def _names(begin: int, end: int) -> list[str]:
    return [str(row) for row in range(begin, end)]


class Reader:
    def __init__(self) -> None:
        import transfer_queue

        transfer_queue.init()
        self._queue: Any = transfer_queue
        self._tasks = 0

    def draw(self, rows: int, calls: int, batch: int) -> list[float]:
        client = self._queue.get_client()
        durations_s = []
        for call in range(calls):
            if call % (rows // batch) == 0:
                self._tasks += 1  # to a new task nothing was handed out yet
            begin = time.perf_counter()
            client.get_meta(["x"], batch, DRAWN, task_name=f"reader-{self._tasks}")
            durations_s.append(time.perf_counter() - begin)
        return durations_s

    def read(self, checksums: dict[str, int]) -> tuple[float, float, float]:
        begin = time.perf_counter()
        keys = list(self._queue.kv_list(PARTITION)[PARTITION])
        found = time.perf_counter()
        batch = self._queue.kv_batch_get(keys, PARTITION)
        got = time.perf_counter()
        touched = batches.touch(batch)
        end = time.perf_counter()
        batches.check(touched, checksums)
        return found - begin, got - found, end - got


class PublishedQueue(Peer):
    def __init__(self) -> None:
        self._actors: Actors | None = None

    def open(self) -> dict[str, str]:
        import transfer_queue

        self._actors = Actors(STORE_BYTES)
        transfer_queue.init()
        self._writer = self._actors.start(Writer)
        self._reader = self._actors.start(Reader)
        return {name: metadata.version(name) for name in ("TransferQueue", "ray", "torch", "tensordict")}

    def close(self) -> None:
        if self._actors is not None:
            import transfer_queue

            transfer_queue.close()
            self._actors.close()
            self._actors = None

    def prepare(self, workload: str, scale: dict[str, Any]) -> None:
        self._checksums = self._ask(self._writer.prepare, workload, scale)

    def put(self) -> float:
        return float(self._ask(self._writer.put))

    def read(self) -> tuple[float, ...]:
        return tuple(self._ask(self._reader.read, self._checksums))

    def clear(self) -> None:
        self._ask(self._writer.clear)

    def put_samples(self, calls: int, values: int) -> list[float]:
        """Return the seconds of each put of one sample of so many float32; they are cleared afterwards."""
        return list(self._ask(self._writer.put_samples, calls, values))

    def put_together(self, rounds: int, in_flight: int, values: int) -> list[float]:
        """Return for each round the seconds per put, of `in_flight` puts started at once."""
        return list(self._ask(self._writer.put_together, rounds, in_flight, values))

    def fill(self, begin: int, end: int) -> None:
        """Add these rows of one small field to a partition that `draw` draws from."""
        self._ask(self._writer.fill, begin, end)

    def draw(self, rows: int, calls: int, batch: int) -> list[float]:
        """Return the seconds of each draw of `batch` of `rows` samples."""
        return list(self._ask(self._reader.draw, rows, calls, batch))

    def empty(self, rows: int) -> None:
        self._ask(self._writer.empty, rows)

    def _ask(self, method: Any, *arguments: Any) -> Any:
        assert self._actors is not None
        return self._actors.ask(method, *arguments)
