"""The storage units a client knows, and its spans at them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from transfer_queue.client.arenas import ArenaMaps
from transfer_queue.messages import SPAN_SHIFT, Reserved, ReturnSpan, UnitInfo
from transfer_queue.storage.block import BlockPlan, Bytes, carve
from transfer_queue.storage.spans import BLOCKS_PER_SPAN
from transfer_queue.wire.folder import same_host
from transfer_queue.wire.peer import AnyPeer

Connect: TypeAlias = Callable[[UnitInfo, bool], AnyPeer]

SHARED_SPAN_BYTES = 1 << 20
LARGEST_SPAN_BYTES = 8 << 20

_QUICK_S = 0.5


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block is to be written: claimed, its header there, the rest to come."""

    block_id: int
    memory: Bytes


class SharedSpan:
    """The span that the small puts of one process to one unit share. Thread-safe.

    next_bytes   how large the next one should be: a writer that fills spans quickly gets larger ones
    unput        where the blocks that are carved from it are noted, before they are
    """

    def __init__(self, unput: set[int]) -> None:
        self._unput = unput
        self.next_bytes = SHARED_SPAN_BYTES
        self._replaced_at = 0.0
        self._lock = threading.Lock()
        self._span: Reserved | None = None
        self._memory: Bytes = np.empty(0, np.uint8)
        self._count = self._end = 0  # blocks carved, and where the last one ends
        self._asked: Future[None] | None = None  # ends when the next span is here, or will not come

    def ask(self, late: Future[None] | None) -> Future[None] | None:
        """None: the caller is to ask for the next span, and to call `answered` in any case. Else: it is asked for.

        late  what the caller waited for in vain: it asks in place of the one who did, the others wait for it
        """
        with self._lock:
            asked = self._asked
            if asked is not None and asked is not late:
                return asked
            self._asked = Future()
        if asked is not None:
            asked.set_result(None)
        return None

    def refused(self) -> None:
        """The unit has no room for the next span: ask for less."""
        self.next_bytes = SHARED_SPAN_BYTES

    def answered(self) -> None:
        with self._lock:
            asked, self._asked = self._asked, None
        if asked is not None:
            asked.set_result(None)

    def carve(self, plan: BlockPlan) -> Place | None:
        """Claim the next place in the span; None if there is no span or no room in it."""
        with self._lock:
            if (
                self._span is None
                or self._end + plan.size_bytes > self._memory.nbytes
                or self._count == BLOCKS_PER_SPAN
            ):
                return None
            place = Place(self._span.first_block + self._count, self._memory[self._end : self._end + plan.size_bytes])
            self._unput.add(place.block_id)
            carve(plan, place.memory, place.block_id)
            self._count += 1
            self._end += plan.size_bytes
            return place

    def drop(self, block: int) -> int | None:
        """Go on without the span that this block lies in; return the number of the one to give back, if that was it."""
        with self._lock:
            if self._span is None or self._span.first_block >> SPAN_SHIFT != block >> SPAN_SHIFT:
                return None
            old, self._span, self._memory = self._span, None, np.empty(0, np.uint8)
            return old.span

    def replace(self, span: Reserved | None, memory: Bytes | None) -> int | None:
        """Go on with another span (None: with none); return the number of the one to give back."""
        with self._lock:
            old, self._span = self._span, span
            if memory is not None:
                self._memory = memory
            self._count = self._end = 0
            now = time.monotonic()
            quick = now - self._replaced_at < _QUICK_S
            self.next_bytes = min(2 * self.next_bytes, LARGEST_SPAN_BYTES) if quick else SHARED_SPAN_BYTES
            self._replaced_at = now
            return None if old is None else old.span


@dataclass(eq=False)
class UnitHandle:
    """`local`: its arenas can be mapped from here."""

    info: UnitInfo
    peer: AnyPeer
    local: bool
    span: SharedSpan = field(init=False)
    sent_bytes: int = 0

    def __post_init__(self) -> None:
        self.span = SharedSpan(self.peer.unput)

    def close(self, *, returning: bool) -> None:
        """`returning`: the unit is there, and told that its span is not needed any more; else it is when it is back."""
        if not returning:
            self.peer.close()
        number = self.span.replace(None, None)
        if number is not None:
            self.peer.notify(ReturnSpan(span=number))
        self.peer.close()


class KnownUnits:
    """Units by number. Thread-safe; a forked child knows none. `transport` "tcp" treats every unit as remote."""

    def __init__(self, connect: Connect, transport: str = "auto") -> None:
        self._connect = connect
        self._transport = transport
        self._lock = threading.Lock()
        self._handles: dict[int, UnitHandle] = {}
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<KnownUnits {', '.join(handle.info.unit_id for handle in self._handles.values()) or 'none'}>"

    def update(self, infos: Iterable[UnitInfo]) -> None:
        """Take over what the controller says. A unit that is not among them is disconnected: if it is there under
        another number, it knows nothing of what it lent under the old one.
        """
        self._replace(infos, returning=False)

    def _replace(self, infos: Iterable[UnitInfo], *, returning: bool) -> None:
        self._leave_to_parent()
        listed = {info.number: info for info in infos}
        with self._lock:
            known = dict(self._handles)
            self._handles = {
                number: known.pop(number) if _same(known.get(number), info) else self._handle(info)
                for number, info in listed.items()
            }
        for handle in known.values():
            handle.close(returning=returning)

    def get(self, number: int) -> UnitHandle | None:
        self._leave_to_parent()
        return self._handles.get(number)

    def forget(self, handle: UnitHandle) -> bool:
        """The unit does not answer: ask the controller before it is used again. False: somebody did so already."""
        with self._lock:
            known = self._handles.get(handle.info.number) is handle
            if known:
                del self._handles[handle.info.number]
        handle.close(returning=False)
        return known

    def best(self) -> UnitHandle | None:
        """The unit for the next put: one of this host if there is any; among those, the one that got least."""
        self._leave_to_parent()
        with self._lock:
            return min(self._handles.values(), key=lambda unit: (not unit.local, unit.sent_bytes), default=None)

    def close(self) -> None:
        """Return the spans and disconnect. May be called twice."""
        self._replace((), returning=True)

    def _handle(self, info: UnitInfo) -> UnitHandle:
        local = self._transport != "tcp" and same_host(info.folder, info.nonce)
        return UnitHandle(info, self._connect(info, local), local)

    def _leave_to_parent(self) -> None:
        """After a fork: spans and connections are the parent's, and the lock may be held for ever."""
        if os.getpid() != self._pid:
            self._pid, self._lock, self._handles = os.getpid(), threading.Lock(), {}


def _same(handle: UnitHandle | None, info: UnitInfo) -> bool:
    return handle is not None and (handle.info.address, handle.info.nonce) == (info.address, info.nonce)


def span_memory(maps: ArenaMaps, span: Reserved) -> Bytes:
    return maps.view(span.arena)[span.offset : span.offset + span.size_bytes]
