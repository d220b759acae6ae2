"""A block written in one go, for tests."""

from __future__ import annotations

from transfer_queue.storage.block import BlockPlan, Bytes, carve, fill_block


def write_block(plan: BlockPlan, memory: Bytes, block_id: int) -> None:
    """Write a whole block to the start of `memory`."""
    carve(plan, memory, block_id)
    fill_block(plan, memory)
