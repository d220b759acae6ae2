"""Where the queue and the workers of a job live: Ray actors, or threads of this process.

Both runtimes offer the same few calls. `spawn` starts a worker with a way to connect to the queue as its first
argument; `call` starts a method on it and returns at once, with a future that may be an argument of a later call; calls
of one worker run one after the other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import transfer_queue

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

RAY_OBJECT_STORE_BYTES = 128 * 2**20  # it only holds weights: rows are in the queue


class Runtime(ABC):
    """Start it, use it, and close it in any case: also after a start that failed halfway."""

    client: TransferQueueClient

    @abstractmethod
    def start(self, conf: Mapping[str, Any]) -> None:
        """Start the queue with this configuration and connect this process."""

    @abstractmethod
    def spawn(self, worker: Callable[..., Any], *arguments: Any) -> Any: ...

    @abstractmethod
    def call(self, worker: Any, method: str, *arguments: Any) -> Any: ...

    @abstractmethod
    def gather(self, futures: Sequence[Any]) -> list[Any]:
        """Return all results in order; the first failure is raised without waiting for the others."""

    @abstractmethod
    def raise_failed(self, futures: Sequence[Any]) -> None:
        """Raise what one of the futures has failed with already, if so; waits for none."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers, whatever they wait for, and what `start` started."""

    def _start_queue(self, name: str, conf: Mapping[str, Any]) -> Any:
        config = transfer_queue.init({**conf, "runtime": name})
        self.client = transfer_queue.get_client()
        return config


# ---------------------------------------------------------------- Ray


@dataclass(frozen=True)
class _Connect:
    """How a worker of another process reaches the queue."""

    controller_info: Any

    def __call__(self, name: str) -> TransferQueueClient:
        return transfer_queue.TransferQueueClient(name, self.controller_info)


class RayRuntime(Runtime):
    def __init__(self) -> None:
        self._workers: list[Any] = []
        self._started_ray = False

    def start(self, conf: Mapping[str, Any]) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(include_dashboard=False, logging_level="warning", object_store_memory=RAY_OBJECT_STORE_BYTES)
            self._started_ray = True
        self._connect = _Connect(self._start_queue("ray", conf).controller.zmq_info)

    def spawn(self, worker: Callable[..., Any], *arguments: Any) -> Any:
        import ray

        handle = ray.remote(num_cpus=0)(worker).remote(self._connect, *arguments)
        self._workers.append(handle)
        return handle

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        return getattr(worker, method).remote(*arguments)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        import ray

        pending = list(futures)
        while pending:
            done, pending = ray.wait(pending, num_returns=1)
            self._results(done)
        return self._results(futures)

    def raise_failed(self, futures: Sequence[Any]) -> None:
        import ray

        if futures:
            done, _ = ray.wait(list(futures), num_returns=len(futures), timeout=0)
            self._results(done)

    @staticmethod
    def _results(done: Sequence[Any]) -> list[Any]:
        import ray

        try:
            return list(ray.get(list(done)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error

    def close(self) -> None:
        import ray

        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()
        transfer_queue.close()
        if self._started_ray:
            ray.shutdown()


# ---------------------------------------------------------------- threads


@dataclass
class _Threaded:
    worker: Any
    thread: ThreadPoolExecutor


class ThreadRuntime(Runtime):
    """Every worker runs in a thread of its own; all share this process's client."""

    def __init__(self) -> None:
        self._workers: list[_Threaded] = []

    def start(self, conf: Mapping[str, Any]) -> None:
        self._start_queue("embedded", conf)

    def spawn(self, worker: Callable[..., Any], *arguments: Any) -> Any:
        made = worker(lambda _: self.client, *arguments)
        handle = _Threaded(made, ThreadPoolExecutor(1, thread_name_prefix=type(made).__name__))
        self._workers.append(handle)
        return handle

    def call(self, worker: Any, method: str, *arguments: Any) -> Any:
        def run() -> Any:
            values = (a.result() if isinstance(a, Future) else a for a in arguments)
            return getattr(worker.worker, method)(*values)

        return worker.thread.submit(run)

    def gather(self, futures: Sequence[Any]) -> list[Any]:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        self.raise_failed([future for future in futures if future in done])
        return [future.result() for future in futures]

    def raise_failed(self, futures: Sequence[Any]) -> None:
        for future in futures:
            if future.done():
                future.result()

    def close(self) -> None:
        """Closing the queue ends the waits of the stages; a trainer that then leaves ends the waits of the other."""
        transfer_queue.close()
        for handle in self._workers:
            if hasattr(handle.worker, "close"):
                handle.thread.submit(handle.worker.close)
        for handle in self._workers:
            handle.thread.shutdown(wait=True)
        self._workers.clear()


RUNTIMES: dict[str, Callable[[], Runtime]] = {"ray": RayRuntime, "embedded": ThreadRuntime}
