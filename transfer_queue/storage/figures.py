"""What the bytes of a unit are used for."""

from __future__ import annotations

from pathlib import Path
from resource import getpagesize

from transfer_queue.errors import CapacityExceeded
from transfer_queue.messages import Reserve
from transfer_queue.storage.block import aligned
from transfer_queue.storage.space import UnitSpace

_STATM = Path("/proc/self/statm")


def figures(space: UnitSpace) -> dict[str, int]:
    """Bytes by what holds them; live + pinned + reserved + overhead + free are all bytes of the arenas.

    pinned: cleared, but some reader still looks at it · overhead: rows cleared in runs too short to reuse ·
    reserved: lent to writers and not carved yet · on disk: of all arenas, those that are files there.
    """
    live = pinned = overhead = 0
    for block in space.blocks():
        kept = block.size_bytes - block.returned.total
        cleared = kept if block.freed else block.cleared_bytes - block.returned.total
        live += kept - cleared
        if block.pins:
            pinned += cleared
        else:
            overhead += cleared
    return {
        "bytes_live": live,
        "bytes_pinned": pinned,
        "bytes_reserved": sum(span.unused_bytes for span in space.spans.values()),
        "bytes_overhead": overhead,
        "bytes_free": space.arenas.free_bytes,
        "bytes_arenas": space.arenas.total_bytes,
        "bytes_on_disk": space.arenas.bytes_on_disk,
        "bytes_capacity": space.arenas.capacity_bytes,
        "bytes_disk_capacity": 0 if space.arenas.spill is None else space.arenas.spill.capacity_bytes,
        "arenas": len(space.arenas.members),
        "blocks": sum(len(span.blocks) for span in space.spans.values()),
        "spans": sum(span.open for span in space.spans.values()),
        "pins": len(space.pins),
    }


def rss_bytes() -> int:
    """Resident memory of this process, the shared memory that it touched included."""
    return int(_STATM.read_text().split()[1]) * getpagesize()


def no_space(space: UnitSpace, request: Reserve, full: CapacityExceeded | None) -> CapacityExceeded:
    """Return the error that a span cannot be lent; `full`: why the unit could not grow."""
    stats = figures(space)
    needed, free, spill = aligned(request.size_bytes), stats["bytes_free"], space.arenas.spill
    limit = stats["bytes_capacity"] + stats["bytes_disk_capacity"]
    if not space.arenas.could_hold(needed):
        text = f"a block of {needed} bytes exceeds the capacity of the storage unit, {limit} bytes: put fewer rows"
    else:
        text = (
            f"no capacity for a block of {needed} bytes within {request.timeout_s} s: of {limit} bytes {free} are "
            f"free (not in one piece), {stats['bytes_live']} live, {stats['bytes_pinned']} pinned; clear samples "
            "or raise capacity_bytes"
        )
    if spill is not None:
        text += f", of the storage or of ssd_offload: {spill.capacity_bytes} of them are for files in {spill.folder}, "
        text += f"where {spill.free_bytes} bytes of disk are left"
    if full is not None:
        text += f". The unit could not grow: {full.message}"
    return CapacityExceeded(text, needed_bytes=needed, free_bytes=free, limit_bytes=limit)
