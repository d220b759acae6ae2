"""How much each benchmark moves and how often it repeats."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Sizes of the batches, of the partitions that are drawn from, and of the floors."""

    rounds: int  # counted, after `warm_up` others
    warm_up: int
    dense_rows: int
    dense_width: int
    ragged_rows: int
    ragged_tokens: int  # at most, per sample
    small_rows: int
    partition_rows: tuple[int, ...]  # ascending
    calls: int  # of each latency
    wake_ups: int
    floor_bytes: int
    frame_bytes: int


SCALES = {
    "full": Scale(
        rounds=15,
        warm_up=3,
        dense_rows=1024,
        dense_width=8192,
        ragged_rows=1024,
        ragged_tokens=4096,
        small_rows=16384,
        partition_rows=(1 << 10, 1 << 16, 1 << 20),
        calls=2000,
        wake_ups=300,
        floor_bytes=9 * 1024 * 8192 * 4,
        frame_bytes=64 << 20,
    ),
    "tiny": Scale(
        rounds=2,
        warm_up=1,
        dense_rows=32,
        dense_width=256,
        ragged_rows=32,
        ragged_tokens=64,
        small_rows=64,
        partition_rows=(1 << 7, 1 << 8, 1 << 9),
        calls=10,
        wake_ups=3,
        floor_bytes=1 << 20,
        frame_bytes=1 << 20,
    ),
}
