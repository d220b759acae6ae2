"""Two drivers for one text: `run` waits in the calling thread, `arun` in the running event loop.

A driver sends an operation the result of the step it yielded, or raises at its `yield` what the step ended with: the
error of a reply, but also KeyboardInterrupt and cancellation. So an operation cleans up as any function does, in
`finally` or `except`, and may yield further steps there. What comes of each:

    Notify, Compute   done, in either driver, also when the coroutine is closed without being awaited to its end
    Call(s), Wait     awaited as ever; in a coroutine that is being closed they raise GeneratorExit again

A request under way when the interrupt comes is withdrawn first. A `Compute` in a worker thread is waited for, because
it may be writing into memory that the operation is about to give up.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeAlias, TypeVar

from transfer_queue.client.steps import Call, Calls, Compute, Notify, Operation, Step, Wait
from transfer_queue.errors import TransferQueueError
from transfer_queue.messages import Reply
from transfer_queue.wire.peer import Pending

WORKER_BYTES = 8 << 20

Take: TypeAlias = Callable[[int, Reply], object]
C = TypeVar("C")
C_co = TypeVar("C_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R")


def run(operation: Operation[R]) -> R:
    """Run an operation to its end in this thread, whether or not an event loop runs in it."""
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            try:
                step = operation.send(value) if error is None else operation.throw(error)
            except StopIteration as stop:
                result: R = stop.value
                return result
            value = error = None
            try:
                value = _perform(step)
            except BaseException as raised:
                error = raised
    finally:
        value = error = None  # or this frame and the traceback of the error keep each other alive


async def arun(operation: Operation[R]) -> R:
    """Run an operation to its end in the running event loop."""
    value: Any = None
    error: BaseException | None = None
    closing: GeneratorExit | None = None
    try:
        while True:
            try:
                step = operation.send(value) if error is None else operation.throw(error)
            except StopIteration as stop:
                result: R = stop.value
                return result
            value = error = None
            try:
                value = await _aperform(step) if closing is None else _perform_at_once(step, closing)
            except GeneratorExit as raised:
                error = closing = raised
            except BaseException as raised:
                error = raised
    finally:
        value = error = closing = None


class _HasCore(Protocol[C_co]):
    @property
    def _core(self) -> C_co: ...


def blocking(operation: Callable[Concatenate[C, P], Operation[R]]) -> Callable[Concatenate[_HasCore[C], P], R]:
    """Make a method of an operation. The operation gets the object's `_core` in place of `self`."""

    @functools.wraps(operation)
    def method(self: _HasCore[C], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return run(operation(self._core, *args, **kwargs))

    return method


def awaitable(
    operation: Callable[Concatenate[C, P], Operation[R]],
) -> Callable[Concatenate[_HasCore[C], P], Coroutine[Any, Any, R]]:
    """Make an `async` method of an operation, named `async_` and its name; else as `blocking`."""

    @functools.wraps(operation)
    async def method(self: _HasCore[C], /, *args: P.args, **kwargs: P.kwargs) -> R:
        return await arun(operation(self._core, *args, **kwargs))

    method.__name__ = f"async_{operation.__name__}"
    method.__qualname__ = method.__name__
    return method


# ---------------------------------------------------------------- one step


def _perform(step: Step | list[Call]) -> Any:
    match step:
        case Call():
            return _begin(step).result(step.timeout_s)
        case Notify(peer, request):
            return peer.notify(request)
        case Compute(function):
            return function()
        case Wait(future, timeout_s):
            return bool(concurrent.futures.wait([future], timeout_s).done)
        case Calls(calls, take):
            return _perform_all(calls, take)
        case _:
            return _perform_all(step, _leave)


def _leave(number: int, reply: Reply) -> None:
    """Replies of a plain list are of no use if one of them is an error."""


def _perform_all(calls: Sequence[Call], take: Take) -> list[Reply]:
    """Begin all, then wait for each; an interrupt withdraws those that are still under way."""
    begun: list[Pending | TransferQueueError] = []
    replies: list[Reply | BaseException] = []
    try:
        for call in calls:
            begun.append(_begun(call))
        for number, (call, pending) in enumerate(zip(calls, begun, strict=True)):
            reply = pending if isinstance(pending, TransferQueueError) else _result(pending, call.timeout_s)
            replies.append(reply)
            if not isinstance(reply, BaseException):
                take(number, reply)
    except BaseException:
        for pending in begun[len(replies) :]:
            if not isinstance(pending, TransferQueueError):
                pending.cancel()
        raise
    return _without_errors(replies)


def _begin(call: Call) -> Pending:
    return call.peer.begin(call.request, request_id=call.request_id)


def _begun(call: Call) -> Pending | TransferQueueError:
    try:
        return _begin(call)
    except TransferQueueError as error:
        return error


def _result(pending: Pending, timeout_s: float) -> Reply | TransferQueueError:
    try:
        return pending.result(timeout_s)
    except TransferQueueError as error:
        return error


def _perform_at_once(step: Step | list[Call], closing: GeneratorExit) -> Any:
    """Perform a step of an operation whose coroutine is being closed, where nothing can be awaited."""
    if isinstance(step, Notify | Compute):
        return _perform(step)
    raise closing


async def _aperform(step: Step | list[Call]) -> Any:
    match step:
        case Call():
            return await _reply_to(step)
        case Compute(function, size_bytes) if size_bytes > WORKER_BYTES:
            return await _in_worker(function)
        case Notify() | Compute():
            return _perform(step)
        case Wait(future, timeout_s):
            done, _ = await asyncio.wait([asyncio.wrap_future(future)], timeout=timeout_s)
            return bool(done)
        case Calls(calls, take):
            return await _areplies(calls, take)
        case _:
            return await _areplies(step, _leave)


async def _areplies(calls: Sequence[Call], take: Take) -> list[Reply]:
    async def taken(number: int, call: Call) -> Reply:
        reply = await _reply_to(call)
        take(number, reply)
        return reply

    under_way = [taken(number, call) for number, call in enumerate(calls)]
    return _without_errors(await asyncio.gather(*under_way, return_exceptions=True))


async def _reply_to(call: Call) -> Reply:
    return await call.peer.acall(call.request, call.timeout_s, request_id=call.request_id)


async def _in_worker(function: Callable[[], Any]) -> Any:
    """Call a function in a worker thread and wait for its end, even if cancelled."""
    worker = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(worker)
    except asyncio.CancelledError:
        while not worker.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({worker})
        if not worker.cancelled():
            worker.exception()
        raise


def _without_errors(replies: Sequence[Reply | BaseException]) -> list[Reply]:
    for reply in replies:
        if isinstance(reply, BaseException):
            raise reply
    return [reply for reply in replies if not isinstance(reply, BaseException)]
