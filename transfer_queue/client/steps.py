"""What an operation may ask its driver to do.

An operation is a generator: it yields a step and receives its result, or the error it ended with is raised at the
`yield`. So each operation is written once and runs in both drivers (`client.drivers`).

    yield Call(peer, request, timeout_s)        -> the reply
    yield [Call(...), Call(...)]                -> the list of replies; all are in flight at once. If one fails, the
                                                   others are still awaited, then the first error is raised
    yield Calls([Call(...), ...], take)         -> the same, and `take` gets each reply, also if others fail
    yield Notify(peer, request)                 -> None, at once
    yield Compute(function, size_bytes)         -> function(); off the event loop if it moves many bytes
    yield Wait(future, timeout_s)               -> whether the future, which another operation ends, is done by then
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Generic, TypeAlias, TypeVar

from transfer_queue.messages import Request
from transfer_queue.wire.peer import AnyPeer

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Call:
    """`timeout_s` is what the request itself may wait for; the driver allows some seconds more for the way.

    `request_id`: of an earlier request whose outcome is open; the reply is that outcome.
    """

    peer: AnyPeer
    request: Request
    timeout_s: float
    request_id: int | None = None


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls whose replies must not get lost: `take(number of the call, reply)` is called for each one that came."""

    calls: Sequence[Call]
    take: Callable[[int, Any], object]


@dataclass(frozen=True, slots=True)
class Notify:
    peer: AnyPeer
    request: Request


@dataclass(frozen=True, slots=True)
class Compute(Generic[T]):
    """`size_bytes`: how much memory the function touches."""

    function: Callable[[], T]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Wait:
    """A blocking caller may stand in the way of the event loop that ends the future: keep `timeout_s` short."""

    future: Future[None]
    timeout_s: float


Step: TypeAlias = Call | Calls | Notify | Compute[Any] | Wait
Operation: TypeAlias = Generator[Step | list[Call], Any, R]
