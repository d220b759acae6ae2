"""Answers."""

from __future__ import annotations

from typing import Any

from transfer_queue.messages.base import Frames, Int64s, message
from transfer_queue.messages.values import ColumnSpec, Location, UnitInfo


@message(60)
class Done:
    count: int = 0


@message(79)
class Acked:
    """What became of each `Ack`: "", or why it was refused."""

    refused: tuple[str, ...]  # [k]


@message(61)
class ErrorReply:
    """The request failed; `name`, `message`, `details` as `errors.to_wire` gives them."""

    name: str
    message: str
    details: dict[str, Any]


@message(62)
class PutDone:
    """`tags` of the rows as they are now, and `fields` that all of them have, where the put asked for it."""

    partition_id: str
    indexes: Int64s  # [n]
    generations: Int64s  # [n]
    tags: tuple[dict[str, Any] | None, ...] | None = None
    fields: tuple[str, ...] | None = None


@message(63)
class Drawn:
    """Rows in the sampler's order. `columns` describe `fields`: shape None where the rows differ in it."""

    partition_id: str
    indexes: Int64s  # [B]
    generations: Int64s  # [B]
    fields: tuple[str, ...]
    columns: tuple[ColumnSpec, ...]
    locations: tuple[Location, ...]
    produced: Int64s | None  # [B] 0/1: all of `fields` are there; None = all 1
    keys: tuple[str | None, ...] | None
    tags: tuple[dict[str, Any] | None, ...] | None
    group_ids: tuple[int | str | None, ...] | None
    extra_info: dict[str, Any]
    lease_token: int | None = None
    lease_s: float | None = None  # how long the lease lasts from now


@message(64)
class Status:
    """Status per row, in allocation order. `consumption` is None where no task was asked for.

    `sealed`: no more rows come. `to_come`: so many rows that were expected when the partition began did not come yet.
    """

    partition_id: str
    exists: bool
    indexes: Int64s  # [N]
    fields: tuple[str, ...]
    production: Int64s  # [N * F] 0/1, row after row
    consumption: Int64s | None  # [N] 0/1
    sealed: bool = False
    to_come: int = 0


@message(65)
class Report:
    entries: dict[str, Any]


@message(66)
class Names:
    names: tuple[str, ...]


@message(67)
class Units:
    """`admit_from_bytes`: larger puts of new rows ask for room first (`Admit`); None: nobody does."""

    units: tuple[UnitInfo, ...]
    admit_from_bytes: int | None = None


@message(68)
class Announced:
    """`given_up`: the unit was away for so long that the controller does not count on its data any more."""

    number: int
    given_up: bool = False


@message(69)
class Settled:
    committed: Int64s  # [n] 0/1


@message(70)
class Reserved:
    """Span `span` is `size_bytes` at `offset` of the file `arena`; its k-th block has id `first_block + k`."""

    span: int
    first_block: int
    arena: str
    offset: int
    size_bytes: int


@message(71)
class Pinned:
    """Block i lies at `offsets[i]`, `sizes[i]` bytes, of the file `arenas[arena_of[i]]`.

    `freed_blocks`/`freed_slots` name the slots of these blocks whose rows were cleared: their bytes are not to be read.
    """

    pin: int
    arenas: tuple[str, ...]
    arena_of: Int64s  # [n]
    offsets: Int64s  # [n]
    sizes: Int64s  # [n]
    freed_blocks: Int64s  # [k]
    freed_slots: Int64s  # [k]


@message(72)
class Fetched:
    """The `rows` leading rows of the request, packed into block images (see `storage.block`).

    Either one image with all of them in order, or one per distinct block in the order in which those first appear;
    image i is the next `frames_of[i]` of `frames`.
    """

    rows: int
    frames_of: Int64s
    frames: Frames


@message(73)
class Leased:
    """The lease lasts so long from now."""

    lease_s: float


@message(74)
class Admitted:
    """Room for one put; `admission` goes with it."""

    admission: int


@message(75)
class Reconciled:
    """Which blocks of a returned unit are in use (1); of those, the slots whose rows were cleared meanwhile or before.

    Blocks that are not (0) may still be committed by a writer that lives, unless they are refused from now on (-1).
    `carved` are those in use that lie behind what the unit had found in the spans of such writers.
    """

    committed: Int64s  # [n] 0/1/-1
    carved: Int64s  # [m]
    cleared_blocks: Int64s  # [k]
    cleared_slots: Int64s  # [k]


@message(76)
class CutDone:
    """`state` is for `Restore` alone to read."""

    hold: int
    samples: int
    blocks: Int64s  # [n] that rows of the state lie in
    state: Frames


@message(77)
class BlockBytes:
    """A piece of a block as it is stored; `size_bytes` is the size of the whole block."""

    size_bytes: int
    frames: Frames
