"""The controller's part of checkpoints: the state at one moment, held still for whoever copies the blocks it names."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import DecodeError, InvalidArgument, LeaseExpired, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.messages import UNIT_SHIFT, CutDone, Restore
from transfer_queue.wire.codec import pack_value, unpack_value
from transfer_queue.wire.ticket import Ticket

FORMAT = 2

Int64s: TypeAlias = NDArray[np.int64]

_FRAME_BYTES = 8 << 20


@dataclass(frozen=True)
class _Hold:
    client: str
    request_id: int
    until: float
    blocks: Int64s  # of the cut


class Cuts:
    """The cuts that are being copied. Used under the controller's lock."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._holds: dict[int, _Hold] = {}

    def begin(self, ticket: Ticket, hold_s: float, now: float) -> None:
        """Answer with the state of now. Copying it holds up the queue, making bytes of it does not.

        One request holds one cut: where it comes again, nobody got the answer of before.
        """
        self._keep_but(lambda hold: (hold.client, hold.request_id) == (ticket.client_id, ticket.request_id))
        number = 1 + secrets.randbits(62)  # none that an earlier life of the controller gave out
        state = self._ledger.state()
        self._holds[number] = _Hold(
            ticket.client_id, ticket.request_id, now + hold_s, state["rows"]["blocks"]["blocks"]
        )
        self._ledger.blocks.copied = True
        threading.Thread(
            target=_answer, args=(ticket, number, state), name="transfer_queue checkpoint", daemon=True
        ).start()

    def keep(self, number: int, hold_s: float, now: float) -> None:
        """The cut was held until now and is for so long from now. Raises `LeaseExpired` if it was not."""
        hold = self._holds.get(number)
        if hold is None:
            raise LeaseExpired(
                "the cut of this checkpoint is not held any more, because the controller or a storage unit was started "
                "again, or the controller took its holder for dead: what was copied may have been overwritten "
                "meanwhile; save again"
            )
        self._holds[number] = replace(hold, until=max(hold.until, now + hold_s))

    def clients(self) -> set[str]:
        """Who holds any."""
        return {hold.client for hold in self._holds.values()}

    def end(self, number: int) -> bool:
        """The blocks of a cut were copied; return whether anything may be reused again."""
        self._holds.pop(number, None)
        return self._settle()

    def end_of(self, client: str) -> bool:
        """The same for all cuts of a client that is gone."""
        return self._end(lambda hold: hold.client == client)

    def end_of_request(self, client: str, request_id: int) -> bool:
        """The same for a cut whose answer nobody gets."""
        return self._end(lambda hold: (hold.client, hold.request_id) == (client, request_id))

    def end_at(self, unit: int) -> bool:
        """The same for cuts of which a unit has blocks: it hears what it may reuse without being told to."""
        return self._end(lambda hold: bool((hold.blocks >> UNIT_SHIFT == unit).any()))

    def end_with(self, blocks: Int64s) -> bool:
        """The same for cuts that have any of these blocks: their unit reuses them."""
        return self._end(lambda hold: bool(np.isin(blocks, hold.blocks).any()))

    def end_overdue(self, now: float) -> bool:
        """The same for cuts that were held for too long."""
        return self._end(lambda hold: hold.until <= now)

    def next_deadline(self) -> float | None:
        return min((hold.until for hold in self._holds.values()), default=None)

    def _end(self, which: Callable[[_Hold], bool]) -> bool:
        self._keep_but(which)
        return self._settle()

    def _keep_but(self, which: Callable[[_Hold], bool]) -> None:
        self._holds = {number: hold for number, hold in self._holds.items() if not which(hold)}

    def _settle(self) -> bool:
        ended = self._ledger.blocks.copied and not self._holds
        if ended:
            self._ledger.blocks.copied = False
        return ended


def restore(ledger: Ledger, request: Restore) -> int:
    """Replace the state of a ledger by that of a checkpoint; returns its number of samples, raises with no change."""
    try:
        state = unpack_value(b"".join(map(bytes, request.state)))
        if state["format"] != FORMAT:
            raise InvalidArgument(f"the checkpoint has format {state['format']}, this version reads {FORMAT}")
        return ledger.replace(state["ledger"], request.old, request.new)
    except InvalidArgument:
        raise
    except (TransferQueueError, KeyError, TypeError, ValueError, IndexError, AssertionError) as error:
        raise DecodeError(f"this is not the state of a checkpoint, or it is damaged: {error!r}") from error


def _answer(ticket: Ticket, number: int, state: dict[str, Any]) -> None:
    partitions = state["rows"]["partitions"]
    try:
        data = memoryview(pack_value({"format": FORMAT, "ledger": state}))
    except TransferQueueError as error:  # something that a user's sampler or tag holds
        ticket.answer(error)
        return
    ticket.answer(
        CutDone(
            hold=number,
            samples=sum(int(np.count_nonzero(partition["indexes"] >= 0)) for partition in partitions),
            blocks=state["rows"]["blocks"]["blocks"],
            state=tuple(_pieces(data)),
        )
    )


def _pieces(data: memoryview) -> Sequence[memoryview]:
    return [data[at : at + _FRAME_BYTES] for at in range(0, len(data), _FRAME_BYTES)]
