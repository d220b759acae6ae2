"""The version window: samples know which policy generated them, and those of a policy too old are not handed out.

A row gets its version once, from the put that inserts it or from a later one. The policy's own version only rises. With
`max_staleness` a row of version v is within the window while v >= current - max_staleness; rows without a version are
never stale. Whether a row is handed out is decided by the same state as this, so no grant lies outside the window; what
becomes of rows that fall out of it is told in `removing`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger.partition import Partition
from transfer_queue.ledger.rows import Rows
from transfer_queue.ledger.table import NO_VERSION

Int64s: TypeAlias = NDArray[np.int64]

MOST_NAMES = 1000
"""How many producers, and how many sources of a partition, are counted by name; the others together."""

OTHERS = "(others)"


class Versions:
    """The policy's version, and which rows are too old for it. `max_staleness`: in versions; None: none is too old."""

    def __init__(self, rows: Rows, max_staleness: int | None) -> None:
        self.max_staleness = max_staleness
        self.current = 0
        self.dropped = 0  # rows dropped as too old since this object was made
        self._rows = rows
        self._started = 0  # rows that got a version, less those of them that were dropped
        self._writers: dict[str, int] = {}
        self._beyond: Int64s = np.empty(0, np.int64)  # rows that fell out of the window; some may be gone

    def __repr__(self) -> str:
        return f"<Versions: policy {self.current}, oldest {self._rows.table.oldest}, {self._started} samples>"

    # ------------------------------------------------------------ rows get their version

    def check(self, rows: Int64s, versions: Int64s) -> None:
        """Raise `InvalidArgument` for rows that have another version already."""
        known = self._rows.table.version[rows]
        other = (known != NO_VERSION) & (versions != NO_VERSION) & (known != versions)
        if other.any():
            row, old, new = (int(each[other][0]) for each in (rows, known, versions))
            raise InvalidArgument(f"sample {row} has policy version {old}, which does not change; this put says {new}")

    def give(self, rows: Int64s, versions: Int64s, client: str) -> None:
        """Rows that have none get theirs; `check` comes first."""
        table = self._rows.table
        new = (table.version[rows] == NO_VERSION) & (versions != NO_VERSION)
        given = rows[new]
        table.version[given] = versions[new]
        table.writer[given] = self._number(client)
        self._started += len(given)
        self._leave(given[table.outdated(given)])

    def _number(self, client: str) -> int:
        if client not in self._writers and len(self._writers) >= MOST_NAMES:
            client = OTHERS
        return self._writers.setdefault(client, len(self._writers))

    # ------------------------------------------------------------ the window moves

    def check_next(self, version: int) -> None:
        """Raise `InvalidArgument` for a version that the policy cannot have now."""
        if isinstance(version, bool) or not isinstance(version, int) or version < self.current:
            raise InvalidArgument(f"the policy has version {self.current}, which only rises: not {version!r}")

    def advance(self, version: int) -> None:
        """The policy has this version now; rows that are too old for it are not handed out from now on."""
        self.current = version
        if self._move_window():
            self._leave(np.flatnonzero(self._rows.table.outdated()))

    def _move_window(self) -> bool:
        oldest = 0 if self.max_staleness is None else max(self.current - self.max_staleness, 0)
        moved = oldest != self._rows.table.oldest
        self._rows.table.oldest = oldest
        return moved

    def _leave(self, rows: Int64s) -> None:
        if len(rows) == 0:
            return
        self._beyond = np.union1d(self._beyond, rows)
        for partition, positions in self._rows.owners(rows):
            partition.withhold(rows[positions])

    def beyond(self) -> Int64s:
        """The rows that are there, and outside the window."""
        if len(self._beyond):
            self._beyond = self._beyond[self._rows.table.outdated(self._beyond)]
        return self._beyond

    # ------------------------------------------------------------ rows that go

    def count_stale(self, partition: Partition, rows: Int64s) -> None:
        """These rows will be dropped because they are too old: count them by who put them, and by their source."""
        self.dropped += len(rows)
        names = list(self._writers)
        numbers, counts = np.unique(self._rows.table.writer[rows], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            partition.stale["by_producer"][names[number]] += count
        tags, by_source = self._rows.table.tags, partition.stale["by_source"]
        for source, count in Counter(tags[row].get("source") for row in rows.tolist() if row in tags).items():
            if source is not None:
                name = str(source)
                by_source[name if name in by_source or len(by_source) < MOST_NAMES else OTHERS] += count

    def forget(self, rows: Int64s) -> None:
        """Rows will be dropped: others may be generated in their place."""
        self._started -= int((self._rows.table.version[rows] != NO_VERSION).sum())

    # ------------------------------------------------------------ what is told

    def left(self) -> int | None:
        """How many samples may be started so that none is too old when its step comes; None: not bounded.

        (current + max_staleness + 1) × samples of a step − samples with a version that were not dropped, as AReaL paces
        its rollouts (inclusionAI/AReaL, staleness_manager). It needs the size of a step.
        """
        if self.max_staleness is None or not self._rows.step_size:
            return None
        return max((self.current + self.max_staleness + 1) * self._rows.step_size - self._started, 0)

    def explained(self, partition: Partition) -> str | None:
        """What the window did to a partition, in words; None: nothing."""
        count = sum(partition.stale["by_producer"].values())
        if not count:
            return None
        return (
            f"{count} were dropped as stale (the policy has version {self.current}, and only samples of version "
            f"{self._rows.table.oldest} and later are handed out)"
        )

    # ------------------------------------------------------------ keeping it

    def state(self) -> dict[str, Any]:
        """Everything beside what the table holds."""
        return {"current": self.current, "started": self._started, "writers": list(self._writers)}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what `state` returned, after the rows."""
        self.current, self._started = state["current"], state["started"]
        self._writers = {name: number for number, name in enumerate(state["writers"])}
        self._move_window()
        self._beyond = np.flatnonzero(self._rows.table.outdated())
