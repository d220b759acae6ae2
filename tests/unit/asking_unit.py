"""A storage unit with somebody who asks it, for tests."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np

from transfer_queue.messages import (
    ColumnSpec,
    Fetch,
    Fetched,
    FreeBlocks,
    GetUnitStats,
    ProcessId,
    Report,
    Reserve,
    Reserved,
    ReturnSpan,
    Write,
)
from transfer_queue.storage.block import Directories, EncodedColumn, image_parts, plan_block
from transfer_queue.storage.gather import RowSet, pick
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.ticket import Ticket

MIB = 1 << 20
NONE = np.empty(0, np.int64)


class Answer:
    """The asking end of a request: keeps its one answer."""

    _numbers = itertools.count(1)

    def __init__(self, request: Any) -> None:
        self.ticket = Ticket("tester", next(self._numbers), "channel", request, self._deliver)
        self.replies: list[Any] = []
        self._there = threading.Event()

    def _deliver(self, ticket: Ticket, reply: Any) -> None:
        self.replies.append(reply)
        self._there.set()

    def result(self) -> Any:
        assert self._there.wait(20), "no answer"
        [reply] = self.replies
        if isinstance(reply, BaseException):
            raise reply
        return reply


class Unit:
    """A unit of its own, asked as a client asks."""

    def __init__(self, folder: Path, number: int = 3, **options: Any) -> None:
        self.now = 100.0
        self.service = UnitService(folder, clock=lambda: self.now, **options)
        self.service.number = number

    def begin(self, request: Any) -> Answer:
        answer = Answer(request)
        self.service.submit(request, answer.ticket)
        return answer

    def ask(self, request: Any) -> Any:
        return self.begin(request).result()

    def tell(self, request: Any) -> None:
        assert self.begin(request).replies == []

    def reserve(self, size: int, holder: ProcessId | None = None) -> Reserved:
        reserved = self.ask(Reserve(size_bytes=size, holder=holder or process_id(), timeout_s=5.0))
        assert isinstance(reserved, Reserved)
        return reserved

    def put(
        self,
        values: np.ndarray[Any, Any],
        holder: ProcessId | None = None,
        references: np.ndarray[Any, Any] | None = None,
    ) -> int:
        """Store rows [n, width], or values and which of them the rows share, as field "x"; return the block id."""
        plan = block_of(values, references)
        span = self.reserve(plan.size_bytes, holder)
        self.ask(Write(span=span.span, offset=0, frames=tuple(image_parts(plan, span.first_block))))
        self.tell(ReturnSpan(span=span.span))
        return span.first_block

    def read(self, block: int, slots: list[int]) -> np.ndarray[Any, Any]:
        """Fetch rows of "x", as a reader on another host does."""
        chosen = np.array(slots, np.int64)
        found = self.ask(Fetch(blocks=np.full_like(chosen, block), slots=chosen, fields=("x",), max_bytes=1 << 30))
        return unpacked(found, len(slots))[0]

    def stats(self) -> dict[str, int]:
        """Return the figures of the space; the parts must be the whole."""
        report = self.ask(GetUnitStats())
        assert isinstance(report, Report)
        entries = {name: figure for name, figure in report.entries.items() if name != "rss_bytes"}
        parts = ("bytes_live", "bytes_pinned", "bytes_reserved", "bytes_overhead", "bytes_free")
        assert sum(entries[part] for part in parts) == entries["bytes_arenas"]
        assert min(entries.values()) >= 0
        return entries

    def turn(self, seconds: float) -> None:
        self.now += seconds
        self.service.tick()


def block_of(values: np.ndarray[Any, Any], references: np.ndarray[Any, Any] | None = None) -> Any:
    spec = ColumnSpec(name="x", layout="dense", dtype="uint8", shape=values.shape[1:])
    column = EncodedColumn(spec, [np.ascontiguousarray(values).reshape(-1)], references=references)
    return plan_block([column], len(values if references is None else references))


def unpacked(found: Fetched, rows: int) -> list[np.ndarray[Any, Any]]:
    """Open the images of a reply; return "x" of each."""
    arrays, frames = [], list(found.frames)
    for count in found.frames_of.tolist():
        image = np.concatenate([np.frombuffer(frames.pop(0), np.uint8) for _ in range(count)])
        block = Directories().open_block(image)
        slots = np.arange(block.head.rows)
        [part] = pick("x", RowSet([block], slots * 0, slots))
        out = np.empty(part.size_bytes, np.uint8)
        part.copy_into(out)
        arrays.append(out.reshape(block.head.rows, *(part.spec.shape or ())))
    assert sum(map(len, arrays)) == found.rows <= rows and not frames
    return arrays


def ids(*blocks: int) -> np.ndarray[Any, Any]:
    return np.array(blocks, np.int64)


def free(*blocks: int) -> FreeBlocks:
    return FreeBlocks(sequence=1, blocks=ids(*blocks), partial_blocks=NONE, partial_slots=NONE)


def clear(block: int, slots: list[int]) -> FreeBlocks:
    return FreeBlocks(
        sequence=1, blocks=NONE, partial_blocks=np.full(len(slots), block, np.int64), partial_slots=ids(*slots)
    )


def rows(count: int, width: int, first: int = 1) -> np.ndarray[Any, Any]:
    """Row i is filled with first + i."""
    return np.repeat(np.arange(first, first + count, dtype=np.uint8)[:, None], width, axis=1)
