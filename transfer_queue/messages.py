"""The whole protocol on one page: one frozen type per message.

Three parties speak. A *client* asks the controller (`ControllerRequest`) and the storage units
(`UnitRequest`); a *unit* announces itself to the controller and settles blocks with it; the
*controller* pushes `FreeBlocks` to units. Every request gets exactly one answer, its reply type or
an `ErrorReply`; types marked "one-way" get none.

Shapes: n rows of a request, B rows of a draw. Arrays are int64 and travel as raw buffers. Fields of
type `Frames` travel out of band, as further frames of the message.

A row is named by (global index, generation). Generation `ANY_GENERATION` means "whichever lives now";
only handles written by hand carry it.

A block id is `unit number << 48 | span number << 16 | position in the span`; 0 means "no block".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import dataclass_transform

Int64s: TypeAlias = NDArray[np.int64]
Frames: TypeAlias = tuple[Any, ...]  # buffers: bytes or memoryview

PROTOCOL_VERSION = 1
ANY_GENERATION = -1
UNIT_SHIFT = 48
SPAN_SHIFT = 16

MESSAGE_TYPES: dict[int, type[Any]] = {}
_T = TypeVar("_T")


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False)
def message(code: int) -> Callable[[type[_T]], type[_T]]:
    """Declare a message type; `code` names it on the wire and is never given to another one."""

    def declare(cls: type[_T]) -> type[_T]:
        made = dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)(cls)
        assert code not in MESSAGE_TYPES, f"message code {code} is taken by {MESSAGE_TYPES[code].__name__}"
        MESSAGE_TYPES[code] = made
        return made

    return declare


# ---------------------------------------------------------------- values inside messages


@message(1)
class ColumnSpec:
    """How one field of one put is stored.

    layout   "dense"   values [n, *shape]
             "ragged"  values [sum of lengths, *shape], offsets [n + 1] in steps of the first dimension
             "shaped"  rows of one rank and any shape: values flat, offsets in elements, shapes [n, rank]
             "text" · "bytes" · "object"   one encoded value per row, offsets in bytes
             "int" · "float" · "bool"      Python numbers, 8 bytes (bool: 1) per row, no offsets
    dtype    torch name without "torch.", e.g. "bfloat16"; None for the layouts that hold Python values
    shape    dense: shape of a row; ragged: shape of a row without its first dimension; else None
    """

    name: str
    layout: str
    dtype: str | None
    shape: tuple[int, ...] | None


@message(2)
class Location:
    """Where the named fields of B rows lie: row i is slot `slots[i]` of block `blocks[i]`."""

    fields: tuple[str, ...]
    blocks: Int64s  # [B]
    slots: Int64s  # [B]


@message(3)
class UnitInfo:
    """What a client needs to reach a storage unit."""

    number: int
    unit_id: str
    address: str  # tcp://host:port
    local_address: str  # ipc://path, for clients that can read `folder`/nonce
    folder: str
    nonce: str


@message(4)
class ProcessId:
    """One life of a process: ids are reused, (host nonce, pid, start time) is not."""

    host: str
    pid: int
    start_time: float


# ---------------------------------------------------------------- client → controller


@message(10)
class Put:
    """Insert rows or add fields to rows, and make everything the put names visible at once. Reply: `PutDone`.

    Rows: `indexes`/`generations` name existing ones; else `keys` name existing or new ones; else
    `num_rows` new ones are inserted. Addressed by `partition_id` or `global_step`, unless
    `indexes` say it already. `block_id` 0: no data (tags, keys or allocation only).
    """

    partition_id: str | None
    global_step: int | None
    num_rows: int
    indexes: Int64s | None  # [n]
    generations: Int64s | None  # [n]
    keys: tuple[str, ...] | None
    tags: tuple[dict[str, Any] | None, ...] | None
    group_ids: tuple[int | str, ...] | None
    group_size: int | None
    block_id: int
    columns: tuple[ColumnSpec, ...]
    timeout_s: float
    lease_token: int | None = None


@message(11)
class Draw:
    """Take `batch_size` ready rows for a task, or wait for them. Reply: `Drawn`."""

    partition_id: str | None
    global_step: int | None
    task_name: str
    fields: tuple[str, ...]
    batch_size: int
    get_n_samples: bool
    sampler_params: dict[str, Any]
    timeout_s: float
    lease_s: float | None = None


@message(12)
class Locate:
    """Where are these fields of these rows? Reply: `Drawn`, in the given order; raises if a field is not produced.

    Rows by `indexes`/`generations`, by `keys` of a partition, or (both None) all rows of the partition.
    `fields` None: those that all the rows have.
    """

    partition_id: str | None
    global_step: int | None
    indexes: Int64s | None
    generations: Int64s | None
    keys: tuple[str, ...] | None
    fields: tuple[str, ...] | None
    allow_missing: bool = False


@message(13)
class SetTags:
    """Merge tags into rows. Reply: `Done`."""

    indexes: Int64s
    generations: Int64s
    tags: tuple[dict[str, Any] | None, ...]


@message(14)
class Clear:
    """Remove rows: the named ones, or a whole partition. Reply: `Done` with the number of rows removed."""

    partition_id: str | None
    global_step: int | None
    indexes: Int64s | None
    generations: Int64s | None


@message(15)
class ResetConsumption:
    """Give back everything a task (None: every task) consumed or reserved in a partition. Reply: `Done`."""

    partition_id: str | None
    global_step: int | None
    task_name: str | None


@message(16)
class SealGroup:
    """The group will not grow any more: it is complete with the rows it has. Reply: `Done`."""

    partition_id: str
    group_id: int | str


@message(17)
class AbortGroup:
    """Drop all rows of the group, accounted under `reason`. Reply: `Done`."""

    partition_id: str
    group_id: int | str
    reason: str


@message(18)
class GetStatus:
    """Reply: `Status` of all rows of a partition, in allocation order. `fields` None: all known fields."""

    partition_id: str | None
    global_step: int | None
    task_name: str | None
    fields: tuple[str, ...] | None


@message(19)
class GetAudit:
    """Reply: `Report`, the accounting of one partition or (None) of all."""

    partition_id: str | None


@message(20)
class GetExplanation:
    """Reply: `Report` with the entry "text": why such a draw is not served now."""

    partition_id: str | None
    global_step: int | None
    task_name: str
    fields: tuple[str, ...]
    batch_size: int


@message(21)
class RegisterSampler:
    """Give a task (None: every task without its own) a sampler by registered name. Reply: `Done`."""

    task_name: str | None
    sampler: str
    arguments: dict[str, Any]


@message(22)
class ListPartitions:
    """Reply: `Names`, in creation order."""


@message(23)
class ListUnits:
    """Reply: `Units`. With `timeout_s` > 0 it waits until at least one unit is there."""

    timeout_s: float


@message(24)
class Cancel:
    """One-way: nobody waits for request `request_id` of this channel any more; if it was a draw, it is undone."""

    request_id: int


# ---------------------------------------------------------------- unit → controller


@message(30)
class Announce:
    """A unit is there (again). Reply: `Announced`; frees that it missed are sent again."""

    unit_id: str
    address: str
    local_address: str
    folder: str
    nonce: str
    capacity_bytes: int


@message(31)
class FreesDone:
    """One-way: every `FreeBlocks` up to `sequence` is done."""

    unit_id: str
    sequence: int


@message(32)
class Settle:
    """Blocks whose writer is gone: which were committed? The others never will be. Reply: `Settled`."""

    blocks: Int64s


# ---------------------------------------------------------------- controller → unit


@message(33)
class FreeBlocks:
    """One-way: nothing points to these any more. Sent again, with the same number, until `FreesDone`."""

    sequence: int
    blocks: Int64s  # whole blocks
    partial_blocks: Int64s  # [k] blocks of which single slots are free …
    partial_slots: Int64s  # [k] … and the slots


# ---------------------------------------------------------------- client → unit


@message(40)
class Reserve:
    """Lend a span of at least `size_bytes` to write blocks into. Reply: `Reserved`. Waits for space, then raises."""

    size_bytes: int
    holder: ProcessId
    timeout_s: float


@message(41)
class ReturnSpan:
    """One-way: the holder carves no more blocks from this span; what lies behind its last block is free."""

    span: int


@message(42)
class AbortBlocks:
    """One-way: these blocks were written but never committed, and will not be."""

    blocks: Int64s


@message(43)
class Write:
    """Copy the frames, one behind the other, to `offset` of a span (the remote form of a memcpy). Reply: `Done`."""

    span: int
    offset: int
    frames: Frames


@message(44)
class Pin:
    """Keep the bytes of these blocks while the holder lives and until `Unpin`. Reply: `Pinned`."""

    blocks: Int64s
    holder: ProcessId


@message(45)
class Unpin:
    """One-way: the end of a pin."""

    pin: int


@message(46)
class Fetch:
    """Read rows of fields. Reply: `Fetched` with as many leading rows as fit in `max_bytes`, at least one."""

    blocks: Int64s  # [n]
    slots: Int64s  # [n]
    fields: tuple[str, ...]
    max_bytes: int


@message(47)
class GetUnitStats:
    """Reply: `Report`: bytes live, pinned, free, reserved; blocks; spans; arenas."""


# ---------------------------------------------------------------- replies


@message(60)
class Done:
    count: int = 0


@message(61)
class ErrorReply:
    """The request failed; `name`, `message`, `details` as `errors.to_wire` gives them."""

    name: str
    message: str
    details: dict[str, Any]


@message(62)
class PutDone:
    partition_id: str
    indexes: Int64s  # [n]
    generations: Int64s  # [n]


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
    lease_deadline_s: float | None = None


@message(64)
class Status:
    """Status per row, in allocation order. `consumption` is None where no task was asked for."""

    partition_id: str
    exists: bool
    indexes: Int64s  # [N]
    fields: tuple[str, ...]
    production: Int64s  # [N * F] 0/1, row after row
    consumption: Int64s | None  # [N] 0/1


@message(65)
class Report:
    entries: dict[str, Any]


@message(66)
class Names:
    names: tuple[str, ...]


@message(67)
class Units:
    units: tuple[UnitInfo, ...]


@message(68)
class Announced:
    number: int


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
    """The `rows` leading rows of the request, packed into one block image (see `storage.block`) per distinct block.

    Images come in the order in which the blocks first appear; image i is the next `frames_of[i]` of `frames`.
    """

    rows: int
    frames_of: Int64s
    frames: Frames


ControllerRequest: TypeAlias = (
    Put
    | Draw
    | Locate
    | SetTags
    | Clear
    | ResetConsumption
    | SealGroup
    | AbortGroup
    | GetStatus
    | GetAudit
    | GetExplanation
    | RegisterSampler
    | ListPartitions
    | ListUnits
    | Cancel
    | Announce
    | FreesDone
    | Settle
)
UnitRequest: TypeAlias = Reserve | ReturnSpan | AbortBlocks | Write | Pin | Unpin | Fetch | GetUnitStats
Request: TypeAlias = ControllerRequest | UnitRequest
Reply: TypeAlias = (
    Done
    | ErrorReply
    | PutDone
    | Drawn
    | Status
    | Report
    | Names
    | Units
    | Announced
    | Settled
    | Reserved
    | Pinned
    | Fetched
)
ONE_WAY: tuple[type[Any], ...] = (Cancel, FreesDone, FreeBlocks, ReturnSpan, AbortBlocks, Unpin)
