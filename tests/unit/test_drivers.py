"""The two drivers: one operation, the same result, errors and clean-up in both."""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.unit.serving import TOKEN, WAIT_S, Recorder, draw, drawn, explain, frees_done
from transfer_queue.client.drivers import WORKER_BYTES, arun, awaitable, blocking, run
from transfer_queue.client.steps import Call, Calls, Compute, Notify, Operation
from transfer_queue.errors import InvalidArgument, RemoteError
from transfer_queue.messages import FreesDone, GetAudit, Report
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.server import Server

Drive: TypeAlias = Callable[[Operation[Any]], Any]


@pytest.fixture(params=["socket", "local"])
def peer(handler: Recorder, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[AnyPeer]:
    if request.param == "local":
        yield LocalPeer(handler, "client")
        return
    with Server(handler, TOKEN, local_path=str(tmp_path / "socket")) as server:
        made = Peer.at(server.local_address, token=TOKEN, client_id="client")
        yield made
        made.close()


@pytest.fixture(params=["run", "arun"])
def drive(request: pytest.FixtureRequest) -> Drive:
    return run if request.param == "run" else lambda operation: asyncio.run(arun(operation))


def asked(peer: AnyPeer, what: str) -> Call:
    return Call(peer, GetAudit(partition_id=what), WAIT_S)


def notified(handler: Recorder) -> list[int]:
    return [one.sequence for one in handler.requests if isinstance(one, FreesDone)]


# ---------------------------------------------------------------- steps and results


def test_each_step_gets_its_result(handler: Recorder, peer: AnyPeer, drive: Drive) -> None:
    """A call its reply, a list of calls a list of replies in order, a computation its value, a notice None."""

    def operation() -> Operation[list[Any]]:
        one: Report = yield asked(peer, "one")
        many: list[Report] = yield [asked(peer, str(number)) for number in range(5)]
        small = yield Compute(lambda: 6 * 7, 8)
        large = yield Compute(lambda: 6 * 8, WORKER_BYTES + 1)
        nothing = yield Notify(peer, frees_done(1))
        return [one.entries["asked"], [each.entries["asked"] for each in many], small, large, nothing]

    assert drive(operation()) == ["one", ["0", "1", "2", "3", "4"], 42, 48, None]
    handler.wait_for(lambda: notified(handler) == [1])


def test_an_operation_without_steps_just_returns(drive: Drive) -> None:
    """Nothing to wait for."""

    def operation() -> Operation[int]:
        yield from ()
        return 3

    assert drive(operation()) == 3


def test_calls_of_a_list_are_under_way_together(handler: Recorder, peer: AnyPeer, drive: Drive) -> None:
    """The first may be answered after the last has arrived."""

    def answer() -> None:
        handler.wait_for(lambda: len(handler.tickets) == 3)
        for number, ticket in enumerate(reversed(handler.tickets)):
            ticket.answer(drawn(number))

    def operation() -> Operation[list[int]]:
        replies = yield [Call(peer, draw(), WAIT_S) for _ in range(3)]
        return [int(reply.indexes[0]) for reply in replies]

    with ThreadPoolExecutor(1) as threads:
        answering = threads.submit(answer)
        assert sorted(drive(operation())) == [0, 1, 2]
        answering.result(WAIT_S)


def test_replies_beside_an_error_are_not_lost(peer: AnyPeer, drive: Drive) -> None:
    """`Calls` hands over each reply that came, then the error is raised; without one they come as a list too."""
    taken: dict[int, Any] = {}

    def operation(*calls: Call) -> Operation[Any]:
        return (yield Calls(calls, lambda number, reply: taken.update({number: reply.entries["asked"]})))

    with pytest.raises(InvalidArgument):
        drive(operation(asked(peer, "a"), Call(peer, explain("x"), WAIT_S), asked(peer, "c")))
    assert taken == {0: "a", 2: "c"}
    assert [reply.entries["asked"] for reply in drive(operation(asked(peer, "d")))] == ["d"]
    assert taken[0] == "d"


def test_large_computations_leave_the_loop_free() -> None:
    """They run in another thread; small ones run where they are."""

    def operation() -> Operation[tuple[int, int]]:
        small = yield Compute(threading.get_ident, WORKER_BYTES)
        large = yield Compute(threading.get_ident, WORKER_BYTES + 1)
        return small, large

    small, large = asyncio.run(arun(operation()))
    assert small == threading.get_ident() != large
    assert run(operation()) == (small, small)


async def test_a_blocking_operation_runs_inside_a_running_loop(peer: AnyPeer) -> None:
    """It blocks the loop, and works."""

    def operation() -> Operation[Any]:
        return (yield asked(peer, "x"))

    assert run(operation()).entries == {"asked": "x"}


# ---------------------------------------------------------------- errors


def test_an_error_is_raised_at_the_yield(peer: AnyPeer, drive: Drive) -> None:
    """The operation may catch it and go on."""

    def operation() -> Operation[Any]:
        try:
            yield Call(peer, explain("x"), WAIT_S)
        except InvalidArgument as error:
            reply = yield asked(peer, "after")
            return error.details, reply.entries["asked"]

    assert drive(operation()) == ({"known": ["a"]}, "after")


def test_an_error_nobody_catches_reaches_the_caller(peer: AnyPeer, drive: Drive) -> None:
    """After the clean-up of the operation, whose steps are still done."""
    cleaned: list[Any] = []

    def operation() -> Operation[None]:
        try:
            yield Call(peer, explain("bug"), WAIT_S)
        finally:
            reply = yield asked(peer, "clean")
            cleaned.append(reply.entries["asked"])

    with pytest.raises(RemoteError, match="ZeroDivisionError"):
        drive(operation())
    assert cleaned == ["clean"]


def test_of_several_errors_the_first_is_raised_when_all_have_ended(
    handler: Recorder, peer: AnyPeer, drive: Drive
) -> None:
    """The calls beside it are awaited, so none is left under way."""

    def operation() -> Operation[None]:
        yield [asked(peer, "a"), Call(peer, explain("x"), WAIT_S), Call(peer, explain("bug"), WAIT_S), asked(peer, "b")]

    with pytest.raises(InvalidArgument):
        drive(operation())
    assert [one.partition_id for one in handler.requests if isinstance(one, GetAudit)] == ["a", "b"]


@pytest.mark.parametrize("size_bytes", [1, WORKER_BYTES + 1])
def test_an_error_of_a_computation_is_raised_at_the_yield(drive: Drive, size_bytes: int) -> None:
    """As from any function."""

    def operation() -> Operation[str]:
        try:
            yield Compute(lambda: 1 // 0, size_bytes)
        except ZeroDivisionError:
            return "caught"
        return "missed"

    assert drive(operation()) == "caught"


# ---------------------------------------------------------------- interruption


def waiting_with_cleanup(peer: AnyPeer, calls: int) -> Operation[None]:
    """Wait for draws; tell the server when it is over, however it ends."""
    try:
        yield [Call(peer, draw(), 3600) for _ in range(calls)] if calls > 1 else Call(peer, draw(), 3600)
    finally:
        yield Notify(peer, frees_done(99))


@pytest.mark.parametrize("calls", [1, 3])
async def test_a_cancelled_operation_cleans_up(handler: Recorder, peer: AnyPeer, calls: int) -> None:
    """Its calls are withdrawn, its last notices are sent, and the cancellation goes on."""
    task = asyncio.ensure_future(arun(waiting_with_cleanup(peer, calls)))
    while len(handler.tickets) < calls:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.to_thread(handler.wait_for, lambda: len(handler.lost_replies) == calls and notified(handler) == [99])


def functions_under_way(thread: int) -> list[str]:
    return [frame.name for frame in traceback.extract_stack(sys._current_frames()[thread])]


@pytest.mark.parametrize("calls", [1, 3])
def test_an_interrupted_operation_cleans_up(handler: Recorder, peer: AnyPeer, calls: int) -> None:
    """Ctrl-C in a blocking operation does the same."""

    def interrupt() -> None:
        handler.wait_for(lambda: len(handler.tickets) == calls)
        while "result" not in functions_under_way(main):
            os.sched_yield()
        os.kill(os.getpid(), signal.SIGINT)

    main = threading.get_ident()
    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        run(waiting_with_cleanup(peer, calls))
    interrupting.join()
    handler.wait_for(lambda: len(handler.lost_replies) == calls and notified(handler) == [99])


def test_a_coroutine_that_is_closed_cleans_up(handler: Recorder) -> None:
    """Notices are still given when its loop is gone; a call in the clean-up is refused."""
    peer = LocalPeer(handler, "client")
    refused: list[type[BaseException]] = []

    def operation() -> Operation[None]:
        try:
            yield Call(peer, draw(), 3600)
        finally:
            yield Notify(peer, frees_done(1))
            try:
                yield asked(peer, "x")
            except GeneratorExit as error:
                refused.append(type(error))
                raise

    loop = asyncio.new_event_loop()
    coroutine = arun(operation())
    task = loop.create_task(coroutine)
    while not handler.tickets:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    coroutine.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant to be lost
    assert notified(handler) == [1]
    assert refused == [GeneratorExit]


async def test_a_cancelled_computation_has_ended_before_the_clean_up() -> None:
    """What it writes to may be given up then."""
    started, may_end = threading.Event(), threading.Event()
    order: list[str] = []

    def compute() -> None:
        started.set()
        may_end.wait(WAIT_S)
        order.append("computed")

    def operation() -> Operation[None]:
        try:
            yield Compute(compute, WORKER_BYTES + 1)
        finally:
            order.append("cleaned up")

    task = asyncio.ensure_future(arun(operation()))
    await asyncio.to_thread(started.wait, WAIT_S)
    task.cancel()
    await asyncio.sleep(0)
    task.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert order == ["computed", "cleaned up"]


# ---------------------------------------------------------------- methods


@dataclass
class Core:
    peer: AnyPeer


def fetch(core: Core, what: str, *, times: int = 1) -> Operation[list[str]]:
    """Ask for something."""
    replies = yield [asked(core.peer, what) for _ in range(times)]
    return [reply.entries["asked"] for reply in replies]


class Client:
    def __init__(self, peer: AnyPeer) -> None:
        self._core = Core(peer)

    fetch, async_fetch = blocking(fetch), awaitable(fetch)


def test_one_operation_makes_two_methods(peer: AnyPeer) -> None:
    """Both have its signature and docstring, and give its result."""
    client = Client(peer)
    assert client.fetch("a", times=2) == ["a", "a"]
    assert asyncio.run(client.async_fetch("b")) == ["b"]
    assert inspect.iscoroutinefunction(client.async_fetch)
    assert (client.fetch.__name__, client.async_fetch.__name__) == ("fetch", "async_fetch")
    for method in (client.fetch, client.async_fetch):
        assert inspect.getdoc(method) == "Ask for something."
        assert list(inspect.signature(method).parameters) == ["what", "times"]
