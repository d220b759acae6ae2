"""Scaling curves: one thing grows, the rest stays; each point is a series with its place `x` on an `axis`.

axis                   what is timed at each point
bytes per put          put and get of one field of 64 rows
samples per partition  get_meta(64)
fields                 put and get of the same bytes, cut into that many fields
partitions             put and draw of one sample in the last of them, one sample in each
tasks                  put of one sample into a partition that all of them drew from and wait at
waiters                from the begin of a put to the return of the parked draw that it serves
clients                put of one 12 KiB sample, all clients at once
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import control, floors
from benchmarks.figures import Report
from benchmarks.placement import PATIENCE_S, Placement, Stage
from benchmarks.scale import Scale

if TYPE_CHECKING:
    from transfer_queue import TransferQueueClient

PARTITION = "curve"
TASK = "reader"
ROWS = 64
HAMMERS = 4  # processes that the clients are spread over


class Writer(control.Writer):
    """Puts batches of any form, and single samples into many partitions."""

    def put_fields(self, fields: int, size_bytes: int) -> float:
        """Put `size_bytes` of float32 in `ROWS` rows and so many fields; return the seconds."""
        width = max(1, size_bytes // (4 * ROWS * fields))
        batch = {f"field_{n}": torch.full((ROWS, width), float(n)) for n in range(fields)}
        begin = time.perf_counter()
        self._client.put(batch, partition_id=PARTITION)
        return time.perf_counter() - begin

    def fill_partitions(self, first: int, last: int) -> None:
        for number in range(first, last):
            self._client.put({"x": torch.zeros(1)}, partition_id=f"{PARTITION}-{number}")

    def put_into(self, partition: str, calls: int) -> list[float]:
        durations_s = []
        for _ in range(calls):
            begin = time.perf_counter()
            self._client.put({"x": torch.zeros(1)}, partition_id=partition)
            durations_s.append(time.perf_counter() - begin)
        return durations_s

    def clear_all(self) -> None:
        for partition in self._client.get_partition_list():
            self._client.clear_partition(partition)


class Reader(control.Reader):
    def read_fields(self, fields: int) -> float:
        """Return the seconds of the get. Raises `ValueError` if other values come out than were put."""
        names = [f"field_{n}" for n in range(fields)]
        meta = self._client.get_meta(names, ROWS, PARTITION, task_name=TASK)
        begin = time.perf_counter()
        batch = self._client.get_data(meta)
        duration_s = time.perf_counter() - begin
        wrong = [name for n, name in enumerate(names) if not (batch[name] == float(n)).all()]
        if wrong:
            raise ValueError(f"other values than were put in {wrong}")
        return duration_s

    def draw_from(self, partition: str, calls: int) -> list[float]:
        durations_s = []
        for _ in range(calls):
            begin = time.perf_counter()
            self._client.get_meta(["x"], 1, partition, task_name=TASK)
            durations_s.append(time.perf_counter() - begin)
        return durations_s

    def draw_as(self, partition: str, first: int, last: int) -> None:
        """Draw one sample under each of the tasks `first` … `last`."""
        for number in range(first, last):
            self._client.get_meta(["x"], 1, partition, task_name=f"task-{number}")


class Hammer:
    """Clients in threads, each with connections of its own."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def put(self, partition: str, clients: int, calls: int) -> list[float]:
        """Return the seconds of each put of all clients."""
        from transfer_queue import TransferQueueClient

        info, durations_s = self._client.controller_info, []
        made = [TransferQueueClient(f"hammer-{n}", info) for n in range(clients)]
        threads = [
            threading.Thread(target=lambda one: durations_s.extend(_put(one, partition, calls)), args=(client,))
            for client in made
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in made:
            client.close()
        return durations_s


def _put(client: TransferQueueClient, partition: str, calls: int) -> list[float]:
    sample = {"x": torch.zeros(1, control.SAMPLE_VALUES)}
    durations_s = []
    for _ in range(calls):
        begin = time.perf_counter()
        client.put(sample, partition_id=partition)
        durations_s.append(time.perf_counter() - begin)
    return durations_s


def measure(report: Report, scale: Scale, placement: Placement) -> None:
    """Add all curves."""
    writer, reader = placement.stage(Writer), placement.stage(Reader)
    _measure_bytes(report, scale, writer, reader)
    _measure_fields(report, scale, writer, reader)
    _measure_samples(report, scale, writer, reader)
    _measure_partitions(report, scale, writer, reader)
    _measure_tasks(report, scale, writer, reader)
    _measure_waiters(report, scale, placement, writer, reader)
    _measure_clients(report, scale, placement, writer)


def _measure_bytes(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    for size in scale.curve_bytes:
        _measure_batch(report, scale, writer, reader, "bytes per put", size, fields=1, size_bytes=size)


def _measure_fields(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    size = scale.curve_bytes[-1]
    for fields in scale.curve_fields:
        _measure_batch(report, scale, writer, reader, "fields", fields, fields=fields, size_bytes=size)


def _measure_batch(
    report: Report, scale: Scale, writer: Stage, reader: Stage, axis: str, x: int, *, fields: int, size_bytes: int
) -> None:
    options: dict[str, Any] = {
        "size_bytes": size_bytes,
        "skip": scale.warm_up,
        "against": report.find(floors.CASE, floors.MEMCPY),
    }
    puts, gets = _point(report, "put", axis, x, **options), _point(report, "get", axis, x, **options)
    for _ in range(scale.warm_up + scale.rounds):
        puts.add(writer.call("put_fields", fields, size_bytes))
        gets.add(reader.call("read_fields", fields))
        writer.call("clear", PARTITION)


def _measure_samples(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    present = 0
    skip = scale.calls // 10
    for rows in scale.curve_samples:
        while present < rows:
            added = min(control.FILL_ROWS, rows - present)
            writer.call("fill", PARTITION, added)
            present += added
        draws = _point(report, f"get_meta({control.BATCH})", "samples per partition", rows, skip=skip)
        draws.add(*reader.call("draw", PARTITION, rows, scale.calls + skip))
    writer.call("clear", PARTITION)


def _measure_partitions(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    present = 0
    for partitions in scale.curve_partitions:
        writer.call("fill_partitions", present, partitions)
        present = partitions
        calls = scale.calls // 4
        last = f"{PARTITION}-{partitions - 1}"
        options = {"skip": calls // 10}
        _point(report, "put of one value", "partitions", partitions, **options).add(
            *writer.call("put_into", last, calls)
        )
        _point(report, "get_meta(1)", "partitions", partitions, **options).add(*reader.call("draw_from", last, calls))
    writer.call("clear_all")


def _measure_tasks(report: Report, scale: Scale, writer: Stage, reader: Stage) -> None:
    writer.call("fill", PARTITION, scale.calls)
    present = 0
    for tasks in scale.curve_tasks:
        reader.call("draw_as", PARTITION, present, tasks)
        present = tasks
        calls = scale.calls // 4
        options = {"skip": calls // 10}
        _point(report, "put of one value", "tasks", tasks, **options).add(*writer.call("put_into", PARTITION, calls))
        _point(report, "get_meta(1)", "tasks", tasks, **options).add(*reader.call("draw_from", PARTITION, calls))
        reader.call("reset", PARTITION)
    writer.call("clear", PARTITION)


def _measure_waiters(report: Report, scale: Scale, placement: Placement, writer: Stage, reader: Stage) -> None:
    crowd = placement.stage(control.Crowd)
    for waiters in scale.curve_waiters:
        crowd.call("park", "elsewhere", waiters)
        control.measure_wake_ups(report, scale, writer, reader, "curve: waiters", x=waiters, axis="waiters")
        crowd.call("leave")


def _measure_clients(report: Report, scale: Scale, placement: Placement, writer: Stage) -> None:
    hammers = [placement.stage(Hammer) for _ in range(HAMMERS)]
    for hammer in hammers:
        hammer.call("put", PARTITION, 1, 1)  # waits until the process is there
    for clients in scale.curve_clients:
        chosen = hammers[: min(clients, HAMMERS)]
        calls = scale.calls
        begin = time.perf_counter()
        answers = [hammer.begin("put", PARTITION, clients // len(chosen), calls // clients) for hammer in chosen]
        durations_s = [one for answer in answers for one in answer.result(PATIENCE_S)]
        elapsed_s = time.perf_counter() - begin
        measure = "put of one 12 KiB sample"
        _point(report, measure, "clients", clients).add(*durations_s)
        report.quantity("curve: clients", measure, len(durations_s) / elapsed_s, "1/s", x=clients, axis="clients")
        writer.call("clear", PARTITION)


def _point(report: Report, measure: str, axis: str, x: int, **options: Any) -> Any:
    return report.series(f"curve: {axis}", measure, x=x, axis=axis, **options)
