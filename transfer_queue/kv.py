"""Key-value functions: those of the client of this process, which attaches to the queue that it finds.

Each raises `NotInitialized` if there is none, see `session.found_client`. What they do is said in `client.keys` and
`client.awaiting`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Concatenate, ParamSpec, TypeVar

from transfer_queue.client import awaiting, keys
from transfer_queue.client.core import ClientCore
from transfer_queue.client.drivers import awaitable, blocking
from transfer_queue.client.steps import Operation
from transfer_queue.session import found_client

P = ParamSpec("P")
R = TypeVar("R")


def _blocking(operation: Callable[Concatenate[ClientCore, P], Operation[R]]) -> Callable[P, R]:
    method = blocking(operation)

    @functools.wraps(operation)
    def function(*args: P.args, **kwargs: P.kwargs) -> R:
        return method(found_client(), *args, **kwargs)

    return _signed(function, operation)


def _awaitable(operation: Callable[Concatenate[ClientCore, P], Operation[R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    method = awaitable(operation)

    @functools.wraps(method)
    async def function(*args: P.args, **kwargs: P.kwargs) -> R:
        return await method(found_client(), *args, **kwargs)

    return _signed(function, operation)


def _signed(function: Callable[P, R], operation: Callable[..., Any]) -> Callable[P, R]:
    """The arguments are those of the operation but the first."""
    whole = inspect.signature(operation)
    vars(function)["__signature__"] = whole.replace(parameters=list(whole.parameters.values())[1:])
    function.__module__ = __name__
    return function


kv_put, async_kv_put = _blocking(keys.kv_put), _awaitable(keys.kv_put)
kv_batch_put, async_kv_batch_put = _blocking(keys.kv_batch_put), _awaitable(keys.kv_batch_put)
kv_batch_get, async_kv_batch_get = _blocking(keys.kv_batch_get), _awaitable(keys.kv_batch_get)
kv_batch_get_by_meta = _blocking(keys.kv_batch_get_by_meta)
async_kv_batch_get_by_meta = _awaitable(keys.kv_batch_get_by_meta)
kv_list, async_kv_list = _blocking(keys.kv_list), _awaitable(keys.kv_list)
kv_clear, async_kv_clear = _blocking(keys.kv_clear), _awaitable(keys.kv_clear)
kv_wait, async_kv_wait = _blocking(awaiting.kv_wait), _awaitable(awaiting.kv_wait)


def kv_watch(
    partition_id: str, *, where: Mapping[str, Any] | None = None, since: str = "", timeout: float | None = None
) -> awaiting.KeyWatch:
    """See `TransferQueueClient.kv_watch`."""
    return found_client().kv_watch(partition_id, where=where, since=since, timeout=timeout)


async_kv_watch = kv_watch  # what it returns is for `for` and for `async for`
