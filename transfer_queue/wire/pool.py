"""The links of one peer in one process: which are idle, which belong to a thread, which to an event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from typing import Any

from transfer_queue.errors import ConnectionLost, TransferQueueError
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.grants import Courier, Grants
from transfer_queue.wire.link import MOST_IN_FLIGHT, Link, Resolve
from transfer_queue.wire.requests import RequestIds

MOST_IDLE = 8


class LoopLink:
    """A link while an event loop uses it. Everything but `end_soon` runs in that loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, link: Link, release: Callable[[LoopLink], None]) -> None:
        self.loop = loop
        self.link = link
        self._release = release
        self._released = False
        self._fd = link.fd
        loop.add_reader(self._fd, self._readable)
        self._holding = False
        self._tick_later()

    def post(self, request_id: int, frames: list[Any], resolve: Resolve) -> None:
        """Send a request together with all that other tasks of the loop send in this turn of it."""
        self.link.post(request_id, frames, resolve, hold=True)
        if not self._holding:
            self._holding = True
            self.loop.call_soon(self._flush)

    def notify(self, frames: list[Any], *, keep: bool) -> bool:
        """Send a one-way message; return whether there is a connection for it, as far as is known."""
        self.link.notify(frames, keep=keep)
        self._look_again()
        return self.link.introduced

    def drop(self, request_id: int, *, cancel: bool) -> None:
        """Do not wait for a request any more. Does nothing once the link went to somebody else."""
        if not self._released:
            self.link.drop(request_id, cancel=cancel)
            self._after_sending()

    def end_soon(self, error: TransferQueueError) -> None:
        """End all calls with this error; from any thread."""
        try:
            self.loop.call_soon_threadsafe(self._end, error)
        except RuntimeError:  # the loop is closed: nobody waits in it
            self.detach()

    def detach(self) -> None:
        """Give the link back."""
        if self._released:
            return
        self._released = True
        if not self.loop.is_closed():
            self.loop.remove_reader(self._fd)
            self._timer.cancel()
        self._release(self)

    def _end(self, error: TransferQueueError) -> None:
        if not self._released:
            self.link.fail(error)
            self.detach()

    def _flush(self) -> None:
        self._holding = False
        if not self._released:
            self.link.flush()
            self._after_sending()

    def _after_sending(self) -> None:
        if self.link.edge_triggered:
            self._look_again()
        elif not self.link.busy:
            self.detach()

    def _readable(self) -> None:
        if not self._released:
            self._look_again()

    def _look_again(self) -> None:
        """Take what has arrived, and leave when nothing is under way any more."""
        more = self.link.receive()
        if not self.link.busy:
            self.detach()
            return
        if more:
            self.loop.call_soon(self._readable)
        if self.link.patience_s < self._patience_s:  # the connection was lost
            self._timer.cancel()
            self._tick_later()

    def _tick_later(self) -> None:
        self._patience_s = self.link.patience_s
        self._timer = self.loop.call_later(self._patience_s, self._tick)

    def _tick(self) -> None:
        if not self._released:
            self.link.receive()  # what has arrived may be the answer
            self.link.probe()
            self._tick_later()
            self._look_again()


class Pool:
    """The links and request ids of one peer in one process life. Thread safe."""

    def __init__(self, address: str, open_link: Callable[[int, Callable[[], list[Any] | None]], Link]) -> None:
        """`open_link` gets the descriptor of the bell, and the preface of the link."""
        self.pid = os.getpid()
        self.ids = RequestIds()
        self.grants = Grants(self.ids)
        self.courier = Courier(address, self.ids, lambda bell_fd: open_link(bell_fd, self.grants.preface))
        self.bell = Bell()
        self.closed = False
        self._open_link = open_link
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._of_thread: dict[int, Link] = {}
        self._of_loop: dict[asyncio.AbstractEventLoop, LoopLink] = {}
        self._lent = 0
        self._kept: list[list[Any]] = []  # messages that may not have arrived, of links that are closed

    def for_thread(self) -> Link:
        """Return the link of this thread. Give it back by `done` as soon as it is not busy."""
        thread = threading.get_ident()
        with self._lock:
            self._check_open()
            link = self._of_thread.get(thread)
            if link is None or link.in_flight >= MOST_IN_FLIGHT or link.failure is not None:
                link = self._of_thread[thread] = self._lend()
                link.owner = thread
            return link

    def done(self, link: Link) -> None:
        """Take the link of this thread back, unless it is busy or went back before."""
        thread = threading.get_ident()
        with self._lock:
            if link.owner != thread or link.busy:
                return
            link.owner = None
            if self._of_thread.get(thread) is link:
                del self._of_thread[thread]
            self._take_back(link)

    def for_loop(self, loop: asyncio.AbstractEventLoop) -> LoopLink:
        """Return the link of the running loop; it goes back by itself when no call is under way."""
        with self._lock:
            self._check_open()
            dead = [other for other in self._of_loop if other.is_closed()]
            lost = [self._of_loop.pop(other) for other in dead]
            lent = self._of_loop.get(loop)
            if lent is None or lent.link.in_flight >= MOST_IN_FLIGHT:
                lent = self._of_loop[loop] = LoopLink(loop, self._lend(), self._loop_done)
        for abandoned in lost:
            abandoned.link.fail(ConnectionLost("its event loop was closed"))
            abandoned.detach()
        return lent

    def keep(self, frames: list[Any]) -> None:
        """Send a message, again and again if need be, with the next use of a link."""
        with self._lock:
            self._kept.append(frames)

    def close(self) -> None:
        """Close idle links and wake all that wait; they end with `ConnectionLost` and close theirs."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            while self._idle:
                self._idle.pop().close()
            in_loops = list(self._of_loop.values())
            self.bell.ring()
            self._end_if_last()
        for lent in in_loops:
            lent.end_soon(ConnectionLost("this connection was closed while the call was under way"))

    # ------------------------------------------------------------ inside, under the lock

    def _check_open(self) -> None:
        if self.closed:
            raise ConnectionLost("this connection was closed: open a new client")

    def _lend(self) -> Link:
        link = self._idle.pop() if self._idle else self._open_link(self.bell.fd, self.grants.preface)
        self._lent += 1
        for idle in self._idle:  # nobody might use that one for long
            self._kept += idle.take_kept()
        if self._kept:
            kept, self._kept = self._kept, []
            link.take_over(kept)
        return link

    def _take_back(self, link: Link) -> None:
        self._lent -= 1
        if self.closed or link.failure is not None or link.torn or len(self._idle) >= MOST_IDLE:
            self._kept += link.take_kept()
            link.close()
        else:
            self._idle.append(link)
        self._end_if_last()

    def _loop_done(self, lent: LoopLink) -> None:
        with self._lock:
            if self._of_loop.get(lent.loop) is lent:
                del self._of_loop[lent.loop]
            self._take_back(lent.link)

    def _end_if_last(self) -> None:
        if self.closed and self._lent == 0:
            self.bell.close()
            self.courier.close()
            if self.grants.used:
                self.courier.send()
