"""Where a queue and the stages that use it live.

A stage is an object that is made with a client of the queue; calls of one stage run one after the other.

runtime     queue                         stages
ray         actors                        one actor each
processes   this process                  one process each, attached over ipc
embedded    this process                  one thread each
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import transfer_queue
from benchmarks.interrupts import held_back

if TYPE_CHECKING:
    from typing_extensions import Self

    from transfer_queue import TransferQueueClient

StageType: TypeAlias = "Callable[[TransferQueueClient], Any]"

PATIENCE_S = 300.0
_OBJECT_STORE_BYTES = 128 << 20


class Answer(Protocol):
    """The result of a call that was started."""

    def result(self, timeout: float | None = None) -> Any: ...


class Stage(ABC):
    """Started by a `Placement`, which also ends it."""

    @property
    @abstractmethod
    def pid(self) -> int:
        """Of the process that it runs in; waits for the calls that were begun before."""

    @abstractmethod
    def begin(self, method: str, *arguments: Any) -> Answer:
        """Start a call and return at once."""

    def call(self, method: str, *arguments: Any) -> Any:
        return self.begin(method, *arguments).result(PATIENCE_S)


class Placement(ABC):
    """A running queue. Close it in any case, also after an interrupt; the queue and all stages end with it."""

    def __init__(self) -> None:
        self._ending = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def stage(self, kind: StageType) -> Stage: ...

    def close(self) -> None:
        """May be called twice."""
        self._ending.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


# ---------------------------------------------------------------- threads and processes


class _ExecutorStage(Stage):
    def __init__(self, executor: Executor, run: Callable[..., Any]) -> None:
        self._executor = executor
        self._run = run

    @property
    def pid(self) -> int:
        return self._executor.submit(os.getpid).result(PATIENCE_S)

    def begin(self, method: str, *arguments: Any) -> Future[Any]:
        return self._executor.submit(self._run, method, *arguments)


class EmbeddedPlacement(Placement):
    def _start(self) -> None:
        transfer_queue.init({"runtime": "embedded"})
        self._ending.callback(transfer_queue.close)

    def stage(self, kind: StageType) -> Stage:
        made = kind(transfer_queue.get_client())
        executor = ThreadPoolExecutor(1, thread_name_prefix=type(made).__name__)
        self._ending.callback(executor.shutdown, wait=True, cancel_futures=True)
        return _ExecutorStage(executor, lambda method, *arguments: getattr(made, method)(*arguments))


class ProcessPlacement(Placement):
    def _start(self) -> None:
        self._address = transfer_queue.init({"runtime": "embedded"}).address
        self._ending.callback(transfer_queue.close)

    def stage(self, kind: StageType) -> Stage:
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(1, mp_context=context, initializer=_attach, initargs=(kind, self._address))
        self._ending.callback(executor.shutdown, wait=True, cancel_futures=True)
        with held_back():
            executor.submit(os.getpid)  # the first call starts the process
        return _ExecutorStage(executor, _call)


_attached: dict[str, Any] = {}


def _attach(kind: StageType, address: str) -> None:
    transfer_queue.init({"address": address})
    _attached["stage"] = kind(transfer_queue.get_client())


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_attached["stage"], method)(*arguments)


# ---------------------------------------------------------------- Ray


class RayPlacement(Placement):
    def _start(self) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(
                num_cpus=max(2, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                logging_level=logging.WARNING,
            )
            self._ending.callback(ray.shutdown)
        self._namespace = f"benchmarks-{os.getpid()}"
        transfer_queue.init({"runtime": "ray", "namespace": self._namespace})
        self._ending.callback(transfer_queue.close)

    def stage(self, kind: StageType) -> Stage:
        import ray

        actor: Any = ray.remote(num_cpus=0)(_StageActor).remote(kind, self._namespace)
        self._ending.callback(ray.kill, actor)
        return _RayStage(actor)


class _StageActor:
    def __init__(self, kind: StageType, namespace: str) -> None:
        transfer_queue.init({"runtime": "ray", "namespace": namespace})
        self._stage = kind(transfer_queue.get_client())

    def pid(self) -> int:
        return os.getpid()

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._stage, method)(*arguments)


class _RayStage(Stage):
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    @property
    def pid(self) -> int:
        return int(_RayAnswer(self._actor.pid.remote()).result(PATIENCE_S))

    def begin(self, method: str, *arguments: Any) -> Answer:
        return _RayAnswer(self._actor.call.remote(method, *arguments))


class _RayAnswer:
    def __init__(self, reference: Any) -> None:
        self._reference = reference

    def result(self, timeout: float | None = None) -> Any:
        import ray

        return ray.get(self._reference, timeout=timeout)


PLACEMENTS: dict[str, Callable[[], Placement]] = {
    "ray": RayPlacement,
    "processes": ProcessPlacement,
    "embedded": EmbeddedPlacement,
}
