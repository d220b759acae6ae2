"""What puts claim of the limits, for tests."""

from __future__ import annotations

import numpy as np

from transfer_queue.ledger.limits import Claim, Limit
from transfer_queue.ledger.usage import Usage


def claim(samples: int, size_bytes: int = 0, partition: str = "train", producer: str = "rollout-0") -> Claim:
    return Claim(partition, producer, samples, size_bytes)


def fill(usage: Usage, what: Claim, first_row: int = 0, block: int = 1) -> None:
    """Insert the rows of a claim, with one field."""
    usage.insert(what.partition, what.producer, np.arange(first_row, first_row + what.samples))
    if what.size_bytes:
        usage.commit(block, what.producer, what.size_bytes, {what.partition: what.samples})


def total(usage: Usage, unit: str) -> int:
    return usage.held(Limit("total", "", unit))
