"""Samples that were generated and not trained on yet, as the driver knows them: keys and tags."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transfer_queue import KVBatchMeta

if TYPE_CHECKING:
    from transfer_queue import KVDelta, TransferQueueClient


class ReplayBuffer:
    """Follows the finished samples of a partition by cursor, and hands out each of them once, oldest first.

    Samples that the queue drops, because their policy became too old, leave the buffer as well.
    """

    def __init__(self, client: TransferQueueClient, partition_id: str, timeout_s: float) -> None:
        self._client = client
        self._partition = partition_id
        self._timeout_s = timeout_s
        self._cursor = ""
        self._waiting: dict[str, dict[str, Any]] = {}  # key: tag, in the order in which they were finished
        self._handed_out: set[str] = set()

    def __repr__(self) -> str:
        return f"<ReplayBuffer of {self._partition!r}: {len(self)} samples wait, {len(self._handed_out)} are in use>"

    def __len__(self) -> int:
        return len(self._waiting)

    def sample(self, size: int) -> KVBatchMeta:
        """Wait until there are so many samples, and take the oldest; `GetMetaTimeout` after the buffer's timeout.

        A put brings whole groups, and the samples of a group grow old together: if `size` is that of whole groups, so
        is what comes.
        """
        self._follow(self._client.kv_list(self._partition, since=self._cursor))
        while len(self._waiting) < size:
            finished = {"status": "finished"}
            self._follow(
                self._client.kv_wait(self._partition, where=finished, since=self._cursor, timeout=self._timeout_s)
            )
        keys = list(self._waiting)[:size]
        self._handed_out.update(keys)
        return KVBatchMeta(keys, [self._waiting.pop(key) for key in keys], self._partition)

    def _follow(self, delta: KVDelta) -> None:
        self._cursor = delta.cursor
        changed = delta.changed.get(self._partition, {})
        known = self._waiting.keys() | self._handed_out
        for key in known - changed.keys() if delta.full else delta.removed.get(self._partition, ()):
            self._waiting.pop(key, None)
            self._handed_out.discard(key)
        for key, tag in changed.items():
            if tag.get("status") == "finished" and key not in self._handed_out:
                self._waiting[key] = tag
