"""Questions about the state are not waited for as long as work is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving import TOKEN, Recorder
from transfer_queue import TransferQueueClient
from transfer_queue.client import status
from transfer_queue.errors import ConnectionLost, InvalidArgument
from transfer_queue.messages import Request, UnitInfo
from transfer_queue.metadata import Role, ZMQServerInfo
from transfer_queue.wire.channel import GRACE_S, Peer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket

CALLS: dict[str, Callable[..., Any]] = {
    "audit": lambda client, **more: client.audit(**more),
    "admission": lambda client, **more: client.admission(**more),
    "explain": lambda client, **more: client.explain("p", "t", ["x"], **more),
    "get_production_status": lambda client, **more: client.get_production_status(["x"], "p", **more),
    "get_consumption_status": lambda client, **more: client.get_consumption_status("t", "p", **more),
    "check_production_status": lambda client, **more: client.check_production_status(["x"], "p", **more),
    "check_consumption_status": lambda client, **more: client.check_consumption_status("t", "p", **more),
}


class Silent(Recorder):
    """All its replies get lost."""

    def submit(self, request: Request, ticket: Ticket) -> None:
        with self.changed:
            self.requests.append(request)


class Near:
    """Reaches a server at a known address, and allows little time for the way."""

    def __init__(self, address: str) -> None:
        self.peer = Peer.at(address, token=TOKEN, client_id="c", grace_s=0.05)

    def controller(self, client_id: str) -> AnyPeer:
        return self.peer

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer:
        raise AssertionError("no unit is asked")


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TransferQueueClient]:
    info = ZMQServerInfo(Role.CONTROLLER, "c", "127.0.0.1", {"request": 1}, token=TOKEN)
    server = Server(Silent(), TOKEN, local_path=str(tmp_path / "socket"), tcp_host=None)
    with server, TransferQueueClient("c", info, connector=Near(server.local_address)) as client:
        yield client


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_lost_reply_costs_the_timeout_and_no_more(client: TransferQueueClient, call: Callable[..., Any]) -> None:
    begin = time.monotonic()
    with pytest.raises(ConnectionLost, match="got no reply"):
        call(client, timeout=0.05)
    assert time.monotonic() - begin < 5.0
    with pytest.raises(InvalidArgument, match="timeout"):
        call(client, timeout=-1.0)


def test_by_default_it_is_bounded_well_below_that_of_work(client: TransferQueueClient) -> None:
    """Twenty seconds, and five for the way: a controller that is started again is back by then."""
    step: Any = next(status.audit(client._core))
    assert (step.timeout_s, GRACE_S) == (20.0, 5.0)
