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
    wide_bytes: int  # over all fields
    partition_rows: tuple[int, ...]  # ascending
    calls: int  # of each latency
    wake_ups: int
    crowd: int  # other draws that wait
    steady_puts: int  # of each of the chains
    floor_bytes: int
    frame_bytes: int
    large_bytes: tuple[int, ...]  # of one field
    large_rounds: int  # counted, after one other
    curve_bytes: tuple[int, ...]  # this and the following: ascending points of a curve
    curve_fields: tuple[int, ...]
    curve_samples: tuple[int, ...]
    curve_partitions: tuple[int, ...]
    curve_tasks: tuple[int, ...]
    curve_waiters: tuple[int, ...]
    curve_clients: tuple[int, ...]  # 1, 2 or multiples of 4
    starts: int  # of sessions
    idle_s: float
    image_groups: int
    image_pixels: int  # of a side, three colours of a byte each
    stream_producers: int  # processes
    stream_coroutines: int  # of each
    stream_each: int  # samples of a coroutine; a multiple of 4
    loader_batches: int  # of 4 micro-batches, for each number of workers
    loader_samples: int  # of the ranks together
    step_prompts: int  # of one step; a multiple of 16
    step_tokens: int  # of a response, at most
    turns: int  # rounds of each comparison with and without a safety, after `warm_up` others
    turn_calls: int  # small calls of one turn
    connections: int  # new clients
    kills: int  # of one process with so many samples in the queue
    recovered_samples: tuple[int, ...]
    checkpoints: int


SCALES = {
    "full": Scale(
        rounds=15,
        warm_up=3,
        dense_rows=1024,
        dense_width=8192,
        ragged_rows=1024,
        ragged_tokens=4096,
        small_rows=16384,
        wide_bytes=256 << 20,
        partition_rows=(1 << 10, 1 << 16, 1 << 20),
        calls=2000,
        wake_ups=300,
        crowd=1000,
        steady_puts=100,
        floor_bytes=9 * 1024 * 8192 * 4,
        frame_bytes=64 << 20,
        large_bytes=(2_000_000_000, 4_500_000_000),
        large_rounds=3,
        curve_bytes=(10**4, 10**5, 10**6, 10**7, 10**8),
        curve_fields=(1, 8, 32, 128),
        curve_samples=(10**3, 10**4, 10**5, 10**6),
        curve_partitions=(1, 10, 100, 1000),
        curve_tasks=(1, 10, 100),
        curve_waiters=(10, 100, 1000, 10_000),
        curve_clients=(1, 2, 4, 8, 16),
        starts=5,
        idle_s=20.0,
        image_groups=64,
        image_pixels=448,
        stream_producers=8,
        stream_coroutines=64,
        stream_each=40,
        loader_batches=128,
        loader_samples=100_000,
        step_prompts=1024,
        step_tokens=4096,
        turns=40,
        turn_calls=100,
        connections=300,
        kills=20,
        recovered_samples=(0, 10_000, 100_000),
        checkpoints=5,
    ),
    "tiny": Scale(
        rounds=2,
        warm_up=1,
        dense_rows=32,
        dense_width=256,
        ragged_rows=32,
        ragged_tokens=64,
        small_rows=64,
        wide_bytes=1 << 20,
        partition_rows=(1 << 7, 1 << 8, 1 << 9),
        calls=10,
        wake_ups=3,
        crowd=20,
        steady_puts=2,
        floor_bytes=1 << 20,
        frame_bytes=1 << 20,
        large_bytes=(1 << 20, 1 << 21),
        large_rounds=1,
        curve_bytes=(10**4, 10**5),
        curve_fields=(1, 8),
        curve_samples=(128, 256),
        curve_partitions=(1, 4),
        curve_tasks=(1, 4),
        curve_waiters=(1, 8),
        curve_clients=(1, 4),
        starts=1,
        idle_s=0.2,
        image_groups=3,
        image_pixels=64,
        stream_producers=2,
        stream_coroutines=32,
        stream_each=4,
        loader_batches=2,
        loader_samples=1024,
        step_prompts=16,
        step_tokens=64,
        turns=1,
        turn_calls=4,
        connections=2,
        kills=1,
        recovered_samples=(0, 128),
        checkpoints=1,
    ),
}
