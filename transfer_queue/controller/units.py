"""The storage units of a session, and where they listen."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Any

from transfer_queue.errors import InvalidArgument, LeaseExpired
from transfer_queue.messages import UNIT_SHIFT, Announce, UnitInfo

_FIELDS = tuple(field.name for field in fields(UnitInfo))


@dataclass
class Unit:
    """One unit: where it is, by which channel it listens, and since when it does not (None: it does).

    given_up   it was away for so long that its data counts as lost
    """

    info: UnitInfo
    channel: Hashable | None
    client: str = ""  # its name on the wire
    away_since: float | None = None
    given_up: bool = False


class UnitBook:
    """Units by number. A unit that returns under its id keeps its number."""

    def __init__(self) -> None:
        self._by_id: dict[str, Unit] = {}
        self._by_number: dict[int, Unit] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def infos(self) -> tuple[UnitInfo, ...]:
        return tuple(unit.info for unit in self._by_id.values())

    def check(self, block: int) -> None:
        """Raise for a block of a unit that never announced itself, or that was given up."""
        if not block:
            return
        number = block >> UNIT_SHIFT
        unit = self._by_number.get(number)
        if unit is None:
            raise InvalidArgument(f"block {block} names storage unit {number}, which this session does not have")
        if unit.given_up:
            raise LeaseExpired(
                f"storage unit {unit.info.unit_id!r} was given up while block {block} was written to it: put again"
            )

    def number_of(self, unit_id: str) -> int | None:
        """The number of a unit; None if it never announced itself."""
        unit = self._by_id.get(unit_id)
        return None if unit is None else unit.info.number

    def leave(self, client: str, now: float) -> None:
        """A client is gone; if it was a unit, that does not listen any more."""
        for unit in self._by_id.values():
            if unit.client == client and unit.away_since is None:
                unit.channel, unit.away_since = None, now

    def agree(self, number: int) -> None:
        """A unit says what it holds: its data counts again."""
        if number in self._by_number:
            self._by_number[number].given_up = False

    def all_away(self, now: float) -> None:
        """The controller was started again: no unit listens until it announces itself."""
        for unit in self._by_id.values():
            unit.channel, unit.away_since = None, now

    def overdue(self, before: float) -> list[Unit]:
        """Units that are away since `before` or longer and were not given up."""
        return [unit for unit in self._away() if unit.away_since is not None and unit.away_since <= before]

    def away_since(self) -> float | None:
        """Since when the unit is away that left first, of those not given up."""
        return min((unit.away_since for unit in self._away() if unit.away_since is not None), default=None)

    def _away(self) -> list[Unit]:
        return [unit for unit in self._by_id.values() if unit.away_since is not None and not unit.given_up]

    def state(self) -> list[Any]:
        """All units as plain values, for `load`."""
        return [[unit.given_up, *(getattr(unit.info, name) for name in _FIELDS)] for unit in self._by_id.values()]

    def load(self, state: list[Any]) -> None:
        """Know the units that another book knew; they listen nowhere until they announce themselves."""
        for given_up, *values in state:
            info = UnitInfo(**dict(zip(_FIELDS, values, strict=True)))
            self._by_id[info.unit_id] = self._by_number[info.number] = Unit(info, None, given_up=given_up)

    def channel_of(self, number: int) -> Hashable | None:
        unit = self._by_number.get(number)
        return None if unit is None else unit.channel

    def announce(self, request: Announce, channel: Hashable | None, client: str = "") -> Unit:
        """Note that a unit listens at `channel`."""
        known = self._by_id.get(request.unit_id)
        number = len(self._by_id) + 1 if known is None else known.info.number
        info = UnitInfo(
            number=number,
            unit_id=request.unit_id,
            address=request.address,
            local_address=request.local_address,
            folder=request.folder,
            nonce=request.nonce,
            curve_key=request.curve_key,
        )
        if known is None:
            known = self._by_id[request.unit_id] = self._by_number[number] = Unit(info, channel)
        known.info, known.channel, known.client, known.away_since = info, channel, client, None
        return known
