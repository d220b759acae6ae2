"""Whether new rows may come in now: the window of their step has to be free, and the limits have to allow them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transfer_queue.errors import CapacityExceeded, InvalidArgument
from transfer_queue.ledger.leases import shown
from transfer_queue.ledger.limits import ADMIT_FROM_BYTES, Claim, Limit
from transfer_queue.ledger.rows import Rows
from transfer_queue.messages import Admit, Put


class Gate:
    """Puts of new rows, and requests to admit such a put, pass here. Those that only add fields always pass."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._usage = rows.usage

    @property
    def admit_from_bytes(self) -> int | None:
        """Larger puts of new rows should be admitted before they are written; None: there is no need."""
        bounded = self._usage is not None and self._usage.limits.bounds_bytes
        return ADMIT_FROM_BYTES if bounded else None

    def check(self, request: Admit) -> str:
        """Raise for a request that is wrong whatever the state; return the name of its partition."""
        if request.num_rows < 1 or (request.keys is not None and len(request.keys) != request.num_rows):
            raise InvalidArgument(f"{request.num_rows} rows to admit, with keys {request.keys!r}")
        return self._rows.name(request.partition_id, request.global_step)

    def obstacle(self, request: Put | Admit, name: str, client: str) -> str | None:
        """What has to change before it passes; None: nothing. Raises where waiting cannot help.

        Room that was kept for the put is not kept any more: it is to be carried out now, or waits as any other.
        """
        claim = self._claim(request, name, client)
        admission = request.admission if isinstance(request, Put) else None
        admitted = admission is not None and self._usage is not None and self._usage.use(admission, claim)
        if claim.samples == 0:
            return None
        window = self._rows.room(name, claim.samples)
        if window is not None or self._usage is None:
            return window
        self._usage.check(claim)
        return None if admitted else self._usage.obstacle(claim)

    def left(self, partition: str | None, producer: str) -> dict[Limit, int]:
        """What the limits that are set leave this producer."""
        return {} if self._usage is None else self._usage.left(partition, producer)

    def wait(self, request: Put | Admit, name: str, client: str) -> None:
        """It waits: what comes later and needs the same limit waits behind it."""
        if self._usage is not None:
            self._usage.wait(self._claim(request, name, client))

    def next_round(self) -> None:
        """All that wait are tried again, in order of arrival."""
        if self._usage is not None:
            self._usage.next_round()

    @property
    def room_made(self) -> bool:
        """Something was given back since the last round."""
        return self._usage is not None and self._usage.room_made

    def admit(self, request: Admit, name: str, client: str, now: float) -> int:
        """Keep room for the put of a client; returns what it has to come with, 0 if it needs none."""
        claim = self._claim(request, name, client)
        return 0 if self._usage is None or not claim.samples else self._usage.admit(claim, now, client)

    def withdraw(self, admission: int) -> None:
        """The put that was admitted will not come."""
        if self._usage is not None:
            self._usage.withdraw(admission)

    def leave(self, client: str) -> None:
        """The client is gone, and none of its puts that were admitted will come."""
        if self._usage is not None:
            self._usage.leave(client)

    def clients(self) -> set[str]:
        """Who has room kept for a put."""
        return set() if self._usage is None else self._usage.admissions.clients()

    def expire(self, now: float) -> None:
        """End the admissions that are overdue."""
        if self._usage is not None:
            self._usage.expire(now)

    def next_deadline(self) -> float | None:
        """When the first admission ends."""
        return None if self._usage is None else self._usage.admissions.next_expiry()

    def state(self) -> dict[str, Any] | None:
        """What counts against limits; None if there are none."""
        return None if self._usage is None else self._usage.state()

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take over what `state` returned."""
        if self._usage is not None and state is not None:
            self._usage.load(state)
        elif self._usage is not None:  # saved by a queue without limits
            self._usage.begin_with({name: one.rows() for name, one in self._rows.partitions.items()})

    def too_late(self, request: Put | Admit, name: str, client: str, waited_s: float) -> CapacityExceeded:
        """The error of one that waited in vain."""
        window = self._rows.room(name, self._new_rows(request, name))
        if window is None and self._usage is not None:
            return self._usage.too_late(self._claim(request, name, client), waited_s)
        after = f" after {waited_s:.1f} s" if waited_s else ""
        return CapacityExceeded(f"no capacity for step {self._rows.step_of(name)}{after}: the ring waits for {window}")

    def _claim(self, request: Put | Admit, name: str, client: str) -> Claim:
        """`client`: of an `Admit` the one that will put, of a `Put` the producer it counts for."""
        producer = shown(client) if isinstance(request, Admit) else client
        return Claim(name, producer, self._new_rows(request, name), request.size_bytes)

    def _new_rows(self, request: Put | Admit, name: str) -> int:
        if isinstance(request, Put) and request.indexes is not None:
            return 0
        known = self._rows.partitions.get(name)
        if request.keys is None or known is None:
            return request.num_rows
        return sum(key not in known.keys for key in request.keys)
