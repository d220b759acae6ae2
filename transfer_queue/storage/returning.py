"""A unit that came back, and the controller, agree on what is stored.

The steps of `reconcile`: (1) blocks of which nothing was given back are verified, if they have checksums; (2) the
controller hears which blocks there are and which are lost, and says which are in use and which of their rows were
cleared; (3) what was cleared is given back, the other blocks are verified as far as that allows, and what does not fit
is lost; (4) if anything was lost, the controller hears again. Nobody holds the lock of the unit while bytes are
verified or the controller is asked; a pin keeps the blocks meanwhile.

A block that the unit ever lent space for, and that nobody gave up, is in one of three states then: it is stored; its
writer lives and has its span, where it is found when it is written; or the controller refuses it. For a unit that has
its index knows every span that it lent, and one that has lost it gets another number, and the old one is refused.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from transfer_queue.errors import DecodeError
from transfer_queue.messages import SPAN_SHIFT, FreeBlocks, Int64s, Reconcile, Reconciled, int64s_of
from transfer_queue.storage.block import read_head
from transfer_queue.storage.checksums import Suspect, damaged
from transfer_queue.storage.facts import SPAN_MASK
from transfer_queue.storage.recovery import carvable_ids, misplaced, stored_ids
from transfer_queue.storage.space import UnitSpace
from transfer_queue.storage.spans import StoredBlock
from transfer_queue.wire.holders import process_id

log = logging.getLogger(__name__)

AskController: TypeAlias = Callable[[Reconcile], Reconciled]


class Returning:
    """One agreement, of the unit with this number.

    `save` writes down the facts of the space; it is called with `lock` held.
    """

    def __init__(self, space: UnitSpace, lock: threading.Lock, save: Callable[[], None], number: int) -> None:
        self.lost: dict[int, str] = {}
        self._number = number
        self._space = space
        self._lock = lock
        self._save = save

    def reconcile(self, ask: AskController) -> None:
        """Raises what `ask` raises; then it is to be tried again."""
        self._lose(self._verified(partial=False))
        question = self._question()
        found = ask(question)
        with self._lock:
            missing = self._apply(question.blocks, found)
        missing.update(self._verified(partial=True))
        self._lose(missing)
        if missing:
            ask(self._question())
        with self._lock:
            self._space.unconfirmed.clear()
            self._space.told()
            self._save()

    def _question(self) -> Reconcile:
        with self._lock:
            space = self._space
            lost, spans = int64s_of(space.lost), int64s_of(space.lost_spans)
            stored = stored_ids(space)
            carvable = carvable_ids(space)  # behind what was found just now
            return Reconcile(unit=self._number, blocks=stored, carvable=carvable, lost=lost, lost_spans=spans)

    def _verified(self, *, partial: bool) -> dict[int, str]:
        """Look at the blocks of which some bytes (none) were given back; return what is wrong with which."""
        with self._lock:
            stored = (block for block in self._space.blocks() if block.partial == partial and not block.freed)
            blocks = [block for block in stored if _verifiable(block)]
            if not blocks:
                return {}
            pin = self._space.pin(int64s_of(block.block_id for block in blocks), process_id()).pin
            self._save()
            wrong: dict[int, str] = {}
            suspects: list[Suspect] = []
            for block in blocks:
                self._look_at(block, suspects, wrong)
        try:
            wrong.update(damaged(suspects))
        finally:
            with self._lock:
                self._space.unpin(pin)
                self._save()
        return wrong

    def _look_at(self, block: StoredBlock, suspects: list[Suspect], wrong: dict[int, str]) -> None:
        try:
            readable = self._space.directories.open_block(block.arena.memory, block.start, block.block_id)
        except DecodeError as error:
            wrong[block.block_id] = error.message
            return
        if misplaced(block, readable):
            wrong[block.block_id] = "bytes of rows that were not cleared belong to another block"
        elif readable.head.checked:
            suspects.append(Suspect(readable, cleared=block.cleared_slots()))

    def _apply(self, blocks: Int64s, found: Reconciled) -> dict[int, str]:
        """Take over what the controller says; return the blocks in use that are not there, or were never completed.

        A block that nobody points to, and that no living writer can commit any more, is freed. Where a block is in use
        that was never found, those behind it in its span will not be found either.
        """
        space = self._space
        used, refused = np.asarray(found.committed) > 0, np.asarray(found.committed) < 0
        lacking = filter(self._lacks, [*blocks[used].tolist(), *found.carved.tolist()])
        missing = dict.fromkeys(lacking, "it is in use, but not whole")
        for block_id in missing:
            span = space.spans[block_id >> SPAN_SHIFT & SPAN_MASK]
            if span.find(block_id) is None:
                space.lose_span(span.first_block)
        settled = {
            block.block_id
            for span in space.spans.values()
            for block in span.blocks.values()
            if span.holder is None or block.partial
        }
        space.free(blocks[refused])
        space.free(int64s_of(block_id for block_id in blocks[~used].tolist() if block_id in settled))
        whole = np.isin(found.cleared_blocks, int64s_of(missing), invert=True)
        cleared = found.cleared_blocks[whole], found.cleared_slots[whole]
        space.free_slots(
            FreeBlocks(sequence=0, blocks=int64s_of(()), partial_blocks=cleared[0], partial_slots=cleared[1])
        )
        self._save()
        return missing

    def _lacks(self, block_id: int) -> bool:
        """Whether a block was never found, or is not sealed. One that was there and is not was freed meanwhile."""
        span = self._space.spans.get(block_id >> SPAN_SHIFT & SPAN_MASK)
        if span is None:
            return False
        block = span.find(block_id)
        return block_id >= span.first_block + span.end[0] if block is None else not (block.freed or block.sealed)

    def _lose(self, wrong: dict[int, str]) -> None:
        for block_id, reason in wrong.items():
            log.error("block %d is lost: %s", block_id, reason)
        self.lost.update(wrong)
        with self._lock:
            self._space.lose(int64s_of(wrong))
            self._save()


def _verifiable(block: StoredBlock) -> bool:
    """Whether there is something to find out about a block: it is sealed, and has checksums or lost bytes."""
    head = read_head(block.arena.memory, block.start)
    return head is not None and head.sealed and (head.checked or block.partial)
