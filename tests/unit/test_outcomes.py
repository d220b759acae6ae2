"""Calls whose connection broke: sent again under their id, they end as they would have, and nothing is done twice."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.serving import TOKEN, Recorder, drawn, put_done
from transfer_queue import TransferQueueClient
from transfer_queue.errors import ConnectionLost, InvalidArgument, StaleSampleError, WrongType
from transfer_queue.messages import Draw, Request, UnitInfo
from transfer_queue.metadata import BatchMeta, Role, ZMQServerInfo
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket

NOWHERE = ZMQServerInfo(Role.CONTROLLER, "controller", "127.0.0.1", {"request": 1})


class Impatient:
    """Connects clients that give up after a moment."""

    def __init__(self, handler: Recorder, address: str | None) -> None:
        self.handler = handler
        self.address = address

    def controller(self, client_id: str) -> AnyPeer:
        if self.address is None:
            return LocalPeer(self.handler, client_id, grace_s=0.0)
        return Peer.at(self.address, token=TOKEN, client_id=client_id, grace_s=0.05)

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer:
        raise AssertionError("no data is put here")


class SlowAtFirst(Recorder):
    """Lets puts and draws wait; once it is ready, draws are served."""

    def __init__(self) -> None:
        super().__init__()
        self.park_puts = True
        self.ready = False

    def submit(self, request: Request, ticket: Ticket) -> None:
        super().submit(request, ticket)
        if isinstance(request, Draw) and self.ready:
            ticket.answer(drawn(5))


@pytest.fixture
def handler() -> SlowAtFirst:
    return SlowAtFirst()


@pytest.fixture(params=["socket", "local"])
def client(handler: Recorder, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[TransferQueueClient]:
    if request.param == "local":
        with TransferQueueClient("client", NOWHERE, connector=Impatient(handler, None)) as made:
            yield made
        return
    with (
        Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as server,
        TransferQueueClient("client", NOWHERE, connector=Impatient(handler, server.local_address)) as made,
    ):
        yield made


@pytest.fixture(params=["blocking", "awaitable"])
def call(client: TransferQueueClient, request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Calls a method by its name."""
    prefix = "" if request.param == "blocking" else "async_"

    def make(name: str, *args: Any, **kwargs: Any) -> Any:
        made = getattr(client, prefix + name)(*args, **kwargs)
        return asyncio.run(made) if inspect.iscoroutine(made) else made

    return make


def lose_put(call: Callable[..., Any]) -> ConnectionLost:
    with pytest.raises(ConnectionLost) as caught:
        call("put", keys=["k"], partition_id="p", timeout=0.0)
    assert isinstance(caught.value.details["request_id"], int)
    return caught.value


def again(call: Callable[..., Any], error: ConnectionLost) -> Any:
    """Ask until the answer comes in time, however busy the machine is."""
    for _ in range(100):
        try:
            return call("resend", error)
        except ConnectionLost as lost:
            error = lost
    raise error


def test_a_put_that_was_done(handler: Recorder, call: Callable[..., Any]) -> None:
    """Its result comes with the second asking; it was done once, and is settled then."""
    error = lose_put(call)
    handler.tickets[0].answer(put_done(7))
    meta = again(call, error)
    assert isinstance(meta, BatchMeta)
    assert (meta.global_indexes, meta.keys) == ([7], ["k"])
    assert handler.puts == 1
    with pytest.raises(InvalidArgument, match="left no outcome open"):
        call("resend", error)


def test_a_put_that_was_refused(handler: Recorder, call: Callable[..., Any]) -> None:
    """Its error comes with the second asking."""
    error = lose_put(call)
    handler.tickets[0].answer(StaleSampleError("gone", indexes=[3]))
    with pytest.raises(StaleSampleError, match="gone"):
        again(call, error)


def test_lost_again(handler: Recorder, call: Callable[..., Any]) -> None:
    """Each `ConnectionLost` can be asked about in turn."""
    error = lose_put(call)
    with pytest.raises(ConnectionLost) as caught:
        call("resend", error)
    assert caught.value.details["request_id"] == error.details["request_id"]
    handler.tickets[0].answer(put_done(7))
    assert again(call, caught.value).global_indexes == [7]
    assert handler.puts == 1


def test_a_draw_is_made_anew(handler: SlowAtFirst, call: Callable[..., Any]) -> None:
    """What nobody got was given back; asked again, the draw is served."""
    with pytest.raises(ConnectionLost) as caught:
        call("get_meta", ["x"], 1, "p", task_name="t", timeout=0.0)
    handler.wait_for(lambda: len(handler.lost_replies) == 1)
    handler.ready = True
    assert again(call, caught.value).global_indexes == [5]


def test_errors_that_leave_nothing_open(client: TransferQueueClient, call: Callable[..., Any]) -> None:
    """Those of others, and of calls that change nothing."""
    with pytest.raises(WrongType, match="takes the ConnectionLost"):
        call("resend", ValueError("x"))
    for error in (ConnectionLost("no id"), ConnectionLost("unknown", request_id=3)):
        with pytest.raises(InvalidArgument, match="repeat the call"):
            call("resend", error)


def test_only_the_last_open_outcomes_are_kept(handler: Recorder) -> None:
    """The memory of a client is bounded."""
    with TransferQueueClient("client", NOWHERE, connector=Impatient(handler, None)) as client:
        errors = [lose_put(lambda name, *args, **kwargs: getattr(client, name)(*args, **kwargs)) for _ in range(257)]
        with pytest.raises(InvalidArgument):
            client.resend(errors[0])
        handler.tickets[1].answer(put_done(1))
        assert client.resend(errors[1]).global_indexes == [1]
