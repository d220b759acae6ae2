"""Clients of a storage unit, each with a name of its own, that know what they were granted."""

from __future__ import annotations

import time
from typing import Any

from tests.unit.asking_unit import Answer, block_of, ids, rows
from tests.unit.returning_unit import ReturningUnit, mapped, write_here
from transfer_queue.messages import (
    Pin,
    Pinned,
    ProcessId,
    Reserve,
    Reserved,
    StillHeld,
    Write,
)
from transfer_queue.storage.block import image_parts
from transfer_queue.wire.codec import decode
from transfer_queue.wire.grants import Grants
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.requests import RequestIds


class Client:
    """Asks a unit under a name of its own, and knows what it has."""

    def __init__(self, unit: ReturningUnit, name: str, holder: ProcessId | None = None) -> None:
        self.unit = unit
        self.name = name
        self.holder = holder or process_id()
        self.ids = RequestIds()
        self.grants = Grants(self.ids)

    def submit(self, request: Any, request_id: int = 0) -> Answer:
        answer = Answer(request)
        answer.ticket.client_id, answer.ticket.request_id = self.name, request_id
        self.unit.service.submit(request, answer.ticket)
        return answer

    def ask(self, request: Any) -> Any:
        number, _ = self.ids.take()
        reply = self.submit(request, number).result()
        self.grants.concluded(request, number, reply)
        self.ids.answered(number)
        return reply

    def reserve(self, size: int = 4096) -> Reserved:
        reserved: Reserved = self.ask(Reserve(size_bytes=size, holder=self.holder, timeout_s=5.0))
        return reserved

    def pin(self, *blocks: int) -> Pinned:
        pinned: Pinned = self.ask(Pin(blocks=ids(*blocks), holder=self.holder))
        return pinned

    def lose(self, message: Any) -> None:
        """Give something back by a message that never arrives."""
        assert self.grants.given_back(message)

    def tell(self) -> None:
        """Say what is held, as the first message of a connection does."""
        self.submit(self.statement())

    def statement(self) -> StillHeld:
        frames = self.grants.preface()
        assert frames is not None
        told = decode([bytes(frame) for frame in frames])[1]
        assert isinstance(told, StillHeld)
        return told


def write(span: Reserved, position: int = 0, at: int = 0) -> tuple[int, int]:
    """Write a block of one row into a span; return its id and where the next one begins."""
    block = span.first_block + position
    return block, at + write_here(mapped(span)[at:], block, rows(1, 100))


def figures(unit: ReturningUnit) -> tuple[int, int, int]:
    """How many open spans, pins and blocks there are."""
    stats = unit.stats()
    return stats["spans"], stats["pins"], stats["blocks"]


def settled(unit: ReturningUnit) -> None:
    """Take turns, and wait until what they found is settled."""
    space, reaper = unit.service._space, unit.service._reaper
    for _ in range(2):
        unit.turn(1.0)
        deadline = time.monotonic() + 20.0
        while reaper._settling or any(span.settling for span in list(space.spans.values())):
            assert time.monotonic() < deadline, "it was not settled"
            time.sleep(0.001)


def put_elsewhere(client: Client, *, whole: bool = True) -> Reserved:
    """Write a block by messages; the span stays open."""
    plan = block_of(rows(1, 100))
    span = client.reserve(plan.size_bytes)
    parts = image_parts(plan, span.first_block)
    frames = tuple(parts) if whole else (parts[0],)
    client.ask(Write(span=span.span, offset=0, frames=frames))
    return span
