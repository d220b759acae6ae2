"""The leases of a batch, as its users see them."""

from __future__ import annotations

import numpy as np

from transfer_queue.errors import InvalidArgument
from transfer_queue.metadata.columns import Int64s
from transfer_queue.metadata.table import Table


class HasLeases:
    """Rows keep the lease they were drawn under, however metas are cut and joined."""

    _table: Table

    @property
    def is_leased(self) -> bool:
        """Some of the rows are."""
        leases = self._table.leases
        return leases is not None and any(token is not None for token in leases.tokens.first_rows())

    @property
    def lease_token(self) -> int | None:
        """The lease of all rows; None if they have none, or not all the same one."""
        leases = self._table.leases
        return None if leases is None else leases.token

    @property
    def lease_deadline_s(self) -> float | None:
        """A moment (`time.monotonic` of the host that drew) up to which the leases of the rows surely last.

        Counted from when the draw was sent: after a long wait for samples the lease lasts longer than this says.
        """
        leases = self._table.leases
        return None if leases is None else leases.deadline_s

    def rows_by_lease(self) -> dict[int, Int64s]:
        """Positions [n] of the rows of each lease, by token, in the order in which the leases first appear.

        Raises `InvalidArgument` if any row is not leased.
        """
        leases = self._table.leases
        first = {} if leases is None else leases.tokens.first_rows()
        if leases is None or None in first:
            without = len(self._table) if leases is None else leases.tokens.rows().count(None)
            raise InvalidArgument(
                f"{without} of {len(self._table)} samples are not leased: draw them with get_meta(..., lease=seconds)"
            )
        codes = leases.tokens.codes
        return {token: np.flatnonzero(codes == codes[row]) for token, row in first.items() if token is not None}

    def mark_renewed(self, token: int, deadline_s: float) -> None:
        """The lease lasts until then."""
        if self._table.leases is not None:
            self._table.leases = self._table.leases.renewed(token, deadline_s)
