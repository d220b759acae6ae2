"""A server of this process: requests run in the caller's thread, and nothing is encoded."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, cast

from transfer_queue.errors import ConnectionLost, from_wire, to_wire
from transfer_queue.messages import ErrorReply, Reply, Request
from transfer_queue.wire.grants import Grants
from transfer_queue.wire.requests import GIVEN_BACK, REMEMBERED, RequestIds, name_on_wire
from transfer_queue.wire.ticket import Answer, Handler, Ticket, guarded

GRACE_S = 5.0

_MOST_OPEN = 256
_SLICE_S = 1.0  # an interrupt that comes just before a lock is waited for is noticed only then


class LocalPeer:
    """A handler as if it were a server. Usable from any thread and event loop.

    `on_push` is what the handler sees as the channel of this client: `Server.push` calls it with a message. `on_wait`
    is called when a request has to wait: who ticks the handler may have to do so earlier than it thought.
    """

    def __init__(
        self,
        handler: Handler,
        client_id: str,
        *,
        on_push: Callable[[Any], None] = lambda message: None,
        on_wait: Callable[[], None] = lambda: None,
        grace_s: float = GRACE_S,
    ) -> None:
        self.client_id = client_id
        self.name = name_on_wire(client_id)
        self._handler = handler
        self._channel: Hashable = on_push
        self._on_wait = on_wait
        self.grace_s = grace_s
        self._ids = RequestIds()
        self._grants = Grants(self._ids)
        self.unput = self._grants.unput
        self._lock = threading.Lock()
        self._under_way: set[LocalPending] = set()
        self._unresolved: OrderedDict[int, LocalPending] = OrderedDict()
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<LocalPeer for client {self.client_id!r}{': closed' if self._closed else ''}>"

    def begin(self, request: Request, *, request_id: int | None = None) -> LocalPending:
        """Run a request. `request_id`: of a `ConnectionLost`; returns that request, which goes on."""
        self._check_process()
        with self._lock:
            if self._closed:
                raise ConnectionLost("this connection was closed: open a new client")
            again = None if request_id is None else self._unresolved.pop(request_id, None)
            number, _ = self._ids.take(request_id)
            pending = again or LocalPending(self, self._channel, number, request)
            self._under_way.add(pending)
        try:
            if again is None:
                self._submit(request, pending.ticket)
            if not pending.done:
                self._on_wait()
        except BaseException:  # interrupted
            pending.cancel()
            raise
        return pending

    async def acall(self, request: Request, timeout_s: float, *, request_id: int | None = None) -> Reply:
        """Run a request and await its reply; raises as `LocalPending.result` does."""
        pending = self.begin(request, request_id=request_id)
        patience_s = timeout_s + self.grace_s
        if not pending.done:
            loop = asyncio.get_running_loop()
            over: asyncio.Future[None] = loop.create_future()
            pending.when_done(functools.partial(_call_soon, loop, _finish, over))
            timer = loop.call_later(patience_s, _finish, over)
            try:
                await over
            except BaseException:
                pending.cancel()
                raise
            finally:
                timer.cancel()
        return pending.conclude(patience_s)

    def notify(self, request: Request) -> None:
        """Run a one-way message, unless this peer is closed."""
        self._grants.given_back(request)
        if not self._closed and os.getpid() == self._pid:
            self._submit(request, Ticket(self.name, 0, self._channel, request, lambda ticket, answer: None))

    def close(self) -> None:
        """End calls under way with `ConnectionLost`; the handler hears that this client is gone. May be called twice.

        Does nothing in a forked child: the client lives on in the parent.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            first, self._closed = not self._closed, True
            pending, self._under_way = self._under_way, set()
        for each in pending:
            each.give_up()
        if first:
            guarded(self._handler.gone, self.name)

    # ------------------------------------------------------------ inside

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ConnectionLost("the session lives in the parent of this forked process: attach by its address")

    def _submit(self, request: Request, ticket: Ticket) -> None:
        _, error = guarded(self._handler.submit, request, ticket)
        if error is not None and not ticket.answered:
            ticket.answer(error)

    def finished(self, pending: LocalPending) -> None:
        """Forget a request that nobody waits for, unless somebody may ask how it ended."""
        with self._lock:
            self._under_way.discard(pending)
            if pending.open:
                self._ids.unresolved(pending.request_id)
                self._unresolved[pending.request_id] = pending
                if len(self._unresolved) > _MOST_OPEN:
                    self._unresolved.popitem(last=False)
            else:
                self._ids.answered(pending.request_id)

    def take_back(self, ticket: Ticket, reply: Reply | None) -> None:
        """Tell the handler that nobody gets this reply."""
        guarded(self._handler.lost, ticket, reply)


class LocalPending:
    """A request that a handler of this process works on. `ticket` is what the handler has of it."""

    def __init__(self, peer: LocalPeer, channel: Hashable, request_id: int, request: Request) -> None:
        self.request_id = request_id
        self.ticket = Ticket(peer.name, request_id, channel, request, self._deliver)
        self._peer = peer
        self._answer: Answer | None = None
        self._given_up = False
        self._callback: Callable[[], None] | None = None
        self._gate = threading.Lock()
        self._gate.acquire()

    @property
    def done(self) -> bool:
        return self._answer is not None or self._given_up

    @property
    def open(self) -> bool:
        """No answer came, and asking again may bring it."""
        return self._answer is None and not self.ticket.abandoned and isinstance(self.ticket.request, REMEMBERED)

    def result(self, timeout_s: float) -> Reply:
        """Wait for the reply, 5 s longer than the request itself may wait. Raises as `SocketPending.result` does."""
        patience_s = timeout_s + self._peer.grace_s
        deadline = time.monotonic() + patience_s
        try:
            while not self.done and (left_s := deadline - time.monotonic()) > 0:
                self._gate.acquire(timeout=min(left_s, _SLICE_S))
        except BaseException:
            self.cancel()
            raise
        return self.conclude(patience_s)

    def conclude(self, waited_s: float) -> Reply:
        """Return the reply, or raise what came instead of one."""
        if self._answer is None and isinstance(self.ticket.request, GIVEN_BACK):
            self.cancel()
            raise self._no_reply(waited_s)
        self._peer.finished(self)
        answer = self._answer
        if answer is None:
            raise self._no_reply(waited_s)
        if isinstance(answer, BaseException):
            raise from_wire(*to_wire(answer))
        if isinstance(answer, ErrorReply):
            raise from_wire(answer.name, answer.message, answer.details)
        return answer

    def cancel(self) -> None:
        """Withdraw the request, once; if it was answered meanwhile, the answer is taken back."""
        if self.ticket.abandoned:
            return
        self.ticket.abandoned = True
        if self._answer is None:
            self._peer.take_back(self.ticket, None)
        if self._answer is not None:
            refused = isinstance(self._answer, BaseException)
            self._peer.take_back(self.ticket, None if refused else cast("Reply", self._answer))
        self._peer.finished(self)

    def when_done(self, callback: Callable[[], None]) -> None:
        """Call back when it is done, from any thread, maybe more than once; at once if it is done already."""
        self._callback = callback
        if self.done:
            callback()

    def give_up(self) -> None:
        """Nobody answers any more: the peer was closed."""
        self._given_up = True
        self._wake()

    def _deliver(self, ticket: Ticket, answer: Answer) -> None:
        self._answer = answer
        self._wake()

    def _wake(self) -> None:
        if self._gate.locked():
            self._gate.release()
        if self._callback is not None:
            self._callback()

    def _no_reply(self, waited_s: float) -> ConnectionLost:
        reason = "the connection was closed" if self._given_up else f"no reply in {waited_s:.1f} s"
        return ConnectionLost(f"{type(self.ticket.request).__name__}: {reason}", request_id=self.request_id)


def _finish(over: asyncio.Future[None]) -> None:
    if not over.done():
        over.set_result(None)


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits in it
        loop.call_soon_threadsafe(function, *args)
