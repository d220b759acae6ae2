"""Acknowledgements that nobody waits for.

A thread of the client sends them and takes the answers, while the consumer works on. It gathers those of some
milliseconds into one request, which costs both ends little more than a single one. As it has a connection of its own,
`Behind` keeps the order: what the client asks of the controller next is sent when they are answered. Draws that may
wait, and renewals, need not: an acknowledgement that makes a difference to a draw wakes it.

A process that ends waits for those of all its clients, also one that `multiprocessing` forked.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.util import Finalize

import numpy as np

from transfer_queue.errors import ConnectionLost
from transfer_queue.messages import Ack, Acked, AckMany, Draw, Renew, Reply, Request, WaitKeys, int64s_of
from transfer_queue.wire.peer import AnyPeer, Pending

log = logging.getLogger("transfer_queue")

MOST_OUTSTANDING = 32  # leases

_GATHER_S = 0.005
_GATHER_ROWS = 1 << 14
_IDLE_S = 5.0  # then the thread ends, until it is needed again
_ORDER_S = 5.0  # a request does not wait longer for those before it: the controller is away, or does not answer
_END_S = 5.0  # nor does the end of the process


@dataclass(frozen=True, slots=True)
class _Given:
    request: Ack
    samples: int
    deadline_s: float


class Acknowledger:
    """The acknowledgements of one client that are under way. Thread-safe; a forked child begins with none.

    late    how many samples were acknowledged too late, or without an answer: they may be handed out again. Each time
            is logged as a warning
    """

    def __init__(self, peer: AnyPeer, most: int = MOST_OUTSTANDING) -> None:
        self._peer = peer
        self._most = most
        self._closed = False
        self._thread: threading.Thread | None = None
        self._given = self._answered = self.late = 0
        self._begin()
        _all.add(self)

    def __repr__(self) -> str:
        return f"<Acknowledger: {self.outstanding} under way, {self.late} samples late>"

    @property
    def outstanding(self) -> int:
        """How many are not answered yet."""
        return self._given - self._answered

    def give(self, requests: Sequence[Ack], timeout_s: float) -> bool:
        """Have them sent, all or none; False: too many are under way, so wait until they are `settled`.

        `timeout_s`: how long from now on they are sent again to a controller that is away. Raises `ConnectionLost` if
        the client is closed.
        """
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            if self._closed:
                raise ConnectionLost("this client was closed: open a new one")
            if self.outstanding and self.outstanding + len(requests) > self._most:
                return False
            if self._thread is None or not self._thread.is_alive():
                thread = threading.Thread(target=self._run, name="tq-acknowledgements", daemon=True)
                thread.start()  # if it cannot be, nothing has changed yet
                self._thread = thread
                _finish_at_exit()
            self._given += len(requests)
            for request in requests:
                self._queue.put(_Given(request, len(request.indexes), deadline_s))
        return True

    def settled(self) -> Future[None]:
        """Done when all that were given by now are answered, or failed. Cannot be cancelled."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self.outstanding:
                self._waiting.append((self._given, future))
                self._hurry.set()
            else:
                future.set_result(None)
        return future

    def earlier(self) -> Future[None] | None:
        """What a request that comes behind waits for; None: nothing, or it would be in vain again."""
        return self.settled() if self.outstanding and self._in_vain_at != self._answered else None

    def note_waited_in_vain(self) -> None:
        """Until there is an answer nobody else has to find out."""
        self._in_vain_at = self._answered

    def close(self) -> None:
        """Take no more, and end the thread; those under way end with the connection. May be called twice."""
        with self._lock:
            self._closed = True
            self._hurry.set()
            thread = self._thread
        if thread is not None:
            self._queue.put(None)
            thread.join()

    # ------------------------------------------------------------ inside

    def _begin(self) -> None:
        """Also in a forked child: what the parent gave is sent there, and the lock may be held for ever."""
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Given | None] = queue.SimpleQueue()
        self._hurry = threading.Event()  # somebody waits
        self._thread = None
        self._given = self._answered = self.late = 0
        self._in_vain_at = -1
        self._waiting: list[tuple[int, Future[None]]] = []  # until so many are answered

    def _run(self) -> None:
        while (first := self._next()) is not None:
            self._hurry.wait(_GATHER_S)
            given = [first, *self._others(first.samples)]
            try:
                self._send(given)
            except Exception as error:  # whatever it is: the next ones are sent
                self._tell(sum(one.samples for one in given), error)
            finally:
                self._note_answers(len(given))

    def _others(self, rows: int) -> Iterator[_Given]:
        """What waits as well, until there are many rows; only this thread takes from the queue."""
        while rows < _GATHER_ROWS and not self._queue.empty():
            one = self._queue.get()
            if one is None:
                self._queue.put(None)
                return
            rows += one.samples
            yield one

    def _next(self) -> _Given | None:
        """The next one; None: the thread is to end, which is decided under the lock if it is for idleness."""
        try:
            return self._queue.get(timeout=_IDLE_S)
        except queue.Empty:
            with self._lock:
                if self._queue.empty():
                    self._thread = None
                    return None
        return self._queue.get()

    def _send(self, given: Sequence[_Given]) -> None:
        """Send them as one request, and wait for what becomes of each."""
        left_s = max(one.deadline_s for one in given) - time.monotonic()
        reply = self._peer.begin(_joined(given)).result(max(0.0, left_s))
        assert isinstance(reply, Acked), reply
        for one, reason in zip(given, reply.refused, strict=True):
            if reason:
                self._tell(one.samples, reason)

    def _tell(self, samples: int, reason: object) -> None:
        self.late += samples
        log.warning("%d samples are not acknowledged and may be handed out again: %s", samples, reason)

    def _note_answers(self, count: int) -> None:
        with self._lock:
            self._answered += count
            done = [future for count, future in self._waiting if count <= self._answered]
            self._waiting = [(count, future) for count, future in self._waiting if count > self._answered]
            if not self._waiting and not self._closed:
                self._hurry.clear()
        for future in done:
            future.set_result(None)


class Behind:
    """The controller, as what a client asks it comes behind the acknowledgements that nobody waits for."""

    def __init__(self, peer: AnyPeer, acks: Acknowledger) -> None:
        self.peer = peer
        self._acks = acks

    def __repr__(self) -> str:
        return repr(self.peer)

    @property
    def unput(self) -> set[int]:
        return self.peer.unput

    def begin(self, request: Request, *, request_id: int | None = None) -> Pending:
        earlier = self._acks.earlier() if _comes_behind(request) else None
        if earlier is not None and not concurrent.futures.wait([earlier], _ORDER_S).done:
            self._acks.note_waited_in_vain()
        return self.peer.begin(request, request_id=request_id)

    async def acall(self, request: Request, timeout_s: float, *, request_id: int | None = None) -> Reply:
        earlier = self._acks.earlier() if _comes_behind(request) else None
        if earlier is not None:
            answered, _ = await asyncio.wait([asyncio.wrap_future(earlier)], timeout=_ORDER_S)
            if not answered:
                self._acks.note_waited_in_vain()
        return await self.peer.acall(request, timeout_s, request_id=request_id)

    def notify(self, request: Request) -> None:
        self.peer.notify(request)

    def close(self) -> None:
        self.peer.close()


# ---------------------------------------------------------------- of this process

_all: weakref.WeakSet[Acknowledger] = weakref.WeakSet()
_finalizers: list[Finalize] = []  # the last one, if any; `multiprocessing` forgets it in a child that it forks


def _begin_anew() -> None:
    for acks in list(_all):
        acks._begin()


os.register_at_fork(after_in_child=_begin_anew)


def _finish_at_exit() -> None:
    if not _finalizers or not _finalizers[0].still_active():
        _finalizers[:] = [Finalize(None, _finish, exitpriority=1)]


def _finish() -> None:
    concurrent.futures.wait([acks.settled() for acks in list(_all)], _END_S)


def _joined(given: Sequence[_Given]) -> AckMany:
    requests = [one.request for one in given]
    return AckMany(
        lease_tokens=int64s_of(request.lease_token for request in requests),
        sizes=int64s_of(len(request.indexes) for request in requests),
        indexes=np.concatenate([request.indexes for request in requests]),
        generations=np.concatenate([request.generations for request in requests]),
    )


def _comes_behind(request: Request) -> bool:
    match request:
        case Draw(timeout_s=timeout_s):
            return timeout_s <= 0
        case Renew() | WaitKeys():
            return False
    return True
