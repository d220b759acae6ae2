"""The batches that are moved, and how every byte of them is read.

Peers import this from an environment without this project: it needs torch, tensordict and NumPy only.

B rows · T tokens of a row, other for each · D width of a dense row
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from benchmarks.scale import Scale

WIDE_ROWS = 256
WIDE_FIELDS = (1, 8, 32, 128)

_PROMPTS = ("How many primes lie between {} and {}?", "Sum of the digits of {} × {}?", "Greatest divisor of {} and {}?")


def dense(scale: Scale) -> TensorDict:
    """Nine fields [B, D] float32."""
    make = torch.Generator().manual_seed(0)
    fields = {f"field_{n}": torch.rand(scale.dense_rows, scale.dense_width, generator=make) for n in range(9)}
    return TensorDict(fields, batch_size=[scale.dense_rows])


def ragged(scale: Scale) -> TensorDict:
    """Five fields [B, T] of three types, and the prompt as text: what a rollout and its scorers leave behind."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, scale.ragged_tokens, scale.ragged_rows, endpoint=True)
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    tokens = int(offsets[-1])
    make = torch.Generator().manual_seed(0)
    values = {
        "input_ids": torch.randint(0, 150_000, (tokens,), generator=make),
        "position_ids": torch.arange(tokens) - torch.repeat_interleave(offsets[:-1], torch.from_numpy(lengths)),
        "response_mask": torch.randint(0, 2, (tokens,), generator=make, dtype=torch.int32),
        "old_log_probs": -torch.rand(tokens, generator=make),
        "advantages": torch.randn(tokens, generator=make),
    }
    fields: dict[str, Any] = {
        name: torch.nested.nested_tensor_from_jagged(column, offsets) for name, column in values.items()
    }
    prompts = [_PROMPTS[row % len(_PROMPTS)].format(row, int(length)) for row, length in enumerate(lengths)]
    batch = TensorDict(fields, batch_size=[scale.ragged_rows])
    batch["prompt"] = prompts
    return batch


def small(scale: Scale) -> TensorDict:
    """Five fields of at most 32 bytes per row."""
    rows = scale.small_rows
    make = torch.Generator().manual_seed(0)
    fields = {
        "uid": torch.arange(rows),
        "reward": torch.rand(rows, generator=make),
        "version": torch.randint(0, 9, (rows,), generator=make, dtype=torch.int32),
        "finished": torch.rand(rows, generator=make) > 0.5,
        "statistics": torch.rand(rows, 8, generator=make),
    }
    return TensorDict(fields, batch_size=[rows])


def wide(scale: Scale, fields: int) -> TensorDict:
    """The same bytes as so many fields [256, D] float32."""
    width = scale.wide_bytes // (4 * WIDE_ROWS * fields)
    make = torch.Generator().manual_seed(0)
    columns = {f"field_{n}": torch.rand(WIDE_ROWS, width, generator=make) for n in range(fields)}
    return TensorDict(columns, batch_size=[WIDE_ROWS])


def wide_name(fields: int) -> str:
    return f"wide, {fields} fields" if fields > 1 else "wide, 1 field"


BATCHES: dict[str, Callable[[Scale], TensorDict]] = {
    "dense": dense,
    "ragged": ragged,
    "small": small,
    **{wide_name(fields): functools.partial(wide, fields=fields) for fields in WIDE_FIELDS},
}


# ---------------------------------------------------------------- reading


def touch(batch: TensorDict | dict[str, Any]) -> dict[str, int]:
    """Read every byte; return a checksum per field that does not depend on the order of the rows."""
    return {
        str(name): _checksum(column if isinstance(column, torch.Tensor | np.ndarray) else batch[str(name)])
        for name, column in batch.items()
    }


def check(found: dict[str, int], expected: dict[str, int]) -> None:
    """Raises `ValueError` if checksums differ."""
    if found != expected:
        wrong = [field for field, checksum in expected.items() if found.get(field) != checksum]
        raise ValueError(f"what was read differs from what was put in {wrong}")


def size_bytes(batch: TensorDict) -> int:
    """Bytes of the values alone, without offsets."""
    return sum(_size(batch[name]) for name in batch.keys())  # noqa: SIM118  as above


def _checksum(column: Any) -> int:
    if isinstance(column, np.ndarray):
        return _xor(column.reshape(-1))
    if not isinstance(column, torch.Tensor):
        return sum(zlib.crc32(text.encode()) for text in column)
    values = (column.values() if column.is_nested else column).reshape(-1).numpy()
    return _xor(values)


def _xor(values: np.ndarray) -> int:
    return int(np.bitwise_xor.reduce(values.view(f"u{values.itemsize}")))


def _size(column: Any) -> int:
    if not isinstance(column, torch.Tensor):
        return sum(len(text.encode()) for text in column)
    values = column.values() if column.is_nested else column
    return values.numel() * values.element_size()
