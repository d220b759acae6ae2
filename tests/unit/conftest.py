"""Servers, peers and storage units that tests of several files ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.asking_unit import MIB
from tests.unit.returning_unit import ReturningUnit
from tests.unit.serving import TOKEN, BareClient, MakePeer, Recorder
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server


@pytest.fixture
def handler() -> Recorder:
    return Recorder()


@pytest.fixture
def server(handler: Recorder, tmp_path: Path) -> Iterator[Server]:
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as running:
        yield running


@pytest.fixture(params=["unix", "tcp"])
def address(server: Server, request: pytest.FixtureRequest) -> str:
    return server.local_address if request.param == "unix" else server.address


@pytest.fixture
def client(address: str) -> Iterator[BareClient]:
    with BareClient(address) as bare:
        yield bare.introduce()


@pytest.fixture(params=["unix", "tcp", "local"])
def make_peer(handler: Recorder, server: Server, request: pytest.FixtureRequest) -> Iterator[MakePeer]:
    with contextlib.ExitStack() as closing:

        def make(client_id: str = "client", grace_s: float = 5.0) -> AnyPeer:
            peer: AnyPeer
            if request.param == "local":
                peer = LocalPeer(handler, client_id, grace_s=grace_s)
            else:
                address = server.local_address if request.param == "unix" else server.address
                peer = Peer.at(address, token=TOKEN, client_id=client_id, grace_s=grace_s)
            closing.callback(peer.close)
            return peer

        yield make


@pytest.fixture
def peer(make_peer: MakePeer) -> AnyPeer:
    return make_peer()


@pytest.fixture
def socket_peer(server: Server) -> Iterator[Peer]:
    made = Peer.at(server.local_address, token=TOKEN, client_id="client")
    yield made
    made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a server, in shared memory."""
    with ServerFolder("test") as created:
        yield created.path


@pytest.fixture
def unit(folder: Path) -> Iterator[ReturningUnit]:
    with contextlib.closing(ReturningUnit(folder, capacity_bytes=4 * MIB, arena_bytes=MIB)) as made:
        yield made
