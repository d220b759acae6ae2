"""What a storage unit must not forget: facts, written down before anybody sees their effect.

A fact is a tuple of a kind and its values. The facts of a unit from its first day on, or those that `all_facts`
gives at any moment and all since, say which spans, blocks and pins there are; `Known.of` finds it out. Which slots of
a block are cleared is no fact of the unit: the controller knows it. That bytes of a block went back is one.

    (ARENA, name, bytes)                          a file to lend from           (ARENA_GONE, name)
    (SPAN, number, first block, arena, start, bytes, host, pid, start time, client, request)
                                                  lent to a process (host None: dead, and its blocks are settled)
    (WALKED, span, blocks, end)                   so many blocks were found     (FINISHED, span)
    (BLOCK, id, start, bytes)                     found behind the one before   (DROPPED, id)
    (PARTIAL, id)                                 some of its bytes were given back
    (FREED, id)                                   nobody points to it, but it is pinned
    (PIN, number, host, pid, start time, client, request, ids)
                                                  `ids` as raw int64            (UNPIN, number)
    (NEXT, span, pin)                             numbers below these are used up
    (LIFE, name)                                  of this index, as long as it is whole
    (LOST, id)                                    its bytes are gone, and the controller does not know it yet
    (SPAN_LOST, first block)                      the same of a span, with all that its holder may have carved
    (TOLD,)                                       now it does
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeAlias

import numpy as np

from transfer_queue.errors import DecodeError
from transfer_queue.messages import SPAN_SHIFT, UNIT_SHIFT, Int64s, ProcessId

Fact: TypeAlias = tuple[Any, ...]
Asked: TypeAlias = tuple[str, int]  # client id and request id of who asked for a span or a pin

NOBODY: Asked = ("", 0)


class Kind(IntEnum):
    ARENA = 0
    ARENA_GONE = 1
    SPAN = 2
    WALKED = 3
    FINISHED = 4
    BLOCK = 5
    DROPPED = 6
    PARTIAL = 7
    FREED = 8
    PIN = 9
    UNPIN = 10
    NEXT = 11
    LIFE = 12
    LOST = 13
    SPAN_LOST = 14
    TOLD = 15


SPAN_MASK = (1 << (UNIT_SHIFT - SPAN_SHIFT)) - 1


def pin_fact(number: int, holder: ProcessId, asked: Asked, blocks: Int64s) -> Fact:
    return (Kind.PIN, number, holder.host, holder.pid, holder.start_time, *asked, blocks.tobytes())


@dataclass
class KnownBlock:
    block_id: int
    start: int
    size_bytes: int
    partial: bool = False
    freed: bool = False


@dataclass
class KnownSpan:
    number: int
    first_block: int
    arena: str
    start: int
    size_bytes: int
    holder: ProcessId | None
    asked: Asked
    end: tuple[int, int]  # how many blocks were found, and where they end
    open: bool = True
    blocks: dict[int, KnownBlock] = field(default_factory=dict)  # by id


@dataclass
class KnownPin:
    holder: ProcessId
    asked: Asked
    blocks: list[int]


@dataclass
class Known:
    """What facts add up to.

    Where nothing is known, the numbers of spans and pins begin anywhere, so that those of another life mean nothing
    here, but low: ids go up, and are used up late.
    """

    arenas: dict[str, int] = field(default_factory=dict)  # name -> bytes
    spans: dict[int, KnownSpan] = field(default_factory=dict)
    pins: dict[int, KnownPin] = field(default_factory=dict)
    next_span: int = field(default_factory=lambda: 1 + secrets.randbelow(SPAN_MASK >> 2))
    next_pin: int = field(default_factory=lambda: 1 + secrets.randbelow(1 << 62))
    life: str | None = None
    lost: set[int] = field(default_factory=set)
    lost_spans: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, facts: Iterable[Fact]) -> Known:
        """Raises `DecodeError` for facts that no unit writes in this order."""
        known = cls()
        for fact in facts:
            try:
                known._add(fact)
            except (LookupError, TypeError, ValueError) as error:
                raise DecodeError(f"the storage unit's journal has a fact that does not fit: {fact!r}") from error
        return known

    def _add(self, fact: Fact) -> None:
        match fact:
            case (Kind.ARENA, name, size):
                self.arenas[name] = size
            case (Kind.ARENA_GONE, name):
                self.arenas.pop(name)
            case (Kind.PIN, number, host, pid, start_time, client, request, ids):
                holder = ProcessId(host=host, pid=pid, start_time=start_time)
                self.pins[number] = KnownPin(holder, (client, request), np.frombuffer(ids, np.int64).tolist())
                self.next_pin = number + 1
            case (Kind.UNPIN, number):
                self.pins.pop(number)
            case (Kind.NEXT, span, pin):
                self.next_span, self.next_pin = span, pin
            case (Kind.LIFE, name):
                self.life = name
            case (Kind.LOST, block_id):
                self.lost.add(block_id)
            case (Kind.SPAN_LOST, first):
                self.lost_spans.add(first)
            case (Kind.TOLD,):
                self.lost.clear()
                self.lost_spans.clear()
            case _:
                self._add_of_span(fact)

    def _add_of_span(self, fact: Fact) -> None:
        match fact:
            case (Kind.SPAN, number, first, arena, start, size, host, pid, start_time, client, request):
                holder = None if host is None else ProcessId(host=host, pid=pid, start_time=start_time)
                self.spans[number] = KnownSpan(number, first, arena, start, size, holder, (client, request), (0, start))
                self.next_span = number % SPAN_MASK + 1
            case (Kind.WALKED, number, count, end):
                self.spans[number].end = (count, end)
            case (Kind.FINISHED, number):
                span = self.spans[number]
                span.open = False
                self._forget_empty(span)
            case (Kind.BLOCK, block_id, start, size):
                span = self._span_of(block_id)
                span.blocks[block_id] = KnownBlock(block_id, start, size)
                span.end = (block_id - span.first_block + 1, start + size)
            case (Kind.DROPPED, block_id):
                span = self._span_of(block_id)
                span.blocks.pop(block_id)
                self._forget_empty(span)
            case (Kind.PARTIAL, block_id):
                self._span_of(block_id).blocks[block_id].partial = True
            case (Kind.FREED, block_id):
                self._span_of(block_id).blocks[block_id].freed = True
            case _:
                raise ValueError("unknown kind")

    def _span_of(self, block_id: int) -> KnownSpan:
        return self.spans[block_id >> SPAN_SHIFT & SPAN_MASK]

    def _forget_empty(self, span: KnownSpan) -> None:
        if not span.open and not span.blocks:
            del self.spans[span.number]
