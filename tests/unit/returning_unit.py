"""A storage unit that dies and comes back, and the controller it agrees with, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.unit.asking_unit import Unit, block_of, ids
from transfer_queue.messages import Int64s, Pin, Pinned, ProcessId, Reconcile, Reconciled, Reserved
from transfer_queue.storage.block import carve, fill_block
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.holders import process_id


class Controller:
    """Knows which blocks are in use, and which of their rows were cleared."""

    def __init__(self) -> None:
        self.committed: set[int] = set()
        self.cleared: dict[int, set[int]] = {}
        self.told: list[list[int]] = []  # the blocks of each question
        self.lost: list[tuple[set[int], set[int]]] = []  # lost blocks and spans of each question
        self.refused: set[int] = set()

    def reconcile(self, question: Reconcile) -> Reconciled:
        blocks = question.blocks
        assert question.carvable is not None and question.lost is not None and question.lost_spans is not None
        self.told.append(sorted(blocks.tolist()))
        self.lost.append((set(question.lost.tolist()), set(question.lost_spans.tolist())))
        used = self.committed.intersection(blocks.tolist())
        ends = {end >> 16: end for end in question.carvable.tolist()}
        others = sorted(self.committed - set(blocks.tolist()))
        carved = [block for block in others if block >= ends.get(block >> 16, block + 1)]
        used.update(carved)
        cleared = [(block, slot) for block in sorted(used) for slot in sorted(self.cleared.get(block, ()))]
        pairs = np.array(cleared, np.int64).reshape(-1, 2)
        return Reconciled(
            committed=np.isin(blocks, ids(*used)).astype(np.int64) - np.isin(blocks, ids(*self.refused)),
            carved=ids(*carved),
            cleared_blocks=pairs[:, 0],
            cleared_slots=pairs[:, 1],
        )

    def settle(self, blocks: Int64s) -> Int64s:
        return np.isin(blocks, ids(*self.committed)).astype(np.int64)


class ReturningUnit(Unit):
    """A unit with a journal. `die` ends it as SIGKILL would; `come_back` is the next process on its folder."""

    def __init__(self, folder: Path, controller: Controller | None = None, **options: Any) -> None:
        self.now = 100.0
        self.folder = folder
        self.controller = controller or Controller()
        self._options = options
        self.start()
        self.service.return_to(3, self.controller.reconcile)

    def start(self) -> None:
        """Rebuild the index, and do not agree with the controller yet."""
        self.service = UnitService(
            self.folder, clock=lambda: self.now, journal=True, settle=self.controller.settle, **self._options
        )

    def die(self) -> None:
        self.service.abandon()

    def come_back(self) -> None:
        self.die()
        self.start()
        self.service.return_to(3, self.controller.reconcile)

    def close(self) -> None:
        self.service.close()

    def commit(self, values: np.ndarray[Any, Any], holder: ProcessId | None = None, **options: Any) -> int:
        block = self.put(values, holder, **options)
        self.controller.committed.add(block)
        return block

    def pinned(self, block: int) -> Pinned:
        """Pin a block for this process."""
        found = self.ask(Pin(blocks=ids(block), holder=process_id()))
        assert isinstance(found, Pinned)
        return found

    def all_free(self) -> bool:
        stats = self.stats()
        return stats["bytes_free"] == stats["bytes_arenas"] and stats["blocks"] == stats["pins"] == stats["spans"] == 0


def mapped(span: Reserved) -> np.ndarray[Any, Any]:
    """The bytes of a span, as its holder maps them."""
    return np.memmap(span.arena, np.uint8, "r+", span.offset, (span.size_bytes,))


def bytes_of(pinned: Pinned, number: int = 0) -> np.ndarray[Any, Any]:
    """The bytes of a pinned block, as a reader maps them."""
    path = pinned.arenas[int(pinned.arena_of[number])]
    return np.memmap(path, np.uint8, "r", int(pinned.offsets[number]), (int(pinned.sizes[number]),))


def write_here(memory: np.ndarray[Any, Any], block_id: int, values: np.ndarray[Any, Any], *, seal: bool = True) -> int:
    """Carve a block, and fill it unless it is not to be sealed; return where the next one begins."""
    plan = block_of(values)
    carve(plan, memory, block_id)
    if seal:
        fill_block(plan, memory)
    return int(plan.size_bytes)
