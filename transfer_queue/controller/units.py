"""The storage units of a session, and what each of them still has to be told."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger.blocks import Freed
from transfer_queue.messages import UNIT_SHIFT, Announce, FreeBlocks, UnitInfo

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass
class Unit:
    """One unit: where it is, by which channel it listens, and frees that it has not confirmed."""

    info: UnitInfo
    channel: Hashable
    sequence: int = 0
    unconfirmed: list[FreeBlocks] = field(default_factory=list)

    def done(self, sequence: int) -> bool:
        """Whether the unit confirmed this order."""
        return not self.unconfirmed or self.unconfirmed[0].sequence > sequence


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

    def announce(self, request: Announce, channel: Hashable) -> Unit:
        """Note that a unit listens at `channel`; its unconfirmed frees are due again."""
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

    def free(self, number: int, freed: Freed) -> tuple[Unit, FreeBlocks]:
        """Write down what a unit may reuse; kept until it confirms."""
        unit = self._by_number[number]
        unit.sequence += 1
        order = FreeBlocks(
            sequence=unit.sequence,
            blocks=np.array(freed.blocks, dtype=np.int64),
            partial_blocks=np.concatenate([_NOTHING, *freed.partial_blocks]),
            partial_slots=np.concatenate([_NOTHING, *freed.partial_slots]),
        )
        unit.unconfirmed.append(order)
        return unit, order

    def confirm(self, unit_id: str, sequence: int) -> None:
        """The unit did everything up to `sequence`."""
        unit = self._by_id.get(unit_id)
        if unit is not None:
            unit.unconfirmed = [order for order in unit.unconfirmed if order.sequence > sequence]
