"""The storage units of a session, and where they listen."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

from transfer_queue.errors import CapacityExceeded, InvalidArgument
from transfer_queue.ledger.blocks import BlockBook
from transfer_queue.messages import UNIT_SHIFT, Announce, UnitInfo

_FIELDS = tuple(field.name for field in fields(UnitInfo))
_MOST_NUMBERS = (1 << 63 - UNIT_SHIFT) - 1
_LISTEN_S = 2.0
"""How long a unit that is overdue is listened for: it may have announced itself while the controller did not run."""


@dataclass
class Unit:
    """One unit: where it is, by which channel it listens, and since when it does not (None: it does).

    life     names its index; one that comes back with another has nothing of what it stored
    overdue  it is away for so long that it would be given up, if it had been listened for meanwhile
    """

    info: UnitInfo
    life: str
    channel: Hashable | None
    client: str = ""  # its name on the wire
    away_since: float | None = None
    overdue: bool = False


class UnitBook:
    """Units by number, which is part of the id of each of their blocks.

    A unit that returns under its id with its index keeps its number. One that returns without it gets the next number,
    and nobody ever has the old one again: its blocks are not mistaken for those of before. Whose data counts as lost
    because they are away for too long, `blocks` knows.
    """

    def __init__(self, blocks: BlockBook) -> None:
        self._blocks = blocks
        self._by_id: dict[str, Unit] = {}
        self._by_number: dict[int, Unit] = {}
        self._numbers = 0  # given out so far

    def __len__(self) -> int:
        return len(self._by_id)

    def infos(self) -> tuple[UnitInfo, ...]:
        return tuple(unit.info for unit in self._by_id.values())

    def check(self, block: int) -> None:
        """Raise `InvalidArgument` for a block of a unit that never announced itself, `BlockLost` for a lost one."""
        number = block >> UNIT_SHIFT
        if block and not 1 <= number <= self._numbers:
            raise InvalidArgument(f"block {block} names storage unit {number}, which this session does not have")
        self._blocks.refused.check(block)

    def check_current(self, number: int) -> None:
        """Raise for a number that no unit has, or that it has no longer."""
        if number not in self._by_number:
            raise InvalidArgument(f"no storage unit has number {number} now")

    def number_of(self, unit_id: str) -> int | None:
        """The number of a unit; None if it never announced itself."""
        unit = self._by_id.get(unit_id)
        return None if unit is None else unit.info.number

    def leave(self, client: str, now: float) -> None:
        """A client is gone; if it was a unit, that does not listen any more."""
        for unit in self._by_id.values():
            if unit.client == client and unit.away_since is None:
                unit.channel, unit.away_since = None, now

    def all_away(self, now: float) -> None:
        """The controller was started again: no unit listens until it announces itself."""
        for unit in self._by_id.values():
            unit.channel, unit.away_since = None, now

    def away_anew(self, now: float) -> None:
        """Units that are away could not come back until now."""
        for unit in self._by_id.values():
            if unit.away_since is not None:
                unit.away_since, unit.overdue = now, False

    def refused(self, request: Announce, now: float) -> None:
        """A unit could not be let in now: one that has its index is there nevertheless, and will try again."""
        unit = self._by_id.get(request.unit_id)
        if unit is not None and self.returns(request) and unit.away_since is not None:
            unit.away_since, unit.overdue = now, False

    def overdue(self, now: float, return_s: float) -> list[Unit]:
        """Units, not given up before, that are away for `return_s`, and for `_LISTEN_S` after that was seen."""
        late = []
        for unit in self._away():
            if unit.away_since is None or unit.away_since > now - return_s:
                continue
            if unit.overdue:
                late.append(unit)
            else:
                unit.away_since, unit.overdue = now - return_s + _LISTEN_S, True
        return late

    def away_since(self) -> float | None:
        """Since when the unit is away that left first, of those not given up."""
        return min((unit.away_since for unit in self._away() if unit.away_since is not None), default=None)

    def _away(self) -> list[Unit]:
        away = (unit for unit in self._by_id.values() if unit.away_since is not None)
        return [unit for unit in away if not self._blocks.given_up(unit.info.number)]

    def state(self) -> dict[str, Any]:
        """All units as plain values, for `load`."""
        units = [[unit.life, *(getattr(unit.info, name) for name in _FIELDS)] for unit in self._by_id.values()]
        return {"numbers": self._numbers, "units": units}

    def load(self, state: dict[str, Any]) -> None:
        """Know the units that another book knew; they listen nowhere until they announce themselves."""
        self._numbers = state["numbers"]
        for life, *values in state["units"]:
            info = UnitInfo(**dict(zip(_FIELDS, values, strict=True)))
            self._by_id[info.unit_id] = self._by_number[info.number] = Unit(info, life, None)

    def channel_of(self, number: int) -> Hashable | None:
        unit = self._by_number.get(number)
        return None if unit is None else unit.channel

    def replaced_by(self, request: Announce) -> int | None:
        """The number that a unit has until it announces itself like this: without the index that it had."""
        known = self._by_id.get(request.unit_id)
        return None if known is None or known.life == request.life else known.info.number

    def returns(self, request: Announce) -> bool:
        """Whether a unit that is known has what it had."""
        known = self._by_id.get(request.unit_id)
        return known is not None and known.life == request.life

    def announce(self, request: Announce, channel: Hashable | None, client: str = "") -> Unit:
        """Note that a unit listens at `channel`. Raises `CapacityExceeded` if there are no numbers left."""
        known = self._by_id.get(request.unit_id)
        if known is not None and self.returns(request):
            number = known.info.number
        elif self._numbers < _MOST_NUMBERS:
            number = self._numbers = self._numbers + 1
        else:
            raise CapacityExceeded(f"all {_MOST_NUMBERS} numbers for storage units are used up")
        info = UnitInfo(
            number=number,
            unit_id=request.unit_id,
            address=request.address,
            local_address=request.local_address,
            folder=request.folder,
            nonce=request.nonce,
            curve_key=request.curve_key,
        )
        if known is not None:
            del self._by_number[known.info.number]
        unit = self._by_id[request.unit_id] = self._by_number[number] = Unit(info, request.life, channel, client)
        return unit
