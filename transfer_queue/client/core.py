"""What every operation of a client works with."""

from __future__ import annotations

from dataclasses import dataclass

from transfer_queue.client.transfer import Transfer
from transfer_queue.wire.peer import AnyPeer


@dataclass(frozen=True)
class ClientCore:
    """The connections and settings of one client."""

    client_id: str
    controller: AnyPeer
    transfer: Transfer
    layout: str
    allow_pickle: bool
