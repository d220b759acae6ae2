"""Rows that other hosts store: fetched in packed blocks, a bounded number of bytes at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from transfer_queue.errors import DecodeError
from transfer_queue.messages import Fetch, Fetched, Int64s
from transfer_queue.storage.block import Block, Bytes, Directories
from transfer_queue.storage.checksums import Suspect, verify
from transfer_queue.storage.packing import in_order_of_appearance, slots_in_images
from transfer_queue.wire.peer import AnyPeer

FETCH_BYTES = 16 << 20


@dataclass(eq=False)
class Fetching:
    """Some rows of one location at one unit, on their way. `rows`: their places in the request."""

    peer: AnyPeer
    fields: tuple[str, ...]
    rows: Int64s
    block_ids: Int64s
    wanted_slots: Int64s
    directories: Directories
    verify: bool = False
    blocks: list[Block] = field(default_factory=list)
    which: list[Int64s] = field(default_factory=list)
    slots: list[Int64s] = field(default_factory=list)
    done: int = 0

    @property
    def request(self) -> Fetch | None:
        """What to ask for next; None if all rows are here."""
        if self.done == len(self.rows):
            return None
        return Fetch(
            blocks=self.block_ids[self.done :],
            slots=self.wanted_slots[self.done :],
            fields=self.fields,
            max_bytes=FETCH_BYTES,
            verify=self.verify,
        )

    def take(self, reply: Fetched) -> None:
        """Take over the leading rows of the last request."""
        if not 0 < reply.rows <= len(self.rows) - self.done:
            raise DecodeError(f"a storage unit answered {reply.rows} of {len(self.rows) - self.done} rows")
        ids, which = in_order_of_appearance(self.block_ids[self.done : self.done + reply.rows])
        if len(reply.frames_of) == 1:
            ids, which = ids[:1], np.zeros_like(which)
        if len(ids) != len(reply.frames_of) or int(reply.frames_of.sum()) != len(reply.frames):
            raise DecodeError(f"a storage unit answered {len(reply.frames_of)} block images for {len(ids)} blocks")
        self.which.append(which + len(self.blocks))
        self.slots.append(slots_in_images(which))
        at = 0
        for block_id, count in zip(ids.tolist(), reply.frames_of.tolist(), strict=True):
            image = _joined(reply.frames[at : at + count])
            self.blocks.append(self.directories.open_block(image, 0, block_id))
            if self.verify:
                verify([Suspect(self.blocks[-1])])
            at += count
        self.done += reply.rows


def _joined(frames: Sequence[bytes | memoryview]) -> Bytes:
    """One contiguous image whose 8-byte values are aligned."""
    parts = [np.frombuffer(frame, np.uint8) for frame in frames]
    if len(parts) == 1 and parts[0].ctypes.data % 8 == 0:
        return parts[0]
    return np.concatenate([np.empty(0, np.uint8), *parts])
