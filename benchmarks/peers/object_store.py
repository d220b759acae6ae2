"""The Ray object store between two actors: `ray.put` in one, `ray.get` in the other.

A batch goes in as the TensorDict that users have, or as a dict of NumPy arrays, which Ray hands out as views of its
shared memory.
"""

from __future__ import annotations

import time
from typing import Any

from benchmarks import batches
from benchmarks.peers.actors import Actors
from benchmarks.peers.peer import Peer
from benchmarks.scale import Scale

STORE_BYTES = 2 << 30


class Writer:
    def __init__(self, arrays: bool) -> None:
        self._arrays = arrays
        self._batch: Any = None
        self._reference: Any = None

    def prepare(self, workload: str, scale: dict[str, Any]) -> dict[str, int]:
        batch = batches.BATCHES[workload](Scale(**scale))
        self._batch = {name: batch[name].numpy() for name in batch.keys()} if self._arrays else batch  # noqa: SIM118
        return batches.touch(self._batch)

    def put(self) -> tuple[float, list[Any]]:
        """The reference comes in a list, so that Ray hands on itself and not what it stands for."""
        import ray

        begin = time.perf_counter()
        self._reference = ray.put(self._batch)
        return time.perf_counter() - begin, [self._reference]

    def clear(self) -> None:
        self._reference = None


class Reader:
    def read(self, references: list[Any], checksums: dict[str, int]) -> tuple[float, float]:
        import ray

        begin = time.perf_counter()
        batch = ray.get(references[0])
        got = time.perf_counter()
        found = batches.touch(batch)
        touched = time.perf_counter()
        batches.check(found, checksums)
        return got - begin, touched - got


class ObjectStore(Peer):
    def __init__(self, arrays: bool) -> None:
        self._arrays = arrays
        self._actors: Actors | None = None

    def open(self) -> dict[str, str]:
        import ray

        self._actors = Actors(STORE_BYTES)
        self._writer = self._actors.start(Writer, self._arrays)
        self._reader = self._actors.start(Reader)
        return {"ray": ray.__version__}

    def close(self) -> None:
        if self._actors is not None:
            self._actors.close()
            self._actors = None

    def prepare(self, workload: str, scale: dict[str, Any]) -> None:
        self._checksums = self._ask(self._writer.prepare, workload, scale)

    def put(self) -> float:
        put_s, self._references = self._ask(self._writer.put)
        return float(put_s)

    def read(self) -> tuple[float, ...]:
        return tuple(self._ask(self._reader.read, self._references, self._checksums))

    def clear(self) -> None:
        self._references = []
        self._ask(self._writer.clear)

    def _ask(self, method: Any, *arguments: Any) -> Any:
        assert self._actors is not None
        return self._actors.ask(method, *arguments)
