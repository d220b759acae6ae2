"""The metrics of a controller: requests are counted as they pass, everything else is read when somebody asks.

A scrape takes the lock of the controller many times, each time for a fraction of a millisecond. What storage units say
of themselves is asked at most every `TQ_METRICS_COLLECT_INTERVAL` seconds, beside the scrape, which waits for it only
for a moment: a unit that is dead or stuck is shown as such.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from transfer_queue import environment
from transfer_queue.controller import ControllerService
from transfer_queue.errors import to_wire
from transfer_queue.ledger.figures import PARTITIONS_AT_ONCE, SLOTS_AT_ONCE, PartitionFigures, RowCounts, Totals
from transfer_queue.messages import ONE_WAY, Draw, Drawn, ErrorReply, Put, PutDone, Reply, Request, UnitInfo
from transfer_queue.metrics import WAIT_BUCKETS_S, Durations, Endpoint, Page, check_installed
from transfer_queue.runtime.unit_reports import UnitReports
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Answer, Handler, Ticket

_COLLECT_INTERVAL_S = 10.0
_MOST_TASKS = 1000  # that are told apart by name
_OTHERS = "(others)"
_OUTCOMES = {"it ran out": "expired", "its holder is gone": "holder_gone", "its samples were cleared": "cleared"}
_STATES = ("live", "pinned", "reserved", "overhead", "free")


class Meter:
    """A handler that counts what passes through it on its way to another one. Thread-safe."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self.tick: Callable[[], float | None] = handler.tick
        self.lost: Callable[[Ticket, Reply | None], None] = handler.lost
        self.gone: Callable[[str], None] = handler.gone
        self.holding: Callable[[], Collection[str]] = handler.holding
        self.requests = Tally()
        self.failures = Tally()
        self.drawn = Tally()
        self.put_samples = Tally()
        self.put_bytes = Tally()
        self.work: dict[str, Durations] = {}
        self.waits: dict[str, Durations] = {}
        self.draw_waits: dict[str, Durations] = {}

    def submit(self, request: Request, ticket: Ticket) -> None:
        """Pass a request on; count it now, and its answer when that comes."""
        name = type(request).__name__
        self.requests.add(1, name)
        passage = _Passage(time.perf_counter())
        if not isinstance(request, ONE_WAY):
            ticket.watch(functools.partial(self._answered, request, passage))
        try:
            self._handler.submit(request, ticket)
        finally:
            passage.handed_in = time.perf_counter()
            _of(self.work, name).add(passage.handed_in - passage.began)
"""
