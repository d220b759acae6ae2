"""What clients ask a storage unit."""

from __future__ import annotations

from typing import Any

from transfer_queue.messages.base import Frames, Int64s, message
from transfer_queue.messages.values import ProcessId


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


@message(49)
class StillHeld:
    """One-way: what the client still has of what it was granted here. The first message on each of its connections.

    Spans and pins of its requests below `before` that are not among `requests` are given back; so are, if they are in
    no put, the blocks of its spans that this unit found when it was started and that are not among `blocks`. Made when
    the unit has let the connection in. It is true for ever: it may come late, again, or out of order.
    """

    before: int
    requests: Int64s  # under way, or granted what was not given back
    blocks: Int64s  # written, or being written, and neither put nor aborted


@message(46)
class Fetch:
    """Read rows of fields. Reply: `Fetched` with as many leading rows as fit in `max_bytes`, at least one.

    `verify`: the unit checks the checksums of these rows, and the images in the reply have checksums.
    """

    blocks: Int64s  # [n]
    slots: Int64s  # [n]
    fields: tuple[str, ...]
    max_bytes: int
    verify: bool = False


@message(48)
class ReadBlock:
    """Reply: `BlockBytes`, at most `max_bytes` from `offset` of the block."""

    block: int
    offset: int
    max_bytes: int


@message(47)
class GetUnitStats:
    """Reply: `Report`: bytes live, pinned, free, reserved; blocks; spans; arenas; resident memory."""


@message(56)
class Introduce:
    """To a unit that was started without one: this is your controller, with its token. Reply: `Done`, once it knows.

    Said again, nothing happens; another controller is refused.
    """

    controller: dict[str, Any]  # as `ZMQServerInfo.to_record`
