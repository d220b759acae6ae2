"""What clients and units ask the controller, and what it tells units."""

from __future__ import annotations

from typing import Any

from transfer_queue.messages.base import Frames, Int64s, message
from transfer_queue.messages.values import ColumnSpec


@message(10)
class Put:
    """Insert rows or add fields to rows, and make everything the put names visible at once. Reply: `PutDone`.

    Rows: `indexes`/`generations` name existing ones; else `keys` name existing or new ones; else
    `num_rows` new ones are inserted. Addressed by `partition_id` or `global_step`, unless
    `indexes` say it already. `block_id` 0: no data (tags, keys or allocation only). `size_bytes` is that of the block,
    for the limits; `admission` is what `Admit` granted. `lease_token`: written under a lease, refused once it ended.
    `versions`: of the policy that generated the rows, -1 for none; a row gets one once. `is_last`: the partition takes
    no new rows from now on. `tell`: the reply has tags and fields.
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
    size_bytes: int = 0
    lease_token: int | None = None
    admission: int | None = None
    versions: Int64s | None = None  # [n]
    is_last: bool = False
    tell: bool = False


@message(11)
class Draw:
    """Take `batch_size` ready rows for a task, or wait for them. Reply: `Drawn`.

    With `lease_s` they are consumed by `Ack` and come back at the end of the lease; else they are consumed at once.
    """

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
    """Remove rows: the named ones, or a whole partition. Reply: `Done` with the number of rows removed.

    Of `keys` of a partition, those that are not there are left out.
    """

    partition_id: str | None
    global_step: int | None
    indexes: Int64s | None
    generations: Int64s | None
    keys: tuple[str, ...] | None = None


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


@message(25)
class Ack:
    """The rows of a lease, or some of them, are done with: the task consumed them. Reply: `Done`."""

    lease_token: int
    indexes: Int64s  # [n]
    generations: Int64s  # [n]


@message(54)
class AckMany:
    """So many `Ack`s, each carried out or refused by itself. Reply: `Acked`."""

    lease_tokens: Int64s  # [k]
    sizes: Int64s  # [k] rows of each, n in all
    indexes: Int64s  # [n]
    generations: Int64s  # [n]


@message(26)
class Release:
    """Give rows of a lease back, to be drawn again. Reply: `Done`."""

    lease_token: int
    indexes: Int64s  # [n]
    generations: Int64s  # [n]


@message(27)
class Renew:
    """The lease ends `lease_s` from now (None: as long from now as it was granted for). Reply: `Leased`."""

    lease_token: int
    lease_s: float | None


@message(28)
class Drop:
    """Take rows out for good, accounted under `reason`; their groups settle without them. Reply: `Done`."""

    indexes: Int64s  # [n]
    generations: Int64s  # [n]
    reason: str


@message(29)
class Admit:
    """Ask for room before a large put of new rows is written, where there are limits. Reply: `Admitted`.

    Waits as the put would, and raises as it. What is admitted counts until a `Put` comes with it, or it is withdrawn.
    """

    partition_id: str | None
    global_step: int | None
    num_rows: int
    size_bytes: int
    timeout_s: float
    keys: tuple[str, ...] | None = None


@message(35)
class Withdraw:
    """One-way: the put that was admitted will not come."""

    admission: int


@message(36)
class Cut:
    """The state as of now, for a checkpoint. Reply: `CutDone`.

    Until `EndCut`, the end of the client or `hold_s` seconds, no bytes of blocks in the cut are reused.
    """

    hold_s: float


@message(37)
class EndCut:
    """One-way: the blocks of the cut were copied."""

    hold: int


@message(38)
class Restore:
    """Take the state of a checkpoint in place of all that is there. Reply: `Done` with the number of samples.

    Its blocks were written anew: block `old[i]` of the state is block `new[i]` now.
    """

    old: Int64s  # [n]
    new: Int64s  # [n]
    state: Frames


@message(39)
class SetVersion:
    """The policy has this version now. Reply: `Done` with the number of rows dropped because they are too old."""

    version: int


@message(51)
class KeepCut:
    """The cut is held for `hold_s` from now. Reply: `Done`, so it was until now; `LeaseExpired` if it was not."""

    hold: int
    hold_s: float


@message(50)
class GetAdmission:
    """How much more may be put by who asks? Reply: `Report` (see `client.admission`)."""

    partition_id: str | None


# ---------------------------------------------------------------- unit → controller


@message(30)
class Announce:
    """A unit is there (again). Reply: `Announced`; frees that it missed are sent again.

    `life` names its index: a unit that comes back with another one has nothing of what it stored, and gets another
    number.
    """

    unit_id: str
    address: str
    local_address: str
    folder: str
    nonce: str
    capacity_bytes: int
    curve_key: str = ""
    life: str = ""


@message(31)
class FreesDone:
    """One-way: every `FreeBlocks` up to `sequence` is done."""

    unit_id: str
    sequence: int


@message(32)
class Settle:
    """Blocks whose writer is gone: which were committed? The others never will be. Reply: `Settled`."""

    blocks: Int64s


@message(34)
class Reconcile:
    """A unit came back with these blocks and no others. Reply: `Reconciled`; rows of blocks it lost are not ready.

    `carvable` are the ids that writers who live give their next blocks, one for each span that they have: such a block,
    and those behind it, may be there by now. `lost` and `lost_spans` (the first block of each) are what writers may yet
    name, but the unit does not have any more: such puts are refused.
    """

    unit: int  # its number
    blocks: Int64s  # [n]
    carvable: Int64s | None = None
    lost: Int64s | None = None
    lost_spans: Int64s | None = None


# ---------------------------------------------------------------- controller → unit


@message(33)
class FreeBlocks:
    """One-way: nothing points to these any more. Sent again, with the same number, until `FreesDone`."""

    sequence: int
    blocks: Int64s  # whole blocks
    partial_blocks: Int64s  # [k] blocks of which single slots are free …
    partial_slots: Int64s  # [k] … and the slots
