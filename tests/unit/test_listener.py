"""Who listens announces itself until it is heard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving import TOKEN, WAIT_S, Recorder, announce
from transfer_queue.errors import CapacityExceeded
from transfer_queue.messages import Announce, Announced, Request
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket


class Full(Recorder):
    """Has no room for the first two announcements."""

    left = 2

    def submit(self, request: Request, ticket: Ticket) -> None:
        if isinstance(request, Announce) and self.left:
            self.left -= 1
            ticket.answer(CapacityExceeded("no room"))
        else:
            super().submit(request, ticket)


@pytest.mark.parametrize("transport", ["unix", "tcp"])
def test_an_announcement_that_is_refused_is_made_again(
    tmp_path: Path, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over the same connection; the first answer is what the one who waits for it gets."""
    monkeypatch.setattr("transfer_queue.wire.listener._PAUSE_S", 0.05)
    handler, received = Full(), list[Any]()
    with Server(handler, TOKEN, local_path=str(tmp_path / "s")) as server:
        peer = Peer.at(server.local_address if transport == "unix" else server.address, token=TOKEN, client_id="unit")
        with Listener(peer, announce(), received.append) as listener:
            handler.wait_for(lambda: handler.tickets)
            with pytest.raises(CapacityExceeded):
                listener.announced(WAIT_S)
            handler.wait_for(lambda: received)
        peer.close()
    assert [type(message) for message in received] == [Announced]
    assert handler.left == 0
