"""The rows of the stream, and the process that puts them.

A row is a point `x` and what a fixed random network, the teacher, says of it. Each row is seen once, so the loss on a
batch before its step is the loss on unseen data.

Legend: B rows, F features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recipe.streaming_ddp.config import PARTITION, Settings
from transfer_queue import TransferQueueClient

TEACHER_SEED = 7


def network(num_features: int, seed: int) -> nn.Module:
    """[B, F] -> [B, 1]. The same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(num_features, 64), nn.Tanh(), nn.Linear(64, 1))


class Source:
    """Makes rows, the same ones for the same arguments. `y` has mean 0 and variance 1, about."""

    def __init__(self, num_features: int, seed: int) -> None:
        self._num_features = num_features
        self._seed = seed
        self._teacher = network(num_features, TEACHER_SEED)
        raw = self._answers(self._points(0, 4096))
        self._mean, self._scale = raw.mean(), raw.std()

    def rows(self, first: int, count: int) -> dict[str, Tensor]:
        """Return rows `first` to `first + count - 1`: `row_id` [B] int64, `x` [B, F] and `y` [B] float32."""
        x = self._points(first, count)
        y = (self._answers(x) - self._mean) / self._scale
        return {"row_id": torch.arange(first, first + count), "x": x, "y": y}

    def _points(self, first: int, count: int) -> Tensor:
        random = np.random.default_rng([self._seed, first])
        return torch.from_numpy(random.standard_normal((count, self._num_features), np.float32))

    @torch.no_grad()
    def _answers(self, x: Tensor) -> Tensor:
        answers: Tensor = self._teacher(x)
        return answers[:, 0]


def produce(conf: Any, settings: Settings) -> None:
    """Put all rows, as fast as the machine allows; the last put says that it is the last."""
    torch.set_num_threads(1)
    source = Source(settings.num_features, settings.seed)
    with TransferQueueClient("producer", conf.controller.zmq_info) as client:
        for first in range(0, settings.rows, settings.rows_per_put):
            count = min(settings.rows_per_put, settings.rows - first)
            client.put(source.rows(first, count), partition_id=PARTITION, is_last=first + count == settings.rows)
