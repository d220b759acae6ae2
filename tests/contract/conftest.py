"""One suite, every way to reach a queue: in process, by Unix socket, by TCP, in Ray actors; blocking and awaitable."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from transfer_queue import TransferQueueClient
from transfer_queue.config import merged, settings
from transfer_queue.metadata import ZMQServerInfo

CAPACITY_BYTES = 64 << 20
ROUTES = ["in_process", "unix", "tcp", "ray", "ray_tcp"]
_partitions = itertools.count()


class AwaitableFace:
    """Calls `async_x` for every `x`, each call in an event loop of its own."""

    def __init__(self, client: TransferQueueClient) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, f"async_{name}")
        return lambda *args, **kwargs: asyncio.run(method(*args, **kwargs))


@pytest.fixture(scope="session")
def embedded_queue() -> Iterator[Any]:
    """A controller and a unit in this process."""
    from transfer_queue.runtime.embedded import EmbeddedRuntime

    storage = {"capacity_bytes": CAPACITY_BYTES}
    runtime = EmbeddedRuntime(settings(merged({"runtime": "embedded", "backend": {"SimpleStorage": storage}})))
    yield runtime
    runtime.close()


@pytest.fixture(scope="session")
def ray_queue(ray_session: Any) -> Iterator[ZMQServerInfo]:
    """A controller and a unit made by hand as actors, as the package shows it."""
    from transfer_queue import SimpleStorageUnit, TransferQueueController

    controller = TransferQueueController.remote()
    info = ray_session.get(controller.get_zmq_server_info.remote())
    unit = SimpleStorageUnit.remote(controller_info=info, capacity_bytes=CAPACITY_BYTES)
    ray_session.get(unit.get_info.remote())
    yield info
    ray_session.get([unit.shutdown.remote(), controller.shutdown.remote()])


@pytest.fixture(params=[pytest.param(r, marks=pytest.mark.ray if r.startswith("ray") else ()) for r in ROUTES])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., TransferQueueClient]]:
    """Makes clients of a queue that is reached by the route under test."""
    clients: list[TransferQueueClient] = []
    if request.param.startswith("ray"):
        info, connector = request.getfixturevalue("ray_queue"), None
    else:
        runtime = request.getfixturevalue("embedded_queue")
        info, connector = runtime.info, runtime if request.param == "in_process" else None

    def make(name: str = "tester", **options: Any) -> TransferQueueClient:
        transport = "tcp" if request.param.endswith("tcp") else "auto"
        clients.append(TransferQueueClient(name, info, transport=transport, connector=connector, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


@pytest.fixture
def client(connect: Callable[..., TransferQueueClient]) -> TransferQueueClient:
    return connect()


@pytest.fixture(params=["blocking", "awaitable"])
def queue(request: pytest.FixtureRequest, client: TransferQueueClient) -> Any:
    """The client by one of its two faces."""
    return client if request.param == "blocking" else AwaitableFace(client)


@pytest.fixture
def partition(client: TransferQueueClient) -> Iterator[str]:
    """A partition name that no other test uses; cleared afterwards."""
    name = f"p{next(_partitions)}"
    yield name
    client.clear_partition(name)
