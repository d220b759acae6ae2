"""The weights of the policy on their way from the actors to the rollout workers: one key of the queue.

A put makes columns and tag visible at once, so whoever sees a version gets its weights. Nobody polls: a wait for the
next version stays at the controller until that version is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from recipe.grpo_tiny.model import Weights

if TYPE_CHECKING:
    from transfer_queue import KVDelta, TransferQueueClient

PARTITION, KEY = "policy", "weights"


def publish(client: TransferQueueClient, weights: Weights) -> None:
    """Replace the weights that are there."""
    columns = {"values": torch.from_numpy(weights.values), "version": torch.tensor(weights.version)}
    client.kv_put(KEY, PARTITION, columns, tag={"version": weights.version})


def publish_end(client: TransferQueueClient) -> None:
    """No version will follow."""
    client.kv_put(KEY, PARTITION, tag={"is_last": True})


class WeightsFeed:
    """The weights as one reader sees them: each version at most once, and only the newest."""

    def __init__(self, client: TransferQueueClient, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._cursor = ""
        self.is_over = False

    def newer(self) -> Weights | None:
        """What was published since the last call, at once; None: nothing."""
        return self._follow(self._client.kv_list(PARTITION, since=self._cursor))

    def next(self) -> Weights | None:
        """The same, but wait for it, or for the end; `GetMetaTimeout` after the feed's timeout."""
        return self._follow(self._client.kv_wait(PARTITION, since=self._cursor, timeout=self._timeout_s))

    def _follow(self, delta: KVDelta) -> Weights | None:
        self._cursor = delta.cursor
        tag = delta.changed.get(PARTITION, {}).get(KEY)
        if tag is None:
            return None
        self.is_over = tag.get("is_last", False)
        row = self._client.kv_batch_get(KEY, PARTITION, ["values", "version"])
        return Weights(int(row["version"][0]), row["values"][0].numpy())
