"""Samples whose whole content follows from a seed and a sequence number, so that any reader can check it.

B samples · L tokens of one
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

SCORE = "score"
GROUP = 2  # samples of one group

_BODY = 48
_LONG = 20_000  # tokens of one sample in 41, beyond what is sent in one piece


def fields_of(seed: int, sequences: Sequence[int]) -> dict[str, Any]:
    """The fields of new samples: seq [B], tokens [B, L] jagged, body [B, 48], note."""
    made = [_content(seed, sequence) for sequence in sequences]
    tokens = [torch.from_numpy(tokens) for tokens, _ in made]
    return {
        "seq": torch.tensor(list(sequences), dtype=torch.int64),
        "tokens": torch.nested.as_nested_tensor(tokens, layout=torch.jagged),
        "body": torch.from_numpy(np.stack([body for _, body in made])),
        "note": [_note(seed, sequence) for sequence in sequences],
    }


def scores_of(seed: int, sequences: Sequence[int]) -> torch.Tensor:
    """What the second stage adds: score [B] int64."""
    return torch.tensor([_score(seed, sequence) for sequence in sequences], dtype=torch.int64)


def damaged(seed: int, sequences: Sequence[int], data: Any) -> list[str]:
    """Say which fields of which samples are not what was put."""
    wrong = []
    columns = {name: _rows(data[name]) for name in data.keys()}  # noqa: SIM118  a TensorDict iterates over its rows
    for at, sequence in enumerate(sequences):
        tokens, body = _content(seed, sequence)
        expected = {"seq": sequence, "tokens": tokens, "body": body, "note": _note(seed, sequence)}
        expected[SCORE] = _score(seed, sequence)
        for name, values in columns.items():
            if not np.array_equal(_plain(values[at]), expected[name]):
                wrong.append(f"{name} of sample {sequence}")
    return wrong


def _content(seed: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, sequence))
    length = _LONG if sequence % 41 == 40 else int(rng.integers(1, 300))
    return rng.integers(0, 1 << 40, length), rng.standard_normal(_BODY, dtype=np.float32)


def _score(seed: int, sequence: int) -> int:
    return zlib.crc32(_content(seed, sequence)[1].tobytes())


def _note(seed: int, sequence: int) -> str:
    return f"sample {sequence} of seed {seed} " + "é" * (sequence % 7)


def _rows(column: Any) -> Sequence[Any]:
    return column.unbind() if isinstance(column, torch.Tensor) else list(column)


def _plain(value: Any) -> Any:
    return value.numpy() if isinstance(value, torch.Tensor) else value
