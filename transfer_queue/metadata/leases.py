"""Under which lease each row of a meta was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transfer_queue.metadata.columns import Coded, Rows


@dataclass(frozen=True, slots=True, eq=False)
class Leases:
    """Tokens of B rows, None where a row is not leased, and by token a moment up to which the lease surely lasts.

    Moments are those of `time.monotonic` on the host that drew.
    """

    tokens: Coded[int | None]  # [B]
    deadlines_s: dict[int, float]

    @classmethod
    def of(cls, token: int, deadline_s: float | None, size: int) -> Leases:
        return cls(Coded.constant(token, size), {} if deadline_s is None else {token: deadline_s})

    @property
    def token(self) -> int | None:
        """The lease of all rows; None if there are several, or rows without one."""
        tokens = list(self.tokens.first_rows())
        return tokens[0] if len(tokens) == 1 else None

    @property
    def deadline_s(self) -> float | None:
        """The earliest of the rows' leases."""
        known = [self.deadlines_s.get(token) for token in self.tokens.first_rows() if token is not None]
        return min((deadline for deadline in known if deadline is not None), default=None)

    def take(self, rows: Rows) -> Leases:
        return Leases(self.tokens.take(rows), self.deadlines_s)

    def renewed(self, token: int, deadline_s: float) -> Leases:
        return Leases(self.tokens, {**self.deadlines_s, token: deadline_s})


def concat(pieces: Sequence[Leases | None], sizes: Sequence[int]) -> Leases | None:
    """Put rows behind each other. Of two deadlines of one lease the later counts: it was renewed."""
    if all(piece is None for piece in pieces):
        return None
    deadlines_s: dict[int, float] = {}
    for piece in pieces:
        for token, deadline_s in piece.deadlines_s.items() if piece is not None else ():
            deadlines_s[token] = max(deadline_s, deadlines_s.get(token, deadline_s))
    tokens = [_none(size) if piece is None else piece.tokens for piece, size in zip(pieces, sizes, strict=True)]
    return Leases(Coded.concat(tokens), deadlines_s)


def _none(size: int) -> Coded[int | None]:
    return Coded.constant(None, size)
