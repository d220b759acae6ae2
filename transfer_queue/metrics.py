"""Prometheus metrics: what there is to export, the page of one scrape, and the endpoint that serves it.

`FAMILIES` is the one table of names. A page is filled by `Page.add`, which refuses what is not in the table. Making a
page of many partitions takes Python a while: it gives way to the other threads of the process all the time, for the
one that serves the queue is among them.
"""

from __future__ import annotations

import bisect
import functools
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, NamedTuple, TypeVar

from transfer_queue.errors import ConnectionLost, InvalidArgument

log = logging.getLogger("transfer_queue")

T = TypeVar("T")

PATH = "/metrics"
BUCKETS_S = (1e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0)
WAIT_BUCKETS_S = (1e-3, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

_GIVE_WAY_EVERY = 128  # samples or the like, which take less than a millisecond
_GIVE_WAY_S = 2e-5
_MOST_CONNECTIONS = 16
_PATIENCE_S = 10.0  # with whoever asks and does not read


class Family(NamedTuple):
    """One metric. `text` is its help, `labels` name what tells its samples apart."""

    kind: str  # gauge, counter or histogram
    text: str
    labels: tuple[str, ...] = ()


_TASK = ("partition_id", "task_name")
_UNIT = ("storage_unit_id",)
_GAUGE, _COUNTER, _HISTOGRAM = "gauge", "counter", "histogram"

FAMILIES: dict[str, Family] = {
    # requests
    "tq_controller_request_total": Family(_COUNTER, "Requests to the controller.", ("op_type",)),
    "tq_controller_request_failures_total": Family(
        _COUNTER, "Requests that were answered with an error, by its type.", ("op_type", "error")
    ),
    "tq_controller_request_duration_seconds": Family(
        _HISTOGRAM, "Time that the controller worked on a request, the wait for its lock included.", ("op_type",)
    ),
    "tq_controller_request_wait_seconds": Family(
        _HISTOGRAM, "Time that a request then waited for its answer: for rows, room, units or the disk.", ("op_type",)
    ),
    "tq_controller_waiting_requests": Family(_GAUGE, "Requests that wait for rows, keys or room."),
    "tq_controller_uptime_seconds": Family(_GAUGE, "Age of the controller's process."),
    "tq_controller_auth_failures_total": Family(_COUNTER, "Connections that did not prove the token."),
    "tq_controller_malformed_messages_total": Family(_COUNTER, "Messages that could not be decoded."),
    "tq_controller_handler_failures_total": Family(_COUNTER, "Bugs that a request or a timer ran into."),
    # partitions
    "tq_partitions_total": Family(_GAUGE, "Partitions."),
    "tq_partition_samples_total": Family(_GAUGE, "Samples that are not cleared.", ("partition_id",)),
    "tq_partition_task_samples": Family(
        _GAUGE, "Samples of a partition for a task: pending, reserved (leased, say) or consumed.", (*_TASK, "state")
    ),
    "tq_partition_production_progress": Family(
        _GAUGE, "Share of what a task asks for that is there: samples (those to come too) times fields, 0 to 1.", _TASK
    ),
    "tq_partition_consumption_progress": Family(
        _GAUGE, "Share of the samples, those to come too, that a task consumed, 0 to 1.", _TASK
    ),
    "tq_partition_staleness_versions": Family(
        _GAUGE, "Policy versions by which the oldest sample lags behind.", ("partition_id",)
    ),
    # flow
    "tq_put_samples_total": Family(_COUNTER, "Samples named by puts that were carried out."),
    "tq_put_bytes_total": Family(_COUNTER, "Bytes of the blocks of these puts."),
    "tq_drawn_samples_total": Family(_COUNTER, "Samples handed out.", ("task_name",)),
    "tq_draw_wait_seconds": Family(_HISTOGRAM, "Time that draws were parked until they were served.", ("task_name",)),
    "tq_waiting_draws": Family(
        _GAUGE,
        "Draws that are parked, by a field that samples of the partition lack (none: too few samples).",
        ("task_name", "missing_field"),
    ),
    "tq_waiting_draws_oldest_seconds": Family(
        _GAUGE, "How long the oldest of them has waited.", ("task_name", "missing_field")
    ),
    "tq_policy_version": Family(_GAUGE, "Version of the policy, as last set."),
    "tq_stale_samples_total": Family(_COUNTER, "Samples dropped because they were too old for the policy."),
    # leases
    "tq_leases_open": Family(_GAUGE, "Leases that are open."),
    "tq_leased_samples": Family(_GAUGE, "Samples under open leases that are not acknowledged yet."),
    "tq_leases_ended_total": Family(_COUNTER, "Leases that ended.", ("outcome",)),
    "tq_redelivered_samples_total": Family(
        _COUNTER, "Samples handed out again after their lease had run out.", ("task_name",)
    ),
    # journal
    "tq_journal_size_bytes": Family(_GAUGE, "Size of the files of the controller's journal."),
    "tq_journal_records_total": Family(_COUNTER, "Records of the journal, over all lives of the controller."),
    "tq_journal_unwritten_records": Family(_GAUGE, "Changes that wait for space in the journal."),
    # storage
    "tq_storage_unit_up": Family(_GAUGE, "Whether the unit answered when it was asked last.", _UNIT),
    "tq_storage_active_keys_total": Family(_GAUGE, "Samples with data at the unit.", _UNIT),
    "tq_storage_memory_rss_bytes": Family(_GAUGE, "Resident memory of the unit's process.", _UNIT),
    "tq_storage_bytes": Family(
        _GAUGE,
        "Arenas by use: live, pinned (cleared, but still read), reserved (lent to writers), overhead, free.",
        (*_UNIT, "state"),
    ),
    "tq_storage_capacity_bytes": Family(_GAUGE, "Most shared memory that the unit may take.", _UNIT),
    "tq_storage_disk_bytes": Family(_GAUGE, "Arenas that are on disk, as shared memory was full.", _UNIT),
    "tq_storage_disk_capacity_bytes": Family(_GAUGE, "Most disk that the unit may take.", _UNIT),
    "tq_storage_arenas": Family(_GAUGE, "Files of shared memory, and on disk.", _UNIT),
    "tq_storage_blocks": Family(_GAUGE, "Blocks, that is puts that have data at the unit.", _UNIT),
    "tq_storage_pins": Family(_GAUGE, "Holds of readers on blocks.", _UNIT),
    "tq_storage_waiting_requests": Family(_GAUGE, "Writers that wait for space.", _UNIT),
}


def give_way() -> None:
    """Let other threads run: one that computes on makes each of them wait for milliseconds."""
    time.sleep(_GIVE_WAY_S)


def with_breaks(items: Iterable[T]) -> Iterator[T]:
    """The same items, giving way every now and then: for loops that compute some microseconds for each."""
    for number, item in enumerate(items, 1):
        yield item
        if number % _GIVE_WAY_EVERY == 0:
            give_way()


class Durations:
    """Counts of times in buckets. Thread-safe."""

    def __init__(self, bounds: Sequence[float] = BUCKETS_S) -> None:
        self.bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum_s = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        at = bisect.bisect_left(self.bounds, seconds)
        with self._lock:
            self._counts[at] += 1
            self._sum_s += seconds

    def read(self) -> tuple[list[int], float]:
        """(count per bucket, the last one without bound; sum in seconds)."""
        with self._lock:
            return list(self._counts), self._sum_s


class Page:
    """The samples of one scrape, in Prometheus' text format.

    They are written down at once: `prometheus_client` takes five times as long, 0.1 s for 20 000 of them.
    """

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}
        self._quoted = _Quoted()
        self._size = 0

    def add(self, name: str, value: float, *labels: str) -> None:
        """One sample; `labels` in the order of the family."""
        self._put(name, _form(name, FAMILIES[name].labels), labels, value)

    def add_histogram(self, name: str, durations: Durations, *labels: str) -> None:
        """The samples of one histogram."""
        names = FAMILIES[name].labels
        bucket = _form(f"{name}_bucket", (*names, "le"))
        counts, sum_s = durations.read()
        total = 0
        for bound, count in zip((*map(str, durations.bounds), "+Inf"), counts, strict=True):
            total += count
            self._put(name, bucket, (*labels, bound), total)
        self._put(name, _form(f"{name}_count", names), labels, total)
        self._put(name, _form(f"{name}_sum", names), labels, sum_s)

    def text(self) -> bytes:
        """The page, families in the order of the table."""
        found = ((name, family) for name, family in FAMILIES.items() if name in self._lines)
        parts = (
            f"# HELP {name} {family.text}\n# TYPE {name} {family.kind}\n{''.join(self._lines[name])}"
            for name, family in found
        )
        return "".join(parts).encode()

    def _put(self, name: str, form: str, labels: tuple[str, ...], value: float) -> None:
        line = form % (*[self._quoted[label] for label in labels], float(value))
        self._lines.setdefault(name, []).append(line)
        self._size += 1
        if self._size % _GIVE_WAY_EVERY == 0:
            give_way()


class _Quoted(dict[str, str]):
    """Values of labels as they are written."""

    def __missing__(self, label: str) -> str:
        self[label] = quoted = label.translate(_ESCAPES)
        return quoted


_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


@functools.cache
def _form(name: str, labels: tuple[str, ...]) -> str:
    """A line with places for the values of the labels and of the sample."""
    pairs = ",".join(f'{label}="%s"' for label in labels)
    return f"{name}{{{pairs}}} %r\n" if pairs else f"{name} %r\n"


def process_figures() -> Callable[[], bytes]:
    """What `prometheus_client` tells of any Python process: memory, processor time, descriptors, garbage collection.

    Raises `InvalidArgument` with the install command if the package is missing.
    """
    try:
        from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest
    except ImportError as error:
        raise InvalidArgument(
            "metrics need the package prometheus-client: pip install 'transfer-queue[metrics]', or set metrics.enabled "
            "to false"
        ) from error
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return lambda: generate_latest(registry)


class Endpoint(ThreadingMixIn, TCPServer):
    """Answers GET /metrics with what `page` returns, until `close`. One page is made at a time."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, ports: Iterable[int], page: Callable[[], bytes]) -> None:
        """Listen at the first of these ports that is free. Raises `ConnectionLost` if none is."""
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._page = page
        self._making = threading.Lock()
        self._open = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._closing = False
        self._listen(host, ports)
        self.port: int = self.server_address[1]
        self._thread = threading.Thread(target=self._serve, name="transfer_queue metrics", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"<Endpoint of metrics at port {self.port}{': closed' if self._closing else ''}>"

    def page(self) -> bytes:
        """A new page. Raises `ConnectionLost` after `close`."""
        with self._making:
            if self._closing:
                raise ConnectionLost("this endpoint was closed")
            return self._page()

    def close(self) -> None:
        """Stop listening, and wait for the page that is being made. May be called twice."""
        if not self._closing:
            self._closing = True
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
            self._thread.join()
            self.server_close()
            with self._making:
                pass

    def _listen(self, host: str, ports: Iterable[int]) -> None:
        refused, tried = OSError("no port to try"), host
        for port in ports:
            try:
                TCPServer.__init__(self, (host, port), _Handler)
                return
            except (OSError, OverflowError) as error:
                refused, tried = OSError(str(error)), f"{host}:{port}"
        raise ConnectionLost(f"cannot serve metrics at {tried}: {refused}; choose another metrics.port") from refused

    def _serve(self) -> None:
        while not self._closing:
            self.handle_request()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._open.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):  # those are of the one who asked
            log.warning("a scrape of the metrics failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    timeout = _PATIENCE_S
    server: Endpoint

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self.send_error(404, explain=f"metrics are at {PATH}")
            return
        text = self.server.page()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""
