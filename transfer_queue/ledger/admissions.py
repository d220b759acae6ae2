"""Room that is kept for puts that are being written."""

from __future__ import annotations

from typing import NamedTuple

from transfer_queue.ledger.limits import Claim

ADMITTED_S = 60.0
"""How long room is kept for a put that was admitted."""


class _Admission(NamedTuple):
    claim: Claim
    client: str
    until: float


class Admissions:
    """Who was admitted, for how much, until when. Each ends with its put, with its client, or after `ADMITTED_S`."""

    def __init__(self) -> None:
        self._kept: dict[int, _Admission] = {}  # in order of their end
        self._last = 0

    def __len__(self) -> int:
        return len(self._kept)

    def grant(self, claim: Claim, client: str, now: float) -> int:
        """Returns the number that the put has to come with."""
        self._last = max(self._last + 1, int(now * 1e6))  # never one that was granted before a restart
        self._kept[self._last] = _Admission(claim, client, now + ADMITTED_S)
        return self._last

    def take(self, number: int) -> Claim | None:
        """The admission is over; None if it was before."""
        kept = self._kept.pop(number, None)
        return None if kept is None else kept.claim

    def claims(self) -> list[Claim]:
        return [kept.claim for kept in self._kept.values()]

    def clients(self) -> set[str]:
        """Who has any."""
        return {kept.client for kept in self._kept.values()}

    def of_client(self, client: str) -> list[int]:
        return [number for number, kept in self._kept.items() if kept.client == client]

    def next_expiry(self) -> float | None:
        """When the first one ends."""
        return next((kept.until for kept in self._kept.values()), None)

    def overdue(self, now: float) -> list[int]:
        return [number for number, kept in self._kept.items() if kept.until <= now]

    def clear(self) -> None:
        """All are over."""
        self._kept.clear()
