"""Writing blocks: straight into the arenas of units on this host, elsewhere in frames of at most 8 MiB."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from transfer_queue.client.steps import Call, Compute, Notify, Operation, Wait
from transfer_queue.client.transfer import Transfer, refresh
from transfer_queue.client.units import SHARED_SPAN_BYTES, Place, UnitHandle, span_memory
from transfer_queue.errors import CapacityExceeded, ConnectionLost
from transfer_queue.messages import UNIT_SHIFT, AbortBlocks, Reserve, Reserved, ReturnSpan, Write
from transfer_queue.storage.block import HEADER_BYTES, BlockPlan, Bytes, carve, fill_block, image_parts, unsealed
from transfer_queue.storage.packing import MAX_FRAME_BYTES
from transfer_queue.wire.holders import ELSEWHERE, process_id
from transfer_queue.wire.peer import AnyPeer

WRITES_IN_FLIGHT = 4

_SPAN_WAIT_S = 0.1


def store(transfer: Transfer, plan: BlockPlan, timeout_s: float) -> Operation[tuple[AnyPeer, int]]:
    """Write a block at the unit that suits best; return (peer of the unit, block id).

    The block is complete but nobody knows it yet: commit it at the controller, or send `AbortBlocks` to the peer.
    Waits for space until the timeout and then raises `CapacityExceeded`; an operation that raised left no block.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        unit = yield from _unit_for_put(transfer, timeout_s)
        unit.sent_bytes += plan.size_bytes
        try:
            return unit.peer, (yield from _store_at(transfer, unit, plan, timeout_s))
        except ConnectionLost:
            failed = transfer.units.forget(unit)
            transfer.refresh_at = 0.0
            timeout_s = deadline - time.monotonic()
            if failed or timeout_s <= 0:
                raise
        # somebody else found meanwhile that the unit has another number or place now, and closed the connection


def renounce(transfer: Transfer, block: int | None, timeout_s: float) -> Operation[None]:
    """A block that was stored cannot be put: use its span no more, and learn which units there are now.

    A unit that is there under another number has forgotten the span with all others.
    """
    number = 0 if block is None else block >> UNIT_SHIFT
    unit = transfer.units.get(number)
    yield from refresh(transfer, timeout_s)
    if block is not None and unit is not None and transfer.units.get(number) is unit:
        span = unit.span.drop(block)
        if span is not None:
            yield Notify(unit.peer, ReturnSpan(span=span))


def _store_at(transfer: Transfer, unit: UnitHandle, plan: BlockPlan, timeout_s: float) -> Operation[int]:
    if not unit.local:
        return (yield from _send(unit, plan, timeout_s))
    if plan.size_bytes <= SHARED_SPAN_BYTES:
        place = yield from _share(transfer, unit, plan)
        if place is not None:
            yield from _fill(unit, plan, place)
            return place.block_id
    return (yield from _store_alone(transfer, unit, plan, timeout_s))


def _unit_for_put(transfer: Transfer, timeout_s: float) -> Operation[UnitHandle]:
    unit = transfer.units.best()
    if unit is None or transfer.stale:
        yield from refresh(transfer, timeout_s)
        unit = transfer.units.best()
    if unit is None:
        raise ConnectionLost("the controller knows no storage unit; start one, or wait until it has announced itself")
    return unit


def _share(transfer: Transfer, unit: UnitHandle, plan: BlockPlan) -> Operation[Place | None]:
    """Claim a place in the span of the small puts; None if the unit has no room for such a span now, or the next one
    was filled by others at once.

    One of many concurrent puts asks for the next span, the others wait for it.
    """
    late = None
    while (place := unit.span.carve(plan)) is None:
        asked = unit.span.ask(late)
        if asked is None:
            break
        late = None if (yield Wait(asked, _SPAN_WAIT_S)) else asked
    if place is not None:
        return place
    try:
        place = unit.span.carve(plan)  # the next span may have come just before it was our turn to ask
        if place is not None:
            return place
        span: Reserved = yield Call(unit.peer, _reserve(unit.span.next_bytes, 0.0), 0.0)
        old = unit.span.replace(span, span_memory(transfer.maps, span))
    except CapacityExceeded:
        unit.span.refused()
        return None
    finally:
        unit.span.answered()
    place = unit.span.carve(plan)
    if old is not None:
        yield Notify(unit.peer, ReturnSpan(span=old))
    return place


def _store_alone(transfer: Transfer, unit: UnitHandle, plan: BlockPlan, timeout_s: float) -> Operation[int]:
    """Write into a span of exactly the right size."""
    span: Reserved = yield Call(unit.peer, _reserve(plan.size_bytes, timeout_s), timeout_s)
    try:
        place = Place(span.first_block, span_memory(transfer.maps, span)[: plan.size_bytes])
        unit.peer.unput.add(place.block_id)
        carve(plan, place.memory, place.block_id)
    finally:
        yield Notify(unit.peer, ReturnSpan(span=span.span))
    yield from _fill(unit, plan, place)
    return place.block_id


def _fill(unit: UnitHandle, plan: BlockPlan, place: Place) -> Operation[None]:
    try:
        yield Compute(lambda: fill_block(plan, place.memory), plan.size_bytes)
    except BaseException:
        yield Notify(unit.peer, _abort(place.block_id))
        raise


def _send(unit: UnitHandle, plan: BlockPlan, timeout_s: float) -> Operation[int]:
    """Write over the network, some messages at a time; the header says that the block is complete only at the end."""
    request = Reserve(size_bytes=plan.size_bytes, holder=ELSEWHERE, timeout_s=timeout_s)
    span: Reserved = yield Call(unit.peer, request, timeout_s)
    unit.peer.unput.add(span.first_block)
    try:
        hashed_bytes = 0 if plan.chunks is None else plan.size_bytes
        parts: list[Bytes] = yield Compute(lambda: image_parts(plan, span.first_block), hashed_bytes)
        at_once, sealed = plan.size_bytes <= MAX_FRAME_BYTES, parts[0][:HEADER_BYTES].data
        if not at_once:
            parts[0] = unsealed(parts[0])
        calls = [Call(unit.peer, write, timeout_s) for write in _write_messages(span.span, parts)]
        for first in range(0, len(calls), WRITES_IN_FLIGHT):
            yield calls[first : first + WRITES_IN_FLIGHT]
        if not at_once:
            yield Call(unit.peer, Write(span=span.span, offset=0, frames=(sealed,)), timeout_s)
    except BaseException:
        yield Notify(unit.peer, ReturnSpan(span=span.span))
        yield Notify(unit.peer, _abort(span.first_block))
        raise
    yield Notify(unit.peer, ReturnSpan(span=span.span))
    return span.first_block


def _write_messages(span: int, parts: Sequence[Bytes]) -> Iterator[Write]:
    """Cut buffers that follow each other into messages of at most 8 MiB."""
    frames: list[memoryview] = []
    start = size = 0
    for part in parts:
        at = 0
        while at < part.nbytes:
            piece = part[at : at + MAX_FRAME_BYTES - size]
            frames.append(piece.data)
            at, size = at + piece.nbytes, size + piece.nbytes
            if size == MAX_FRAME_BYTES:
                yield Write(span=span, offset=start, frames=tuple(frames))
                frames, start, size = [], start + size, 0
    if frames:
        yield Write(span=span, offset=start, frames=tuple(frames))


def _reserve(size_bytes: int, timeout_s: float) -> Reserve:
    return Reserve(size_bytes=size_bytes, holder=process_id(), timeout_s=timeout_s)


def _abort(block_id: int) -> AbortBlocks:
    return AbortBlocks(blocks=np.array([block_id], np.int64))
