"""The storage units of a session, and where they listen."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from transfer_queue.errors import InvalidArgument
from transfer_queue.messages import UNIT_SHIFT, Announce, UnitInfo


@dataclass
class Unit:
    """One unit: where it is, and by which channel it listens (None: it did not come back since a restart)."""

    info: UnitInfo
    channel: Hashable | None


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
        """Raise for a block of a unit that never announced itself."""
        if block and block >> UNIT_SHIFT not in self._by_number:
            raise InvalidArgument(
                f"block {block} names storage unit {block >> UNIT_SHIFT}, which this session does not have"
            )

    def number_of(self, unit_id: str) -> int | None:
        """The number of a unit; None if it never announced itself."""
        unit = self._by_id.get(unit_id)
        return None if unit is None else unit.info.number

    def known_number(self, unit_id: str) -> int:
        """The same; raises for a unit that never announced itself."""
        number = self.number_of(unit_id)
        if number is None:
            raise InvalidArgument(f"storage unit {unit_id!r} has to announce itself first")
        return number

    def channel_of(self, number: int) -> Hashable | None:
        unit = self._by_number.get(number)
        return None if unit is None else unit.channel

    def announce(self, request: Announce, channel: Hashable | None) -> Unit:
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
        )
        if known is None:
            known = self._by_id[request.unit_id] = self._by_number[number] = Unit(info, channel)
        known.info, known.channel = info, channel
        return known
