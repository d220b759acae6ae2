"""Between this process and the storage units: what a client keeps for it, and reading.

On the same host the bytes are copied straight out of the arenas; elsewhere they travel in frames of at most 8 MiB.
`load`, like `storing.store`, is an operation: it says what to ask whom, a driver does it.

B rows of a request
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from transfer_queue.client.arenas import ArenaMaps, Hold, Releaser, private_views
from transfer_queue.client.buffers import DEFAULT_IDLE_BYTES, BufferPool
from transfer_queue.client.fetching import Fetching
from transfer_queue.client.results import copied
from transfer_queue.client.steps import Call, Calls, Compute, Notify, Operation
from transfer_queue.client.units import Connect, KnownUnits, UnitHandle
from transfer_queue.errors import StaleSampleError
from transfer_queue.messages import UNIT_SHIFT, Int64s, ListUnits, Location, Pin, Pinned, Units, Unpin
from transfer_queue.storage.block import Block, Bytes, Directories
from transfer_queue.storage.checksums import suspects_at
from transfer_queue.storage.checksums import verify as check
from transfer_queue.storage.gather import GatheredColumn, Pick, RowSet, gathered, pick
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.peer import AnyPeer

_REFRESH_S = 30.0


class Transfer:
    """What one client keeps between operations: units, mapped arenas, spans, warm buffers.

    connect     opens a connection to a unit; the flag tells whether the unit is on this host
    transport   "auto", or "tcp" to treat units of this host as remote
    checksums   whether the blocks of this client are to have checksums, which `load` can verify
    """

    def __init__(
        self,
        controller: AnyPeer,
        connect: Connect,
        *,
        transport: str = "auto",
        checksums: bool = False,
        max_idle_bytes: int = DEFAULT_IDLE_BYTES,
    ) -> None:
        self.controller = controller
        self.units = KnownUnits(connect, transport)
        self.checksums = checksums
        self.maps = ArenaMaps()
        self.pool = BufferPool(max_idle_bytes)
        self.directories = Directories()
        self.releaser = Releaser()
        self.refresh_at = 0.0
        self.admit_from_bytes: int | None = None

    @property
    def stale(self) -> bool:
        """What the controller said last may have changed: `refresh`."""
        return time.monotonic() >= self.refresh_at

    def __repr__(self) -> str:
        return f"<Transfer: {self.units!r}, {self.maps!r}, {self.pool!r}>"

    def close(self) -> None:
        """Return the spans, close the connections to units. Views and results stay valid. May be called twice."""
        self.releaser.close()
        self.units.close()
        self.maps.clear()
        self.pool.clear()


def refresh(transfer: Transfer, timeout_s: float) -> Operation[None]:
    """Ask the controller which units there are, and how it wants them used."""
    reply: Units = yield Call(transfer.controller, ListUnits(timeout_s=timeout_s), timeout_s)
    transfer.units.update(reply.units)
    transfer.admit_from_bytes = reply.admit_from_bytes
    transfer.refresh_at = time.monotonic() + _REFRESH_S


def load(
    transfer: Transfer,
    locations: Sequence[Location],
    fields: Sequence[str],
    timeout_s: float,
    *,
    copy: bool = True,
    verify: bool = False,
) -> Operation[dict[str, list[GatheredColumn]]]:
    """Read fields of B rows, in the order of the locations; every one of `fields` must be in one of them.

    Values are copied into pooled buffers. With `copy=False`, columns whose rows lie in one piece on this host are
    private copy-on-write views; their blocks stay pinned until the last of these views is garbage-collected. Raises
    `StaleSampleError` if blocks or rows are not stored any more. With `verify`, raises `DecodeError` with block and
    field if the bytes of any of these rows are not those that were written, or have no checksums.
    """
    pins: list[tuple[UnitHandle, Pinned]] = []
    views: list[Hold] = []
    try:
        blocks = np.concatenate([location.blocks for location in locations])
        units = yield from units_of(transfer, blocks, timeout_s)
        local = yield from _pin_local(transfer, [unit for unit in units if unit.local], locations, pins, timeout_s)
        remote = [unit for unit in units if not unit.local]
        fetches = [[_fetching(transfer, unit, location, fields, verify) for unit in remote] for location in locations]
        yield from _fetch_all([one for some in fetches for one in some], timeout_s)
        if verify:
            freed = [pinned for _, pinned in pins]
            suspects = [one for location in locations for one in suspects_at(location, fields, local, freed)]
            yield Compute(lambda: check(suspects), sum(suspect.block.head.size_bytes for suspect in suspects))
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


def units_of(transfer: Transfer, blocks: Int64s, timeout_s: float) -> Operation[list[UnitHandle]]:
    """Return the units where these blocks lie."""
    numbers = np.unique(blocks >> UNIT_SHIFT).tolist()
    if any(transfer.units.get(number) is None for number in numbers):
        yield from refresh(transfer, timeout_s)
    units = {number: transfer.units.get(number) for number in numbers}
    unknown = [number for number, unit in units.items() if unit is None]
    if unknown:
        raise StaleSampleError(
            f"storage units {unknown}, which had some of these rows, came back without them: their data is lost",
            blocks=[block for block in np.unique(blocks).tolist() if block >> UNIT_SHIFT in unknown],
        )
    return [unit for unit in units.values() if unit is not None]


def _pin_local(
    transfer: Transfer,
    units: Sequence[UnitHandle],
    locations: Sequence[Location],
    pins: list[tuple[UnitHandle, Pinned]],
    timeout_s: float,
) -> Operation[dict[int, Block]]:
    """Pin all blocks at these units, all units at once, and open them. If one fails, `pins` has what the others did."""
    blocks = [_blocks_at(locations, unit.info.number) for unit in units]
    asked = zip(units, blocks, strict=True)
    calls = [Call(unit.peer, Pin(blocks=ids, holder=process_id()), timeout_s) for unit, ids in asked]
    replies: list[Pinned] = yield Calls(calls, lambda number, pinned: pins.append((units[number], pinned)))
    opened: dict[int, Block] = {}
    for ids, pinned in zip(blocks, replies, strict=True):
        _refuse_cleared(locations, pinned)
        opened.update(_mapped(transfer, ids, pinned))
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


def _fetching(
    transfer: Transfer, unit: UnitHandle, location: Location, fields: Sequence[str], verify: bool
) -> Fetching:
    rows = np.flatnonzero(location.blocks >> UNIT_SHIFT == unit.info.number)
    rows = rows[np.lexsort((location.slots[rows], location.blocks[rows]))]  # rows that share a value come together
    names = tuple(name for name in location.fields if name in fields)
    ids, slots = location.blocks[rows], location.slots[rows]
    return Fetching(unit.peer, names, rows, ids, slots, transfer.directories, verify)


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
