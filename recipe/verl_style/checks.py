"""What must hold at every step, and of the queue's accounts at the end. What must be learned: `grpo_tiny.checks`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from recipe.grpo_tiny.checks import MAX_GAP, ConservationError

if TYPE_CHECKING:
    from transfer_queue import KVBatchMeta


def staleness_of(step: int, batch: KVBatchMeta) -> Counter[int]:
    """Return {versions: rows}: by how much the policies that gave the answers lag behind that of the step."""
    return Counter(step - tag["version"] for tag in batch.tags)


class Tally:
    """What was trained on so far, by key."""

    def __init__(self, group_size: int, max_staleness: int) -> None:
        self._group_size = group_size
        self._max_staleness = max_staleness
        self._trained: set[str] = set()

    def check_step(self, step: int, batch: KVBatchMeta, metrics: Mapping[str, Sequence[float]]) -> None:
        """Raise ConservationError unless the step trained on whole groups that no step had, fresh enough, on all ranks.

        If all answers are of the policy that is trained, its log-probs must be those of the rollout.
        """
        again = self._trained.intersection(batch.keys)
        if again:
            raise ConservationError(f"step {step}: {len(again)} samples were trained before: {sorted(again)[:5]}")
        self._trained.update(batch.keys)
        broken = [group for group, rows in groups_of(batch).items() if rows != self._group_size]
        if broken:
            raise ConservationError(f"step {step}: groups {broken[:5]} are not whole")
        lags = staleness_of(step, batch)
        if min(lags) < 0 or max(lags) > self._max_staleness:
            raise ConservationError(f"step {step}: answers lag behind by {dict(lags)}, allowed {self._max_staleness}")
        if sum(metrics["rows"]) != len(batch):
            raise ConservationError(f"step {step}: of {len(batch)} samples the ranks trained on {metrics['rows']}")
        if len(set(metrics["weights_sum"])) > 1:
            raise ConservationError(f"step {step}: the ranks hold different weights")
        if max(lags) == 0 and not max(metrics["gap"]) < MAX_GAP:
            raise ConservationError(f"step {step}: log-probs of rollout and actor differ by {max(metrics['gap']):.2e}")

    def check_accounts(self, accounts: Mapping[str, Any], generated: int) -> None:
        """Compare the queue's audit with what was generated, and with what was trained on and then cleared."""
        dropped = Counter(accounts["dropped"])
        if accounts["inserted"] != generated:
            raise ConservationError(f"{generated} samples were generated, the queue knows {accounts['inserted']}")
        if dropped["cleared"] != len(self._trained):
            raise ConservationError(f"{len(self._trained)} samples were trained on, {dropped['cleared']} cleared")
        if accounts["inserted"] != accounts["live"] + dropped.total() or dropped.keys() - {"cleared", "stale"}:
            raise ConservationError(f"samples were lost: {dict(accounts)}")


def groups_of(batch: KVBatchMeta) -> Counter[str]:
    """Return {prompt: rows}; a key is `<prompt>_<session>`."""
    return Counter(key.rpartition("_")[0] for key in batch.keys)
