"""How much may be in the queue: limits in bytes and samples, and what counts against them (`ledger.usage`).

Rules:

    who waits     only puts of new rows. Adding fields to rows that exist is always admitted, and counts: a full queue
                  could not be emptied otherwise, because consumers wait for those fields. So bytes can exceed a limit
                  by what is added to rows that were let in: leave room for it.
    what counts   a sample from its insertion until it is cleared or dropped; the bytes of a block, spread evenly over
                  its cells (row × field), until those are cleared or written anew
    order         first come, first served per limit: while a put waits for a limit, later ones that need the same
                  limit wait behind it; others pass
    hopeless      a put that is larger than a limit raises at once

Nothing here reads a clock or waits: `Usage.obstacle` says what is in the way, the ledger parks the request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from transfer_queue.errors import InvalidArgument, WrongType

ADMIT_FROM_BYTES = 1 << 16
"""Smaller puts are written before they are let in: what they hold meanwhile is less than what asking costs."""


class Limit(NamedTuple):
    """One limit, or what counts against it. `holder`: the partition or producer; "" for the total."""

    scope: str  # total | partition | producer
    holder: str
    unit: str  # bytes | samples

    @property
    def name(self) -> str:
        return f"{self.scope}_{self.unit}"


class Claim(NamedTuple):
    """What a put asks for. `samples`: new rows only."""

    partition: str
    producer: str
    samples: int
    size_bytes: int

    def amounts(self) -> Iterator[tuple[Limit, int]]:
        """What it counts against each limit."""
        for unit, amount in (("bytes", self.size_bytes), ("samples", self.samples)):
            if amount:
                yield Limit("total", "", unit), amount
                yield Limit("partition", self.partition, unit), amount
                yield Limit("producer", self.producer, unit), amount


@dataclasses.dataclass(frozen=True)
class Limits:
    """Bounds of all that is held, of what one partition holds, of what one producer wrote. None: no bound."""

    total_bytes: int | None = None
    total_samples: int | None = None
    partition_bytes: int | None = None
    partition_samples: int | None = None
    producer_bytes: int | None = None
    producer_samples: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise WrongType(f"limits.{field.name} must be a whole number or None, not {value!r}")
            if value is not None and value < 1:
                raise InvalidArgument(f"limits.{field.name} must be at least 1, not {value}")

    def __bool__(self) -> bool:
        """Whether there is any."""
        return any(value is not None for value in dataclasses.astuple(self))

    @property
    def bounds_bytes(self) -> bool:
        return any(bound is not None for bound in (self.total_bytes, self.partition_bytes, self.producer_bytes))

    def of(self, limit: Limit) -> int | None:
        bound: int | None = getattr(self, limit.name)
        return bound

    def needed_by(self, claim: Claim) -> list[tuple[Limit, int, int]]:
        """(limit, amount, bound) of the limits that a claim counts against."""
        known = ((limit, amount, self.of(limit)) for limit, amount in claim.amounts())
        return [(limit, amount, bound) for limit, amount, bound in known if bound is not None]


class Shortage(NamedTuple):
    """A limit that a claim does not fit under now."""

    limit: Limit
    needed: int
    held: int
    allowed: int

    @property
    def excess(self) -> int:
        return self.needed + self.held - self.allowed
