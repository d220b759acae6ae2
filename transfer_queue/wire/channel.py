"""A server as one client sees it over sockets.

A thread borrows a link for as long as it has a request under way, and waits on that link itself, so a call costs no
extra hop. An event loop borrows one while it has at least one call under way. Nothing is shared with a forked child:
it opens its own links, under a client id of its own, at first use.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from transfer_queue.errors import ConnectionLost, TransferQueueError, from_wire
from transfer_queue.messages import AbortBlocks, Cancel, ErrorReply, Reply, Request
from transfer_queue.wire.codec import encode_message
from transfer_queue.wire.curve import check_key
from transfer_queue.wire.grants import GRANTED
from transfer_queue.wire.link import Link
from transfer_queue.wire.pool import LoopLink, Pool
from transfer_queue.wire.ports import choose_address, is_unix_address
from transfer_queue.wire.requests import GIVEN_BACK, REMEMBERED, name_on_wire
from transfer_queue.wire.stream import LINGER_S
from transfer_queue.wire.ticket import Answer

__all__ = ["Peer", "SocketPending", "choose_address"]

GRACE_S = 5.0  # for the way there and back, beyond what the request itself may wait
NOTIFY_S = 2.0
INTRODUCTION_S = 0.2


class Peer:
    """One server. Usable from any thread and event loop, and after a fork.

    The first four arguments are what a server tells of itself: with a `nonce` that this process can read in `folder`,
    `local_address` is used, else `address`; `transport` "tcp" asks for `address` in any case. With a `curve_key` TCP is
    encrypted. Nothing is opened before the first call.
    """

    def __init__(
        self,
        local_address: str,
        folder: str,
        nonce: str,
        address: str,
        *,
        token: bytes,
        client_id: str,
        transport: str = "auto",
        curve_key: str = "",
        grace_s: float = GRACE_S,
    ) -> None:
        self.address = choose_address(local_address, folder, nonce, address, transport)
        self.client_id = client_id
        check_key(curve_key)
        self._token = token
        self._curve_key = curve_key
        self._grace_s = grace_s
        self._pool = self._new_pool()

    @classmethod
    def at(cls, address: str, *, token: bytes, client_id: str, curve_key: str = "", grace_s: float = GRACE_S) -> Peer:
        """Return the server at a known address, `unix:` or `tcp:`."""
        return cls("", "", "", address, token=token, client_id=client_id, curve_key=curve_key, grace_s=grace_s)

    def __repr__(self) -> str:
        return f"<Peer {self.address} for client {self.client_id!r}{': closed' if self._pool.closed else ''}>"

    def begin(self, request: Request, *, request_id: int | None = None) -> SocketPending:
        """Send a request. Its result has to be asked for in this thread.

        `request_id`: from the `details` of an earlier `ConnectionLost`; the server does not do it twice, and the
        result is the true outcome.
        """
        pool = self._pool_now()
        number, frames = _encode(pool, request, request_id)
        try:
            link = pool.for_thread()
        except BaseException:
            pool.ids.answered(number)
            raise
        pending = SocketPending(self, pool, link, number, request)
        pending.send(frames)
        return pending

    async def acall(self, request: Request, timeout_s: float, *, request_id: int | None = None) -> Reply:
        """Send a request and await its reply; raises as `SocketPending.result` does."""
        pool = self._pool_now()
        number, frames = _encode(pool, request, request_id)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        patience_s = timeout_s + self._grace_s
        lost = self._no_reply(request, patience_s)
        replies: list[Answer] = []  # also those that come when nobody waits for `answer` any more
        timer = loop.call_later(patience_s, _resolve, answer, lost)
        link: LoopLink | None = None
        try:
            link = pool.for_loop(loop)
            link.post(number, frames, functools.partial(_resolve_by, answer, replies))
            outcome = await answer
        except BaseException:
            _withdraw(pool, request, number)
            if link is not None:
                link.drop(number, cancel=True)
                self._take_back(request, number, replies)
            raise
        finally:
            timer.cancel()
        link.drop(number, cancel=isinstance(request, GIVEN_BACK))
        if outcome is lost:
            self._take_back(request, number, replies)
        return _conclude(pool, request, number, outcome)

    @property
    def unput(self) -> set[int]:
        return self._pool_now().grants.unput

    def notify(self, request: Request) -> None:
        """Send a one-way message. It may get lost with the connection, and is lost if there is none in 2 s.

        What gives back a grant is not lost, see `wire.grants`, and needs no connection: the peer may be closed. An
        abort that may not have arrived over TCP is sent again with the next use of this peer.
        """
        pool = self._pool_now()
        gives_back = pool.grants.given_back(request)
        frames = encode_message(request)
        unsaid = frames if isinstance(request, AbortBlocks) else None  # of others it is enough that they are not held
        keep = unsaid is not None and not is_unix_address(self.address)  # else the courier has it
        if gives_back and pool.closed:
            pool.courier.send(unsaid)
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            sent = self._notify_from_thread(pool, frames, INTRODUCTION_S if gives_back else NOTIFY_S, keep=keep)
        else:
            sent = pool.for_loop(loop).notify(frames, keep=keep)
        if gives_back and not sent:
            pool.courier.send(unsaid)

    def _notify_from_thread(self, pool: Pool, frames: list[Any], timeout_s: float, *, keep: bool) -> bool:
        """Return whether there is a connection for it, as far as is known."""
        link = pool.for_thread()
        deadline = time.monotonic() + timeout_s
        try:
            while not link.introduced and not pool.closed and (left_s := deadline - time.monotonic()) > 0:
                link.wait(left_s)
            if not link.introduced:
                if keep:
                    pool.keep(frames)
                return False
            link.notify(frames, keep=keep)
            link.finish_sending(deadline - time.monotonic())
            link.receive()
            return link.introduced
        finally:
            pool.done(link)

    def close(self) -> None:
        """End all connections. Calls under way anywhere end with `ConnectionLost`. May be called twice."""
        self._pool_now().close()

    def open_link(self, bell_fd: int, on_push: Callable[[Any], None], on_welcome: Callable[[], None]) -> Link:
        """Return a link apart, for one who listens to what the server pushes; see `Link`. The caller closes it."""
        return self._link(name_on_wire(self.client_id), bell_fd, on_push=on_push, on_welcome=on_welcome)

    # ------------------------------------------------------------ inside

    def _new_pool(self) -> Pool:
        name = name_on_wire(self.client_id)
        return Pool(self.address, lambda bell_fd, preface: self._link(name, bell_fd, preface=preface))

    def _link(self, name: str, bell_fd: int, **told: Callable[..., Any]) -> Link:
        return Link(self.address, self._token, name, bell_fd=bell_fd, curve_key=self._curve_key, **told)

    def _pool_now(self) -> Pool:
        """Return the pool of this process. That of the parent is left alone: its locks may be held for ever here."""
        if self._pool.pid != os.getpid():
            closed = self._pool.closed
            self._pool = self._new_pool()
            if closed:
                self._pool.close()
        return self._pool

    def _take_back(self, request: Request, request_id: int, replies: Sequence[Answer]) -> None:
        """Nobody gets what came as a reply: it is withdrawn after all."""
        if isinstance(request, GIVEN_BACK) and any(not isinstance(reply, BaseException) for reply in replies):
            with contextlib.suppress(ConnectionLost):  # then the server finds that nobody took it
                self.notify(Cancel(request_id=request_id))

    def _no_reply(self, request: Request, waited_s: float) -> ConnectionLost:
        return ConnectionLost(
            f"{type(request).__name__} got no reply from {self.address} in {waited_s:.1f} s: is the server alive?"
        )


class SocketPending:
    """A request under way on a link of the thread that began it."""

    def __init__(self, peer: Peer, pool: Pool, link: Link, request_id: int, request: Request) -> None:
        self.request_id = request_id
        self.link = link
        self._peer = peer
        self._pool = pool
        self._request = request
        self._outcome: Answer | None = None
        self._thread = threading.get_ident()

    def resolve(self, outcome: Answer) -> None:
        self._outcome = outcome

    def send(self, frames: list[Any]) -> None:
        """Send the request. A new link waits for its introduction first, so that several are under way at once."""
        deadline = time.monotonic() + INTRODUCTION_S
        try:
            self.link.post(self.request_id, frames, self.resolve)
            while not self.link.introduced and not self._pool.closed and (left_s := deadline - time.monotonic()) > 0:
                self.link.wait(left_s)
        except BaseException:
            self.cancel()
            raise

    def result(self, timeout_s: float) -> Reply:
        """Wait for the reply. `timeout_s` is what the request itself may wait for; the way gets 5 s more.

        Raises what the server raised. `ConnectionLost` if no reply came in time or the peer was closed: the request
        may have been done, and `details["request_id"]` is for asking. An interrupt withdraws the request.
        """
        assert self._thread == threading.get_ident(), "a result is waited for in the thread that began the request"
        patience_s = timeout_s + self._peer._grace_s
        deadline = time.monotonic() + patience_s
        try:
            while self._outcome is None:
                left_s = deadline - time.monotonic()
                if self._pool.closed:
                    self.link.fail(ConnectionLost("this connection was closed while the call was under way"))
                elif left_s <= 0:
                    self._outcome = self._peer._no_reply(self._request, patience_s)
                else:
                    self.link.wait(left_s)
        except BaseException:
            self.cancel()
            raise
        if self.link.owner == self._thread:
            self.link.drop(self.request_id, cancel=isinstance(self._request, GIVEN_BACK))
            self._pool.done(self.link)
        return _conclude(self._pool, self._request, self.request_id, self._outcome)

    def cancel(self) -> None:
        """Withdraw the request, if it was not answered; nobody may ask for its result any more."""
        _withdraw(self._pool, self._request, self.request_id)
        if self.link.torn:
            self.link.fail(ConnectionLost("this connection was interrupted within a message"))
            self._peer.notify(Cancel(request_id=self.request_id))
        elif self.link.owner == self._thread:
            self.link.drop(self.request_id, cancel=True)
            self.link.finish_sending(LINGER_S)
        self._pool.done(self.link)
        self._peer._take_back(self._request, self.request_id, [] if self._outcome is None else [self._outcome])


def _encode(pool: Pool, request: Request, again: int | None) -> tuple[int, list[Any]]:
    """Return the request's id and frames."""
    number, floor = pool.ids.take(again)
    try:
        return number, encode_message(request, number, floor)
    except BaseException:
        pool.ids.answered(number)
        raise


def _resolve(answer: asyncio.Future[Answer], outcome: Answer) -> None:
    if not answer.done() and not answer.get_loop().is_closed():
        answer.set_result(outcome)


def _resolve_by(answer: asyncio.Future[Answer], replies: list[Answer], outcome: Answer) -> None:
    replies.append(outcome)
    _resolve(answer, outcome)


def _withdraw(pool: Pool, request: Request, request_id: int) -> None:
    """Nobody waits for this request any more."""
    pool.grants.concluded(request, request_id, None)
    pool.ids.answered(request_id)


def _conclude(pool: Pool, request: Request, request_id: int, outcome: Answer) -> Reply:
    """Return the reply, or raise what came instead of one."""
    pool.grants.concluded(request, request_id, outcome)
    if isinstance(outcome, ConnectionLost) and isinstance(request, REMEMBERED) and not isinstance(request, GRANTED):
        pool.ids.unresolved(request_id)
    else:
        pool.ids.answered(request_id)
    if isinstance(outcome, ConnectionLost):
        raise ConnectionLost(f"{type(request).__name__}: {outcome.message}", request_id=request_id)
    if isinstance(outcome, TransferQueueError):
        raise type(outcome)(outcome.message, **outcome.details)
    if isinstance(outcome, ErrorReply):
        raise from_wire(outcome.name, outcome.message, outcome.details)
    assert not isinstance(outcome, BaseException), repr(outcome)
    return outcome
