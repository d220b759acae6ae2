"""Moving columns between this process and the storage units.

On the same host the bytes are copied straight into and out of the arenas; elsewhere they travel in frames of at
most 8 MiB. `store` and `load` are operations: they say what to ask whom, a driver does it.

B rows of a request
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from transfer_queue.client.arenas import ArenaMaps, Hold, Releaser, private_views
from transfer_queue.client.buffers import DEFAULT_IDLE_BYTES, BufferPool
from transfer_queue.client.fetching import Fetching
from transfer_queue.client.results import copied
from transfer_queue.client.steps import Call, Compute, Notify, Operation, Wait
from transfer_queue.client.units import SHARED_SPAN_BYTES, Connect, KnownUnits, Place, UnitHandle, span_memory
from transfer_queue.errors import CapacityExceeded, ConnectionLost, StaleSampleError
from transfer_queue.messages import (
    UNIT_SHIFT,
    AbortBlocks,
    Int64s,
    ListUnits,
    Location,
    Pin,
    Pinned,
    Reserve,
    Reserved,
    ReturnSpan,
    Units,
    Unpin,
    Write,
)
from transfer_queue.storage.block import (
    SEALED,
    WRITING,
    Block,
    BlockPlan,
    Bytes,
    Directories,
    EncodedColumn,
    carve,
    fill_block,
    image_parts,
    plan_block,
)
from transfer_queue.storage.gather import GatheredColumn, Pick, RowSet, gathered, pick
from transfer_queue.storage.packing import MAX_FRAME_BYTES
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.peer import AnyPeer

WRITES_IN_FLIGHT = 4

_REFRESH_S = 30.0
_SPAN_WAIT_S = 0.1


class Transfer:
    """What one client keeps between operations: units, mapped arenas, spans, warm buffers.

    connect     opens a connection to a unit; the flag tells whether the unit is on this host
    transport   "auto", or "tcp" to treat units of this host as remote
    """

    def __init__(
        self,
        controller: AnyPeer,
        connect: Connect,
        *,
        transport: str = "auto",
        max_idle_bytes: int = DEFAULT_IDLE_BYTES,
    ) -> None:
        self.controller = controller
        self.units = KnownUnits(connect, transport)
        self.maps = ArenaMaps()
        self.pool = BufferPool(max_idle_bytes)
        self.directories = Directories()
        self.releaser = Releaser()
        self.refresh_at = 0.0

    def __repr__(self) -> str:
        return f"<Transfer: {self.units!r}, {self.maps!r}, {self.pool!r}>"

    def close(self) -> None:
        """Return the spans, close the connections to units. Views and results stay valid. May be called twice."""
        self.releaser.close()
        self.units.close()
        self.maps.clear()
        self.pool.clear()


# ---------------------------------------------------------------- store


def store(
    transfer: Transfer, columns: Sequence[EncodedColumn], rows: int, timeout_s: float
) -> Operation[tuple[AnyPeer, int]]:
    """Write a block at the unit that suits best; return (peer of the unit, block id).

    The block is complete but nobody knows it yet: commit it at the controller, or send `AbortBlocks` to the peer.
    Waits for space until the timeout and then raises `CapacityExceeded`; an operation that raised left no block.
    """
    plan = plan_block(columns, rows)
    unit = yield from _unit_for_put(transfer, timeout_s)
    unit.sent_bytes += plan.size_bytes
    try:
        if not unit.local:
            return unit.peer, (yield from _send(unit, plan, timeout_s))
        place = None
        if plan.size_bytes <= SHARED_SPAN_BYTES:
            place = yield from _share(transfer, unit, plan)
        if place is not None:
            yield from _fill(unit, plan, place)
            return unit.peer, place.block_id
        return unit.peer, (yield from _store_alone(transfer, unit, plan, timeout_s))
    except ConnectionLost:
        transfer.units.forget(unit)
        transfer.refresh_at = 0.0
        raise


def _unit_for_put(transfer: Transfer, timeout_s: float) -> Operation[UnitHandle]:
    unit = transfer.units.best()
    if unit is None or time.monotonic() >= transfer.refresh_at:
        yield from _refresh(transfer, timeout_s)
        unit = transfer.units.best()
    if unit is None:
        raise ConnectionLost("the controller knows no storage unit; start one, or wait until it has announced itself")
    return unit


def _refresh(transfer: Transfer, timeout_s: float) -> Operation[None]:
    reply: Units = yield Call(transfer.controller, ListUnits(timeout_s=timeout_s), timeout_s)
    transfer.units.update(reply.units)
    transfer.refresh_at = time.monotonic() + _REFRESH_S


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
    span: Reserved = yield Call(unit.peer, _reserve(plan.size_bytes, timeout_s), timeout_s)
    try:
        at_once = plan.size_bytes <= MAX_FRAME_BYTES
        parts = image_parts(plan, span.first_block, SEALED if at_once else WRITING)
        calls = [Call(unit.peer, write, timeout_s) for write in _write_messages(span.span, parts)]
        for first in range(0, len(calls), WRITES_IN_FLIGHT):
            yield calls[first : first + WRITES_IN_FLIGHT]
        if not at_once:
            sealed = plan.header(span.first_block, SEALED)
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


# ---------------------------------------------------------------- load


def load(
    transfer: Transfer, locations: Sequence[Location], fields: Sequence[str], timeout_s: float, *, copy: bool = True
) -> Operation[dict[str, list[GatheredColumn]]]:
    """Read fields of B rows, in the order of the locations; every one of `fields` must be in one of them.

    Values are copied into pooled buffers. With `copy=False`, columns whose rows lie in one piece on this host are
    private copy-on-write views; their blocks stay pinned until the last of these views is garbage-collected. Raises
    `StaleSampleError` if blocks or rows are not stored any more.
    """
    pins: list[tuple[UnitHandle, Pinned]] = []
    views: list[Hold] = []
    try:
        units = yield from _units(transfer, locations, timeout_s)
        local = yield from _pin_local(transfer, [unit for unit in units if unit.local], locations, pins, timeout_s)
        remote = [unit for unit in units if not unit.local]
        fetches = [[_fetching(transfer, unit, location, fields) for unit in remote] for location in locations]
        yield from _fetch_all([one for some in fetches for one in some], timeout_s)
        picks: dict[str, list[Pick]] = {}
        for location, fetched in zip(locations, fetches, strict=True):
            rows = _row_set(location, local, fetched)
            picks.update((name, pick(name, rows)) for name in location.fields if name in fields)
        parts = [part for name in fields for part in picks[name]]
        if not copy and pins:
            views.append(transfer.releaser.hold(_unpinning(pins)))
        work = Compute(lambda: _filled(transfer, parts, views), sum(part.size_bytes for part in parts))
        columns: list[GatheredColumn] = yield work
        found = iter(columns)
        return {name: [next(found) for _ in picks[name]] for name in fields}
    finally:
        if not views:
            for unit, pinned in pins:
                yield Notify(unit.peer, Unpin(pin=pinned.pin))


def _unpinning(pins: Sequence[tuple[UnitHandle, Pinned]]) -> Callable[[], None]:
    def unpin() -> None:
        for unit, pinned in pins:
            unit.peer.notify(Unpin(pin=pinned.pin))

    return unpin


def _units(transfer: Transfer, locations: Sequence[Location], timeout_s: float) -> Operation[list[UnitHandle]]:
    """Return the units where the rows lie."""
    numbers = np.unique(np.concatenate([location.blocks for location in locations]) >> UNIT_SHIFT).tolist()
    if any(transfer.units.get(number) is None for number in numbers):
        yield from _refresh(transfer, timeout_s)
    units = {number: transfer.units.get(number) for number in numbers}
    unknown = [number for number, unit in units.items() if unit is None]
    if unknown:
        raise ConnectionLost(
            f"storage units {unknown}, which store some of these rows, are not known to the controller"
        )
    return [unit for unit in units.values() if unit is not None]


def _pin_local(
    transfer: Transfer,
    units: Sequence[UnitHandle],
    locations: Sequence[Location],
    pins: list[tuple[UnitHandle, Pinned]],
    timeout_s: float,
) -> Operation[dict[int, Block]]:
    """Pin all blocks at these units and open them. One unit after the other: if one fails, `pins` has those before."""
    opened: dict[int, Block] = {}
    for unit in units:
        blocks = _blocks_at(locations, unit.info.number)
        pinned: Pinned = yield Call(unit.peer, Pin(blocks=blocks, holder=process_id()), timeout_s)
        pins.append((unit, pinned))
        _refuse_cleared(locations, pinned)
        opened.update(_mapped(transfer, blocks, pinned))
    return opened


def _blocks_at(locations: Sequence[Location], number: int) -> Int64s:
    blocks = np.unique(np.concatenate([location.blocks for location in locations]))
    chosen: Int64s = blocks[blocks >> UNIT_SHIFT == number]
    return chosen


def _refuse_cleared(locations: Sequence[Location], pinned: Pinned) -> None:
    for block in np.unique(pinned.freed_blocks).tolist():
        gone = pinned.freed_slots[pinned.freed_blocks == block]
        for location in locations:
            hit = np.flatnonzero((location.blocks == block) & np.isin(location.slots, gone))
            if hit.size:
                raise StaleSampleError(
                    f"{hit.size} rows are not stored any more: their samples were cleared",
                    rows=hit.tolist(),
                    blocks=[block],
                )


def _mapped(transfer: Transfer, blocks: Int64s, pinned: Pinned) -> dict[int, Block]:
    memories = [transfer.maps.view(path) for path in pinned.arenas]
    places = zip(blocks.tolist(), pinned.arena_of.tolist(), pinned.offsets.tolist(), strict=True)
    return {block: transfer.directories.open_block(memories[arena], offset, block) for block, arena, offset in places}


def _fetching(transfer: Transfer, unit: UnitHandle, location: Location, fields: Sequence[str]) -> Fetching:
    rows = np.flatnonzero(location.blocks >> UNIT_SHIFT == unit.info.number)
    rows = rows[np.lexsort((location.slots[rows], location.blocks[rows]))]  # rows that share a value come together
    names = tuple(name for name in location.fields if name in fields)
    return Fetching(unit.peer, names, rows, location.blocks[rows], location.slots[rows], transfer.directories)


def _fetch_all(fetches: Sequence[Fetching], timeout_s: float) -> Operation[None]:
    """Ask all units at once, again and again, until all rows are here."""
    while True:
        asked = [(fetching, request) for fetching in fetches if (request := fetching.request) is not None]
        if not asked:
            return
        replies = yield [Call(fetching.peer, request, timeout_s) for fetching, request in asked]
        for (fetching, _), reply in zip(asked, replies, strict=True):
            fetching.take(reply)


def _row_set(location: Location, local: dict[int, Block], fetches: Sequence[Fetching]) -> RowSet:
    """Say for each row of a location in which readable block it lies by now."""
    ids, which = np.unique(location.blocks, return_inverse=True)
    here = [local.get(block_id) for block_id in ids.tolist()]
    blocks = [block for block in here if block is not None]
    number = np.cumsum([block is not None for block in here]) - 1
    which, slots = number[which], location.slots.copy()
    for fetching in fetches:
        if fetching.blocks:
            which[fetching.rows] = np.concatenate(fetching.which) + len(blocks)
            slots[fetching.rows] = np.concatenate(fetching.slots)
            blocks += fetching.blocks
    return RowSet(blocks, which, slots)


def _filled(transfer: Transfer, parts: Sequence[Pick], views: Sequence[Hold]) -> list[GatheredColumn]:
    """Give every part its values: views where they were asked for and can be had, else copies."""
    values: list[Bytes | None] = private_views(transfer.maps, parts, views[0]) if views else [None] * len(parts)
    missing = [number for number, found in enumerate(values) if found is None]
    for number, copy in zip(missing, copied(transfer.pool, [parts[number] for number in missing]), strict=True):
        values[number] = copy
    return [gathered(part, found) for part, found in zip(parts, values, strict=True) if found is not None]
