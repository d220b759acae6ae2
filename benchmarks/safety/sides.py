"""Sessions side by side that differ in one thing, and the same calls on each of them in turn.

Controller and storage unit of each session are child processes, kept alive by this one. A stage is one process with a
client of every side, so that the sides also share its memory and its place on the processor.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.figures import LONGER, Report, Series
from benchmarks.interrupts import held_back
from benchmarks.placement import PATIENCE_S, StageType
from transfer_queue.client.client import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.processes import ProcessesRuntime

if TYPE_CHECKING:
    from typing_extensions import Self

Conf: TypeAlias = "Mapping[str, Any]"

WITHOUT = "without"

_OF_CLIENTS = ("checksums",)  # keys of a configuration that servers do not look at


class Sides:
    """A session per configuration; those that differ for clients only share one. Close it in any case."""

    def __init__(self, confs: Mapping[str, Conf]) -> None:
        self._ending = contextlib.ExitStack()
        self._places: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.runtimes: dict[str, ProcessesRuntime] = {}
        started: dict[str, ProcessesRuntime] = {}
        try:
            for side, conf in confs.items():
                checked = settings(merged({"runtime": "processes", **conf}))
                key = json.dumps({name: value for name, value in conf.items() if name not in _OF_CLIENTS})
                if key not in started:
                    started[key] = runtime = ProcessesRuntime(checked)
                    self._ending.callback(runtime.close)
                self.runtimes[side] = started[key]
                options = {"transport": checked.transport, "checksums": checked.checksums}
                self._places[side] = (started[key].info.to_record(), options)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called twice."""
        self._ending.close()

    def client(self, side: str) -> TransferQueueClient:
        """A client of this process."""
        client = _client(*self._places[side])
        self._ending.callback(client.close)
        return client

    def stage(self, kind: StageType) -> SideStage:
        """A process with one of that kind per side."""
        executor = ProcessPoolExecutor(
            1, mp_context=multiprocessing.get_context("spawn"), initializer=_attach, initargs=(kind, self._places)
        )
        self._ending.callback(executor.shutdown, wait=True, cancel_futures=True)
        with held_back():
            executor.submit(os.getpid)  # the first call starts the process
        return SideStage(executor)


class SideStage:
    """Calls of one stage run one after the other, whichever side they are for."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def begin(self, side: str, method: str, *arguments: Any) -> Future[Any]:
        return self._executor.submit(_call, side, method, *arguments)

    def call(self, side: str, method: str, *arguments: Any) -> Any:
        return self.begin(side, method, *arguments).result(PATIENCE_S)


_stages: dict[str, Any] = {}


def _attach(kind: StageType, places: Mapping[str, tuple[dict[str, Any], dict[str, Any]]]) -> None:
    _stages.update({side: kind(_client(*place)) for side, place in places.items()})


def _call(side: str, method: str, *arguments: Any) -> Any:
    return getattr(_stages[side], method)(*arguments)


def _client(record: dict[str, Any], options: dict[str, Any]) -> TransferQueueClient:
    return TransferQueueClient(f"benchmark-{os.getpid()}", ZMQServerInfo.from_record(record), **options)


# ---------------------------------------------------------------- turns


def turns(sides: Iterable[str], rounds: int, warm_up: int) -> Iterator[tuple[str, bool]]:
    """Yield each side once a round, and whether the round counts; every other round begins with the last one."""
    order = list(sides)
    for number in range(warm_up + rounds):
        for side in order if number % 2 else reversed(order):
            yield side, number >= warm_up


class Compared:
    """One measure of every side: each duration in a series per side, ratios from the medians of each round.

    base   the side that the others are compared with
    unit   how; `LONGER` unless said
    aims   bounds of the ratio per side, as `Report.compare` takes them
    """

    def __init__(
        self,
        report: Report,
        case: str,
        sides: Sequence[str],
        *,
        base: str = WITHOUT,
        unit: str = LONGER,
        size_bytes: int | None = None,
        aims: Mapping[str, Mapping[str, float]] | None = None,
    ) -> None:
        self._series = {side: report.series(case, side, size_bytes=size_bytes) for side in sides}
        self._rounds = {side: Series(case, side) for side in sides}
        for side in sides:
            if side != base:
                ours, other = [self._rounds[side]], [self._rounds[base]]
                report.compare(case, side, base, ours, other, unit, **(aims or {}).get(side, {}))

    def add(self, side: str, counts: bool, durations_s: Sequence[float]) -> None:
        """Add what was measured in one turn of a side."""
        if counts:
            self._series[side].add(*durations_s)
            self._rounds[side].add(statistics.median(durations_s))


def measured(
    table: Mapping[str, Callable[[str], Sequence[float]]], compared: Mapping[str, Compared], **of: Any
) -> None:
    """Do everything in the table for one side after the other; `of` are the arguments of `turns`."""
    for side, counts in turns(**of):
        for case, do in table.items():
            compared[case].add(side, counts, do(side))
