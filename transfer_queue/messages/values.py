"""Values inside messages."""

from __future__ import annotations

from transfer_queue.messages.base import Int64s, message


@message(1)
class ColumnSpec:
    """How one field of one put is stored.

    layout   "dense"   values [n, *shape]
             "ragged"  values [sum of lengths, *shape], offsets [n + 1] in steps of the first dimension
             "shaped"  rows of one rank and any shape: values flat, offsets in elements, shapes [n, rank]
             "text" · "bytes" · "object"   one encoded value per row, offsets in bytes
             "int" · "float" · "bool"      Python numbers, 8 bytes (bool: 1) per row, no offsets
    dtype    torch name without "torch.", e.g. "bfloat16"; None for the layouts that hold Python values
    shape    dense: shape of a row; ragged: shape of a row without its first dimension; () of a Python value that was
             put as that of a whole batch of one row; else None
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
    local_address: str  # unix://path, for clients that can read `folder`/nonce
    folder: str
    nonce: str
    curve_key: str = ""  # public key, where TCP is encrypted


@message(4)
class ProcessId:
    """One life of a process: ids are reused, (host nonce, pid, start time) is not."""

    host: str
    pid: int
    start_time: float
