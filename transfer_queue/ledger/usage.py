"""What is held, by whom, and who has to wait for a limit. The rules are those of `ledger.limits`."""

from __future__ import annotations

import dataclasses
import heapq
import operator
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import CapacityExceeded
from transfer_queue.ledger.admissions import Admissions
from transfer_queue.ledger.limits import Claim, Limit, Limits, Shortage

Int64s: TypeAlias = NDArray[np.int64]

_SHOWN = 3


@dataclasses.dataclass(slots=True)
class _Part:
    """The share of a block in one partition: what it was, and how many of its cells are left."""

    cells: int
    size_bytes: int
    left: int

    def take(self, cells: int) -> int:
        """Take out some cells; return their share of the bytes. With the last one all bytes are taken."""
        before = self.size_bytes * self.left // self.cells
        self.left -= cells
        return before - self.size_bytes * self.left // self.cells


@dataclasses.dataclass(slots=True)
class _Block:
    producer: str
    parts: dict[str, _Part]  # by partition


class Usage:
    """What is held, by whom, and which limits have puts waiting for them."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._held: dict[Limit, int] = {}
        self._producers: dict[str, int] = {}
        self._owner = np.zeros(0, np.int32)  # [capacity] of a row: the number of its producer
        self._blocks: dict[int, _Block] = {}
        self.admissions = Admissions()
        self._lines: set[Limit] = set()
        self.room_made = False  # something was given back since `next_round`

    def __repr__(self) -> str:
        samples, size_bytes = (self.held(Limit("total", "", unit)) for unit in ("samples", "bytes"))
        return f"<Usage: {samples} samples, {size_bytes} bytes, {len(self.admissions)} admitted>"

    def held(self, limit: Limit) -> int:
        """What counts against a limit, whether or not it is set."""
        return self._held.get(limit, 0)

    # ------------------------------------------------------------ may it come in

    def left(self, partition: str | None, producer: str) -> dict[Limit, int]:
        """What the limits that are set leave this producer, in this partition if one is named."""
        holders = {"total": "", "partition": partition, "producer": producer}
        named = [(scope, holder) for scope, holder in holders.items() if holder is not None]
        limits = [Limit(scope, holder, unit) for unit in ("samples", "bytes") for scope, holder in named]
        bounds = ((limit, self.limits.of(limit)) for limit in limits)
        return {limit: max(bound - self.held(limit), 0) for limit, bound in bounds if bound is not None}

    def check(self, claim: Claim) -> None:
        """Raise `CapacityExceeded` for a put of new rows that is larger than a limit."""
        for limit, needed, allowed in self.limits.needed_by(claim) if claim.samples else ():
            if needed > allowed:
                raise CapacityExceeded(
                    f"a put of {needed} {limit.unit} exceeds the capacity: limits.{limit.name} is {allowed}, "
                    f"{needed - allowed} less; put fewer rows at once, or raise the limit",
                    limit=limit.name,
                    needed=needed,
                    allowed=allowed,
                )

    def obstacle(self, claim: Claim) -> str | None:
        """What keeps a put waiting; None: nothing."""
        short = self._shortages(claim)
        if short:
            return self._described(short[0])
        ahead = self._ahead(claim)
        return None if ahead is None else f"earlier puts wait for {_of_limit(ahead)}"

    def wait(self, claim: Claim) -> None:
        """A put waits: later ones that need the limits it waits for come after it, until `next_round`."""
        self._lines.update(shortage.limit for shortage in self._shortages(claim))

    def next_round(self) -> None:
        """All puts that wait are tried again, in order of arrival."""
        self._lines.clear()
        self.room_made = False

    def too_late(self, claim: Claim, waited_s: float) -> CapacityExceeded:
        """The error of a put that waited in vain."""
        short = self._shortages(claim)
        text = f"no capacity for {_amount(claim)} after {waited_s:.1f} s: {self.obstacle(claim)}"
        if not short:
            return CapacityExceeded(text)
        limit = short[0].limit
        return CapacityExceeded(
            text,
            limit=limit.name,
            needed=short[0].needed,
            held=short[0].held,
            allowed=short[0].allowed,
            excess=short[0].excess,
            partitions=dict(self._largest("partition", limit.unit)),
            producers=dict(self._largest("producer", limit.unit)),
        )

    # ------------------------------------------------------------ room kept for a put that is being written

    def admit(self, claim: Claim, now: float, client: str) -> int:
        """Keep room for a put of this client; returns what it has to come with."""
        self._count(claim, 1)
        return self.admissions.grant(claim, client, now)

    def use(self, admission: int, claim: Claim) -> bool:
        """The put comes, or is given up: the room is not kept any more. Returns whether it covers this claim."""
        room = self.admissions.take(admission)
        if room is None:
            return False
        self._count(room, -1)
        self.room_made = True  # also where it is what the put needs: it may yet be refused
        same = (room.partition, room.producer) == (claim.partition, claim.producer)
        return same and claim.samples <= room.samples and claim.size_bytes <= room.size_bytes

    def withdraw(self, admission: int) -> None:
        """The put will not come."""
        room = self.admissions.take(admission)
        if room is not None:
            self._count(room, -1)
            self.room_made = True

    def leave(self, client: str) -> None:
        """The client is gone: none of its puts will come."""
        for number in self.admissions.of_client(client):
            self.withdraw(number)

    def expire(self, now: float) -> bool:
        """End the admissions that are overdue; returns whether there were any."""
        overdue = self.admissions.overdue(now)
        for number in overdue:
            self.withdraw(number)
        return bool(overdue)

    # ------------------------------------------------------------ what is held

    def insert(self, partition: str, producer: str, rows: Int64s) -> None:
        """These slots hold new rows from now on."""
        if len(rows) == 0:
            return
        needed = int(rows.max()) + 1
        if needed > len(self._owner):
            grown = np.zeros(max(needed, 2 * len(self._owner), 1024), np.int32)
            grown[: len(self._owner)] = self._owner
            self._owner = grown
        self._owner[rows] = self._producers.setdefault(producer, len(self._producers))
        self._count(Claim(partition, producer, len(rows), 0), 1)

    def remove(self, partition: str, rows: Int64s) -> None:
        """These rows are gone. Their cells are told of by `free`."""
        self.room_made = True
        names = list(self._producers)
        numbers, counts = np.unique(self._owner[rows], return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            self._count(Claim(partition, names[number], count, 0), -1)

    def commit(self, block: int, producer: str, size_bytes: int, cells: Mapping[str, int]) -> None:
        """A block is in use; `cells`: how many point into it, by partition (each at least one)."""
        left, bytes_left = sum(cells.values()), size_bytes
        parts = {}
        for partition, count in cells.items():
            share = bytes_left * count // left
            left, bytes_left = left - count, bytes_left - share
            parts[partition] = _Part(count, share, count)
            self._count(Claim(partition, producer, 0, share), 1)
        self._blocks[block] = _Block(producer, parts)

    def free(self, partition: str, blocks: Int64s) -> None:
        """Cells of this partition do not point to these blocks any more, one entry per cell."""
        self.room_made = True
        distinct, counts = np.unique(blocks, return_counts=True)
        for block, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            known = self._blocks.get(block)
            if known is None:  # put before there were limits
                continue
            part = known.parts[partition]
            self._count(Claim(partition, known.producer, 0, part.take(count)), -1)
            if part.left == 0:
                del known.parts[partition]
            if not known.parts:
                del self._blocks[block]

    # ------------------------------------------------------------ keeping it

    def state(self) -> dict[str, Any]:
        """Everything held, as plain values; admissions are not kept, nor who waits."""
        blocks = [
            (
                block,
                known.producer,
                [(name, part.cells, part.size_bytes, part.left) for name, part in known.parts.items()],
            )
            for block, known in self._blocks.items()
        ]
        admitted: dict[Limit, int] = {}
        for claim in self.admissions.claims():
            for limit, amount in claim.amounts():
                admitted[limit] = admitted.get(limit, 0) + amount
        held = [(*limit, amount - admitted.get(limit, 0)) for limit, amount in self._held.items()]
        return {
            "held": sorted(entry for entry in held if entry[-1]),
            "producers": list(self._producers),
            "owner": self._owner.astype(np.int64),
            "blocks": blocks,
        }

    def begin_with(self, partitions: Mapping[str, Int64s]) -> None:
        """Nothing is known but which rows each partition has: they count as samples, of nobody, and without bytes."""
        self.load({"held": (), "producers": (), "owner": np.zeros(0, np.int64), "blocks": ()})
        for partition, rows in partitions.items():
            self.insert(partition, "", rows)

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, in place of what is held."""
        self._held = {Limit(scope, holder, unit): amount for scope, holder, unit, amount in state["held"]}
        self._producers = {name: number for number, name in enumerate(state["producers"])}
        self._owner = np.array(state["owner"], np.int32)
        self._blocks = {
            block: _Block(producer, {name: _Part(*part) for name, *part in parts})
            for block, producer, parts in state["blocks"]
        }
        self.admissions.clear()
        self._lines = set()

    # ------------------------------------------------------------ inside

    def _count(self, claim: Claim, sign: int) -> None:
        for limit, amount in claim.amounts():
            held = self._held.get(limit, 0) + sign * amount
            if held:
                self._held[limit] = held
            else:
                del self._held[limit]

    def _shortages(self, claim: Claim) -> list[Shortage]:
        if not claim.samples:
            return []
        needed = ((limit, amount, self.held(limit), bound) for limit, amount, bound in self.limits.needed_by(claim))
        return [Shortage(*entry) for entry in needed if entry[1] + entry[2] > entry[3]]

    def _ahead(self, claim: Claim) -> Limit | None:
        if not self._lines or not claim.samples:
            return None
        return next((limit for limit, _, _ in self.limits.needed_by(claim) if limit in self._lines), None)

    def _described(self, short: Shortage) -> str:
        unit = short.limit.unit
        holders = [_listed("partition", self._largest("partition", unit))]
        holders.append(_listed("client", self._largest("producer", unit)))
        return (
            f"{_of_limit(short.limit)} is {short.allowed}, of which {short.held} are held, and {short.needed} are "
            f"needed: {short.excess} too many ({'; '.join(filter(None, holders))})"
        )

    def _largest(self, scope: str, unit: str) -> list[tuple[str, int]]:
        """Who holds most."""
        amounts = ((key.holder, held) for key, held in self._held.items() if (key.scope, key.unit) == (scope, unit))
        return heapq.nlargest(_SHOWN, amounts, key=operator.itemgetter(1))


def _of_limit(limit: Limit) -> str:
    whose = f" of {limit.holder!r}" if limit.holder else ""
    return f"limits.{limit.name}{whose}"


def _amount(claim: Claim) -> str:
    return f"{claim.samples} samples ({claim.size_bytes} bytes) in partition {claim.partition!r}"


def _listed(kind: str, largest: list[tuple[str, int]]) -> str:
    return ", ".join(f"{kind} {name!r} holds {held}" for name, held in largest)
