"""Checkpoints: the whole queue as it was at one moment, in a folder, and back.

The controller gives the state of one moment and lets nothing be reused until its blocks are copied; traffic goes on
meanwhile. Loading writes the blocks anew, wherever there are units now, and then changes the state in one step.
"""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from transfer_queue.client.arguments import timeout_seconds
from transfer_queue.client.checkpoint_files import CheckpointWriter, check_json, open_checkpoint, replaced
from transfer_queue.client.core import ClientCore
from transfer_queue.client.outcomes import concluded
from transfer_queue.client.steps import Call, Compute, Notify, Operation
from transfer_queue.client.storing import store
from transfer_queue.client.transfer import units_of
from transfer_queue.client.units import UnitHandle
from transfer_queue.client.writing import settle
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, InvalidArgument, TransferQueueError
from transfer_queue.messages import (
    PROTOCOL_VERSION,
    UNIT_SHIFT,
    AbortBlocks,
    BlockBytes,
    Cut,
    CutDone,
    Done,
    EndCut,
    Int64s,
    KeepCut,
    Pin,
    Pinned,
    ReadBlock,
    Restore,
    Unpin,
)
from transfer_queue.storage.block import Bytes, stored_plan
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.peer import AnyPeer

DEFAULT_TIMEOUT_S = 600.0

_HOLD_S = 60.0  # at least, between two renewals
_FRAME_BYTES = 8 << 20


def save_checkpoint(
    core: ClientCore,
    checkpoint_dir: str | Path,
    *,
    metadata: dict[str, Any] | None = None,
    timeout: float | None = None,
) -> Operation[None]:
    """Write the whole queue, as it is at one moment, into a folder of the machine that calls.

    Partitions, samples, keys, tags, groups, consumption, data-parallel draws in progress, sampler state and counters
    belong to the same moment; a put that is under way is wholly in it or out. Draws and puts go on meanwhile, but what
    is cleared is reused only afterwards. A checkpoint that is there already stays until the new one is complete.
    `metadata` is the caller's, and must be what JSON can hold. `timeout` (600 s by default) is for each answer of the
    queue, and for writing one block; a save that goes on takes as long as it needs.

    Raises, with an older checkpoint as it was: `CapacityExceeded` if the disk is full; `LeaseExpired` if the controller
    was started again meanwhile, or took this client for dead: save again.
    """
    timeout_s = DEFAULT_TIMEOUT_S if timeout is None else timeout_seconds(timeout)
    path = Path(checkpoint_dir)
    described = {"user_metadata": check_json(metadata), "protocol": PROTOCOL_VERSION, "saved_at": time.time()}
    hold_s = max(timeout_s, _HOLD_S)
    cut: CutDone = yield Call(core.controller, Cut(hold_s=hold_s), timeout_s)
    held = _Held(core, cut.hold, hold_s, timeout_s)
    try:
        with replaced(path) as folder:
            writer = CheckpointWriter(folder)
            try:
                yield from _save_blocks(core, cut.blocks, writer, held)
                yield from held.renew()  # what was copied is what was cut
                described |= {"samples": cut.samples, "blocks": len(cut.blocks)}
                size_bytes = sum(len(frame) for frame in cut.state)
                yield Compute(lambda: writer.finish(cut.state, described), size_bytes)
            finally:
                writer.close()
    finally:
        yield Notify(core.controller, EndCut(hold=cut.hold))


def load_checkpoint(core: ClientCore, checkpoint_dir: str | Path, *, timeout: float | None = None) -> Operation[int]:
    """Replace all that is in the queue by a checkpoint, and return how many samples that are.

    The queue may have another number of storage units. Every file is read and checked first, then the data is stored,
    then the state changes in one step; if anything fails, the queue is as it was. Clients stay connected and draws that
    wait are looked at again; metas from before are stale, and leases that were open when the checkpoint was saved are
    over: their samples are ready again. Limits are those of this queue. `timeout` is 600 s by default.

    Raises `FileNotFoundError` if there is no checkpoint, `DecodeError` if it is damaged, saying where,
    `CapacityExceeded` if there is no room for it beside what is there, `InvalidArgument` if the queue has other steps.
    """
    timeout_s = DEFAULT_TIMEOUT_S if timeout is None else timeout_seconds(timeout)
    found = open_checkpoint(Path(checkpoint_dir))
    yield Compute(found.check, int(found.sizes.sum()))
    stored: list[tuple[AnyPeer, int]] = []
    try:
        for number in range(len(found.blocks)):
            plan = stored_plan(found.image(number))
            stored.append((yield from store(core.transfer, plan, timeout_s)))
        state = memoryview(found.state())
        frames = tuple(state[at : at + _FRAME_BYTES] for at in range(0, len(state), _FRAME_BYTES))
    except BaseException:
        yield from _abort(stored)
        raise
    new = np.array([block for _, block in stored], np.int64)
    request = Restore(old=found.blocks, new=new, state=frames)
    return (yield from concluded(core.outcomes, lambda again: _restore(core, request, stored, timeout_s, again)))


# ---------------------------------------------------------------- inside


def _restore(
    core: ClientCore, request: Restore, stored: list[tuple[AnyPeer, int]], timeout_s: float, again: int | None
) -> Operation[int]:
    try:
        done: Done = yield Call(core.controller, request, timeout_s, again)
    except (ConnectionLost, DeadlineExceeded):
        raise  # it may have been done: the blocks stay until that is settled
    except TransferQueueError:
        yield from _abort(stored)
        raise
    except BaseException:  # interrupted: it may have been done
        for peer, block in stored:
            yield from settle(core, peer, np.array([block], np.int64))
        raise
    for peer, block in stored:
        peer.unput.discard(block)
    return done.count


def _abort(stored: list[tuple[AnyPeer, int]]) -> Operation[None]:
    for peer, block in stored:
        yield Notify(peer, AbortBlocks(blocks=np.array([block], np.int64)))


class _Held:
    """The cut that is being copied: as long as it is held, none of its bytes are overwritten."""

    def __init__(self, core: ClientCore, hold: int, hold_s: float, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._core = core
        self._hold = hold
        self._hold_s = hold_s
        self._renewed_at = time.monotonic()

    def renew(self) -> Operation[None]:
        """Hold it for longer. Raises `LeaseExpired` if it was not held all the time."""
        yield Call(self._core.controller, KeepCut(hold=self._hold, hold_s=self._hold_s), self.timeout_s)
        self._renewed_at = time.monotonic()

    def go_on(self) -> Operation[None]:
        """The same, if it is time for it."""
        if time.monotonic() - self._renewed_at >= self._hold_s / 3:
            yield from self.renew()


def _save_blocks(core: ClientCore, blocks: Int64s, writer: CheckpointWriter, held: _Held) -> Operation[None]:
    for unit in (yield from units_of(core.transfer, blocks, held.timeout_s)):
        own = blocks[blocks >> UNIT_SHIFT == unit.info.number]
        if unit.local:
            yield from _save_local(core, unit, own, writer, held)
        else:
            for block in own.tolist():
                yield from _save_remote(unit, block, writer, held)


def _save_local(
    core: ClientCore, unit: UnitHandle, blocks: Int64s, writer: CheckpointWriter, held: _Held
) -> Operation[None]:
    """The blocks of this host are copied straight out of shared memory."""
    pinned: Pinned = yield Call(unit.peer, Pin(blocks=blocks, holder=process_id()), held.timeout_s)
    try:
        memories = [core.transfer.maps.view(path) for path in pinned.arenas]
        places = zip(pinned.arena_of.tolist(), pinned.offsets.tolist(), pinned.sizes.tolist(), strict=True)
        images = [memories[arena][start : start + size] for arena, start, size in places]
        for block, image in zip(blocks.tolist(), images, strict=True):
            yield from held.go_on()
            yield Compute(partial(writer.add, block, [image]), image.nbytes)
    finally:
        yield Notify(unit.peer, Unpin(pin=pinned.pin))


def _save_remote(unit: UnitHandle, block: int, writer: CheckpointWriter, held: _Held) -> Operation[None]:
    pieces: list[Bytes] = []
    at, size = 0, 1
    while at < size:
        request = ReadBlock(block=block, offset=at, max_bytes=_FRAME_BYTES)
        yield from held.go_on()
        reply: BlockBytes = yield Call(unit.peer, request, held.timeout_s)
        got = [np.frombuffer(frame, np.uint8) for frame in reply.frames]
        size, read = reply.size_bytes, sum(piece.nbytes for piece in got)
        if read == 0:
            raise InvalidArgument(f"storage unit {unit.info.unit_id!r} gave {at} of {size} bytes of block {block}")
        pieces += got
        at += read
    yield Compute(partial(writer.add, block, pieces), size)
