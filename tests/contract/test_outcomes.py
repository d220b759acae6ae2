"""The answer of the controller gets lost: what the call did is learnt by asking again, and done once."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.contract.relay import Relay
from transfer_queue import TransferQueueClient
from transfer_queue.client.client import SocketConnector
from transfer_queue.errors import ConnectionLost, LeaseExpired
from transfer_queue.messages import UnitInfo
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.peer import AnyPeer

WAIT_S = 20.0


class Relayed:
    """Reaches the controller through a relay, and gives up soon; units as ever."""

    def __init__(self, runtime: Any, relay: Relay) -> None:
        self._info = runtime.info
        self._relay = relay

    def controller(self, client_id: str) -> AnyPeer:
        address = f"tcp://127.0.0.1:{self._relay.port}"
        return Peer("", "", "", address, token=self._info.token, client_id=client_id, grace_s=0.3)

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer:
        return SocketConnector(self._info).unit(client_id, info)


@pytest.fixture
def relay(embedded_queue: Any) -> Iterator[Relay]:
    with Relay(embedded_queue.info.ports["request"]) as made:
        yield made


@pytest.fixture
def observer(embedded_queue: Any) -> Iterator[TransferQueueClient]:
    with TransferQueueClient("observer", embedded_queue.info, connector=embedded_queue) as made:
        yield made


@pytest.fixture
def partition(observer: TransferQueueClient) -> Iterator[str]:
    yield "outcomes"
    observer.clear_partition("outcomes")


@pytest.fixture(params=["blocking", "awaitable"])
def call(embedded_queue: Any, relay: Relay, request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """Calls a method of a client behind the relay, by name."""
    with TransferQueueClient("caller", embedded_queue.info, connector=Relayed(embedded_queue, relay)) as client:

        def make(name: str, *args: Any, **kwargs: Any) -> Any:
            made = getattr(client, name if request.param == "blocking" else f"async_{name}")(*args, **kwargs)
            return asyncio.run(made) if inspect.iscoroutine(made) else made

        make("storage_infos")
        yield make


def lose(relay: Relay, call: Callable[..., Any], *args: Any, **kwargs: Any) -> ConnectionLost:
    """Call while answers get lost; then the connection breaks."""
    relay.deaf = True
    with pytest.raises(ConnectionLost) as caught:
        call(*args, **kwargs)
    relay.cut()
    return caught.value


def again(call: Callable[..., Any], error: ConnectionLost) -> Any:
    """Ask until the connection is back."""
    for _ in range(20):
        try:
            return call("resend", error)
        except ConnectionLost as lost:
            error = lost
    raise error


def test_a_put_whose_answer_got_lost(relay: Relay, call: Any, observer: TransferQueueClient, partition: str) -> None:
    """It is there once; its handle comes when asked again, and is good for all that follows."""
    call("put", {"x": torch.arange(2)}, partition_id=partition)
    error = lose(relay, call, "put", {"x": torch.arange(2, 6)}, partition_id=partition, timeout=0.1)
    assert observer.audit(partition)["partitions"][partition]["inserted"] == 6
    meta = again(call, error)
    assert meta.size == 4
    call("put", {"y": torch.arange(4)}, metadata=meta)
    assert call("get_data", meta)["x"].tolist() == [2, 3, 4, 5]
    assert observer.audit(partition)["partitions"][partition]["inserted"] == 6


def test_a_refusal_that_got_lost(relay: Relay, call: Any, observer: TransferQueueClient, partition: str) -> None:
    """It comes when asked again; nothing was written, and the space is back."""
    meta = call("put", {"x": torch.arange(2)}, partition_id=partition)
    held = meta.copy()
    observer.clear_samples(meta)
    error = lose(relay, call, "put", {"y": torch.arange(2)}, metadata=held, timeout=0.1)
    with pytest.raises(KeyError, match="cleared"):
        again(call, error)
    assert held.field_names == ["x"]


def test_settling_whose_answer_got_lost(relay: Relay, call: Any, observer: TransferQueueClient, partition: str) -> None:
    """The number is that of the first time."""
    observer.put({"x": torch.arange(4)}, partition_id=partition)
    meta = call("get_meta", ["x"], 4, partition, task_name="t", lease=60)
    head, tail = meta.chunk(2)
    assert again(call, lose(relay, call, "ack", head, timeout=0.1)) == 2
    assert again(call, lose(relay, call, "release", tail, timeout=0.1)) == 2
    with pytest.raises(LeaseExpired):
        call("ack", tail)
    account = observer.audit(partition)["partitions"][partition]["tasks"]["t"]
    assert (account["consumed"], account["reserved"], account["pending"]) == (2, 0, 2)


def test_a_draw_whose_answer_got_lost(relay: Relay, call: Any, observer: TransferQueueClient, partition: str) -> None:
    """No sample is lost with it: they are drawn when asked again, or by others."""
    observer.put({"x": torch.arange(4)}, partition_id=partition)
    error = lose(relay, call, "get_meta", ["x"], 2, partition, task_name="t", timeout=0.1)
    first = again(call, error)
    second = observer.get_meta(["x"], 2, partition, task_name="t", timeout=WAIT_S)
    assert sorted(first.global_indexes + second.global_indexes) == sorted(
        observer.get_meta([], 1, partition, mode="force_fetch").global_indexes
    )
