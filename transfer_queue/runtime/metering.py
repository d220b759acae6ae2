"""The metrics of a controller: requests are counted as they pass, everything else is read when somebody asks.

A scrape takes the lock of the controller many times, each time for a fraction of a millisecond. What storage units say
of themselves is asked at most every `TQ_METRICS_COLLECT_INTERVAL` seconds, beside the scrape, which waits for it only
for a moment: a unit that is dead or stuck is shown as such.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from transfer_queue import environment
from transfer_queue.controller import ControllerService
from transfer_queue.ledger.figures import (
    PARTITIONS_AT_ONCE,
    SLOTS_AT_ONCE,
    Figures,
    PartitionFigures,
    RowCounts,
    RowsAtUnits,
    Slots,
    Totals,
)
from transfer_queue.messages import ONE_WAY, Draw, Drawn, ErrorReply, Int64s, Put, PutDone, Reply, Request, UnitInfo
from transfer_queue.metrics import (
    BUCKETS_S,
    WAIT_BUCKETS_S,
    Durations,
    Endpoint,
    Page,
    give_way,
    process_figures,
    with_breaks,
)
from transfer_queue.runtime.unit_reports import UnitReport, UnitReports, ask_units
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.ports import random_ports
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Answer, Handler, Ticket

T = TypeVar("T")

_COLLECT_INTERVAL_S = 10.0
_MOST_TASKS = 1000  # that are told apart by name
_OTHERS = "(others)"
_OUTCOMES = {"it ran out": "expired", "its holder is gone": "holder gone", "its samples were cleared": "cleared"}
_STATES = ("live", "pinned", "reserved", "overhead", "free")


class Tally:
    """Counts by labels. Thread-safe."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, ...]] = Counter()
        self._lock = threading.Lock()

    def add(self, count: int, *labels: str) -> None:
        with self._lock:
            self._counts[labels] += count

    def show(self, page: Page, name: str) -> None:
        with self._lock:
            counts = list(self._counts.items())
        for labels, count in counts:
            page.add(name, count, *labels)


class Histogram:
    """Durations by one label."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._by_label: dict[str, Durations] = {}

    def add(self, seconds: float, label: str) -> None:
        found = self._by_label.get(label)
        if found is None:
            found = self._by_label.setdefault(label, Durations(self._bounds))
        found.add(seconds)

    def show(self, page: Page, name: str) -> None:
        for label, durations in list(self._by_label.items()):
            page.add_histogram(name, durations, label)


@dataclass(slots=True)
class _Passage:
    """What is kept of a request until it is answered."""

    name: str
    task: str
    size_bytes: int
    handed_in: float | None = None


class Meter:
    """A handler that counts what passes through it on its way to another one. Thread-safe."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._tasks: set[str] = set()
        self._requests, self._failures, self._drawn = Tally(), Tally(), Tally()
        self._put_samples, self._put_bytes = Tally(), Tally()
        self._work, self._waits, self._draw_waits = (
            Histogram(bounds) for bounds in (BUCKETS_S, WAIT_BUCKETS_S, WAIT_BUCKETS_S)
        )
        for tally in (self._put_samples, self._put_bytes):
            tally.add(0)

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Pass a request on; count it now, and its answer when that comes."""
        name = type(request).__name__
        self._requests.add(1, name)
        task = self._known(request.task_name) if isinstance(request, Draw) else ""
        passage = _Passage(name, task, request.size_bytes if isinstance(request, Put) else 0)
        if not isinstance(request, ONE_WAY):
            ticket.watch(functools.partial(self._answered, passage))
        began = time.perf_counter()
        try:
            self._handler.submit(request, ticket)
        finally:
            passage.handed_in = time.perf_counter()
            self._work.add(passage.handed_in - began, name)

    def tick(self) -> float | None:
        return self._handler.tick()

    def lost(self, ticket: Ticket, reply: Reply | None) -> None:
        self._handler.lost(ticket, reply)

    def gone(self, client_id: str) -> None:
        self._handler.gone(client_id)

    def holding(self) -> Collection[str]:
        return self._handler.holding()

    def show(self, page: Page) -> None:
        self._requests.show(page, "tq_controller_request_total")
        self._failures.show(page, "tq_controller_request_failures_total")
        self._work.show(page, "tq_controller_request_duration_seconds")
        self._waits.show(page, "tq_controller_request_wait_seconds")
        self._draw_waits.show(page, "tq_draw_wait_seconds")
        self._drawn.show(page, "tq_drawn_samples_total")
        self._put_samples.show(page, "tq_put_samples_total")
        self._put_bytes.show(page, "tq_put_bytes_total")

    def _known(self, task: str) -> str:
        if task not in self._tasks:
            if len(self._tasks) >= _MOST_TASKS:
                return _OTHERS
            self._tasks.add(task)
        return task

    def _answered(self, passage: _Passage, answer: Answer) -> None:
        if passage.handed_in is not None:
            waited_s = time.perf_counter() - passage.handed_in
            self._waits.add(waited_s, passage.name)
            if isinstance(answer, Drawn):
                self._draw_waits.add(waited_s, passage.task)
        if isinstance(answer, BaseException | ErrorReply):
            error = answer.name if isinstance(answer, ErrorReply) else type(answer).__name__
            self._failures.add(1, passage.name, error)
        elif isinstance(answer, PutDone):
            self._put_samples.add(len(answer.indexes))
            self._put_bytes.add(passage.size_bytes)
        elif isinstance(answer, Drawn) and passage.task:
            self._drawn.add(len(answer.indexes), passage.task)


class Metering:
    """Counts what a controller does from now on, and serves it at an `Endpoint`."""

    def __init__(
        self,
        service: ControllerService,
        server: Server,
        host: str,
        port: int,
        token: bytes,
        *,
        started: float,
        journal: Path | None,
    ) -> None:
        """port     0 for any free one
        token    lets this process ask the storage units
        started  when the controller was, by `time.monotonic`
        journal  its folder, if one is kept

        Raises `ConnectionLost` if no port is free, `InvalidArgument` if a package is missing.
        """
        self._process = process_figures()
        self._service = service
        self._server = server
        self._token = token
        self._started = started
        self._journal = journal
        self._before = self._read(Figures.totals)  # what an earlier life of the controller has told already
        interval_s = environment.seconds("TQ_METRICS_COLLECT_INTERVAL") or _COLLECT_INTERVAL_S
        self._units = UnitReports(self._ask_units, interval_s)
        self.meter = Meter(service)
        self._endpoint = Endpoint(host, [port] if port else random_ports(), self._page)
        self.port = self._endpoint.port
        server.serve_by(self.meter)

    def close(self) -> None:
        """Stop serving. May be called twice."""
        self._endpoint.close()
        self._units.close()

    # ------------------------------------------------------------ one scrape

    def _page(self) -> bytes:
        page = Page()
        self._show_controller(page)
        totals = self._read(Figures.totals)
        self._show_totals(page, totals)
        for waiting in self._read(Figures.waiting_draws):
            age_s = max(time.monotonic() - waiting.since, 0.0)
            page.add("tq_waiting_draws", waiting.draws, waiting.task, waiting.missing)
            page.add("tq_waiting_draws_oldest_seconds", age_s, waiting.task, waiting.missing)
        self._show_partitions(page, totals)
        self._show_units(page)
        return page.text() + self._process()

    def _show_controller(self, page: Page) -> None:
        self.meter.show(page)
        page.add("tq_controller_uptime_seconds", time.monotonic() - self._started)
        page.add("tq_controller_auth_failures_total", self._server.auth_failures)
        page.add("tq_controller_malformed_messages_total", self._server.malformed)
        page.add("tq_controller_handler_failures_total", self._server.failures)
        _, journal = self._service.units_and_journal()
        if journal is not None and self._journal is not None:
            page.add("tq_journal_size_bytes", _bytes_in(self._journal))
            page.add("tq_journal_records_total", journal["records"])
            page.add("tq_journal_unwritten_records", journal["unwritten"])

    def _show_totals(self, page: Page, totals: Totals) -> None:
        page.add("tq_partitions_total", len(totals.partitions))
        page.add("tq_controller_waiting_requests", totals.waiting)
        page.add("tq_policy_version", totals.policy_version)
        page.add("tq_stale_samples_total", totals.stale - self._before.stale)
        page.add("tq_leases_open", len(totals.leases))
        page.add("tq_leased_samples", sum(lease.held for lease in with_breaks(totals.leases)))
        outcomes = Counter(dict.fromkeys(_OUTCOMES.values(), 0))
        for how, count in (totals.ended - self._before.ended).items():
            outcomes[_OUTCOMES.get(how, how)] += count
        for outcome, count in outcomes.items():
            page.add("tq_leases_ended_total", count, outcome)
        for task, count in (totals.redelivered - self._before.redelivered).items():
            page.add("tq_redelivered_samples_total", count, task)

    def _show_partitions(self, page: Page, totals: Totals) -> None:
        partitions: list[PartitionFigures] = []
        for at in range(0, len(totals.partitions), PARTITIONS_AT_ONCE):
            partitions += self._partitions(totals.partitions[at : at + PARTITIONS_AT_ONCE])
        counts = RowCounts(partitions, totals.next_number)
        for start in range(0, totals.capacity if partitions else 0, SLOTS_AT_ONCE):
            counts.add(self._slots(start))
        for place, partition in enumerate(partitions):
            page.add("tq_partition_samples_total", counts.rows[place], partition.name)
            if counts.oldest[place] != RowCounts.NEWEST:
                lag = totals.policy_version - counts.oldest[place]
                page.add("tq_partition_staleness_versions", lag, partition.name)
            for task, produced in partition.produced.items():
                consumed = self._show_task(page, counts, place, partition.name, task)
                expected = int(counts.rows[place]) + partition.to_come
                page.add("tq_partition_production_progress", produced, partition.name, task)
                page.add("tq_partition_consumption_progress", consumed / max(expected, 1), partition.name, task)

    def _show_task(self, page: Page, counts: RowCounts, place: int, name: str, task: str) -> int:
        """Returns how many samples the task consumed."""
        samples = int(counts.rows[place])
        consumed, reserved = (int(by[task][place]) if task in by else 0 for by in (counts.consumed, counts.reserved))
        states = {"pending": samples - consumed - reserved, "reserved": reserved, "consumed": consumed}
        for state, count in states.items():
            page.add("tq_partition_task_samples", count, name, task, state)
        return consumed

    def _show_units(self, page: Page) -> None:
        for unit, report in self._units.latest().items():
            page.add("tq_storage_unit_up", report is not None, unit)
            if report is not None:
                page.add("tq_storage_active_keys_total", report["rows"], unit)
                page.add("tq_storage_memory_rss_bytes", report["rss_bytes"], unit)
                for state in _STATES:
                    page.add("tq_storage_bytes", report[f"bytes_{state}"], unit, state)
                page.add("tq_storage_capacity_bytes", report["bytes_capacity"], unit)
                page.add("tq_storage_disk_bytes", report["bytes_on_disk"], unit)
                page.add("tq_storage_disk_capacity_bytes", report["bytes_disk_capacity"], unit)
                page.add("tq_storage_arenas", report["arenas"], unit)
                page.add("tq_storage_blocks", report["blocks"], unit)
                page.add("tq_storage_pins", report["pins"], unit)
                page.add("tq_storage_waiting_requests", report["waiting"], unit)

    # ------------------------------------------------------------ what is asked

    def _read(self, read: Callable[[Figures], T]) -> T:
        found = self._service.observe(lambda ledger: read(ledger.reports.figures))
        give_way()
        return found

    def _partitions(self, names: tuple[str, ...]) -> list[PartitionFigures]:
        return self._read(lambda figures: figures.partitions(names))

    def _slots(self, start: int) -> Slots:
        return self._read(lambda figures: figures.slots(start))

    def _ask_units(self) -> dict[str, UnitReport | None]:
        units, _ = self._service.units_and_journal()
        away: dict[str, UnitReport | None] = {info.unit_id: None for info, here in units.items() if not here}
        reports = ask_units((info for info, here in units.items() if here), self._connect)
        rows = self._rows_at([info.number for info in units])
        for info in units:
            report = reports.get(info.unit_id)
            if report is not None:
                reports[info.unit_id] = {**report, "rows": rows.get(info.number, 0)}
        return away | reports

    def _connect(self, info: UnitInfo) -> Peer:
        place = (info.local_address, info.folder, info.nonce, info.address)
        return Peer(*place, token=self._token, client_id="metrics", curve_key=info.curve_key, grace_s=0.0)

    def _rows_at(self, units: list[int]) -> dict[int, int]:
        """How many samples have data at each unit, by its number."""
        totals, counts = self._read(Figures.totals), RowsAtUnits(units)
        for start in range(0, totals.capacity, SLOTS_AT_ONCE):
            for field in totals.fields:
                counts.add(self._units_of(field, start))
            counts.next_slots()
        return counts.by_unit()

    def _units_of(self, field: str, start: int) -> Int64s:
        return self._read(lambda figures: figures.units_of(field, start))


def _bytes_in(folder: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):  # of a segment that a snapshot has replaced
                total += entry.stat().st_size
    return total
