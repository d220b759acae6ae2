"""Leases: saying that the rows of a draw are done with, giving them back, keeping them for longer."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from transfer_queue.client import reading
from transfer_queue.client.arguments import check_meta, lease_seconds, timeout_seconds
from transfer_queue.client.core import ClientCore, changed
from transfer_queue.client.drivers import arun, run
from transfer_queue.client.steps import Call, Operation, Wait
from transfer_queue.errors import ConnectionLost, InvalidArgument, LeaseExpired, TransferQueueError, WrongType
from transfer_queue.messages import Ack, Done, Drop, Leased, Release, Renew
from transfer_queue.metadata import BatchMeta

if TYPE_CHECKING:
    from tensordict import TensorDict

K = TypeVar("K", bound=Ack | Release)
Batch: TypeAlias = "tuple[BatchMeta, TensorDict]"

_STOP_S = 5.0


def ack(core: ClientCore, metadata: BatchMeta, *, wait: bool = True, timeout: float | None = None) -> Operation[int]:
    """The rows are done with: their task consumed them. Returns how many this call consumed.

    A part of a draw may be acknowledged, and the rest later; rows of several leases go to each. Acknowledging again
    is no error and consumes nothing. Raises `LeaseExpired`, consuming nothing of that lease, if it ran out: the rows
    may have been handed out again; `InvalidArgument` for rows that are not leased.

    With `wait=False` it returns 0 at once, and the answer comes while this process works on. What this client asks
    later finds the rows consumed. If they are not, as where waiting would have raised, or where no answer comes within
    `timeout` seconds, a warning is logged and `late_acks` counts them. At most 32 are under way: the next one waits for
    those. `close` waits for all.
    """
    timeout_s = timeout_seconds(timeout)
    if wait:
        return (yield from _settle(core, metadata, Ack, timeout_s))
    yield from _leave(core, _requests(metadata, Ack), timeout_s)
    return 0


def settled(core: ClientCore, timeout_s: float) -> Operation[bool]:
    """Wait for the acknowledgements that nobody waits for; returns whether all are answered."""
    if not core.acks.outstanding:
        return True
    done: bool = yield Wait(core.acks.settled(), timeout_s)
    return done


def release(core: ClientCore, metadata: BatchMeta, *, timeout: float | None = None) -> Operation[int]:
    """Give the rows back, to be drawn again. Returns how many. Raises as `ack`."""
    return (yield from _settle(core, metadata, Release, timeout_seconds(timeout)))


def renew(
    core: ClientCore, metadata: BatchMeta, lease: float | None = None, *, timeout: float | None = None
) -> Operation[None]:
    """The leases of the rows last `lease` seconds from now (None: as long as they were granted for).

    `metadata.lease_deadline_s` is set anew. Raises `LeaseExpired` if a lease ran out.
    """
    check_meta(metadata)
    yield from _renew(core, metadata, lease_seconds(lease), timeout_seconds(timeout))


def drop(core: ClientCore, metadata: BatchMeta, reason: str, *, timeout: float | None = None) -> Operation[int]:
    """Take the rows out for good: no task gets them any more, and groups are complete without them.

    They are accounted under `reason`. Returns their number. Raises `StaleSampleError`, dropping nothing, if any of them
    is gone already.
    """
    check_meta(metadata)
    if not isinstance(reason, str):
        raise WrongType(f"reason must be a str, not {reason!r}")
    if not reason:
        raise InvalidArgument("say why the samples are dropped: reason must not be empty")
    if len(metadata) == 0:
        return 0
    rows = _distinct(metadata, np.arange(len(metadata)))
    return (yield from changed(core, Drop(**rows, reason=reason), timeout_seconds(timeout)))


class LeasedBatch:
    """What `client.leased` returns; for `with` and for `async with`, once."""

    def __init__(
        self,
        core: ClientCore,
        draw: Callable[[], Operation[BatchMeta]],
        lease_s: float,
        fields: Sequence[str] | None,
        renew: bool,
        wait: bool,
    ) -> None:
        self._core = core
        self._draw = draw
        self._lease_s = lease_s
        self._fields = fields
        self._renew = renew
        self._wait = wait
        self._meta: BatchMeta | None = None
        self._renewal: Renewal | None = None

    def __enter__(self) -> Batch:
        return run(self._begin())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        run(self._end(error))

    async def __aenter__(self) -> Batch:
        return await arun(self._begin())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await arun(self._end(error))

    def _begin(self) -> Operation[Batch]:
        self._meta = meta = yield from self._draw()
        try:
            if self._renew:
                self._renewal = Renewal(self._core, meta, self._lease_s)
            return meta, (yield from reading.get_data(self._core, meta, self._fields))
        except BaseException as error:
            yield from self._end(error)
            raise

    def _end(self, error: BaseException | None) -> Operation[None]:
        assert self._meta is not None
        try:
            if error is None:
                yield from ack(self._core, self._meta, wait=self._wait)
            else:
                yield from release(self._core, self._meta)
        except TransferQueueError as failure:
            if error is not None:
                _note(error, failure)
            elif isinstance(failure, LeaseExpired):
                raise self._too_late(failure) from failure
            else:
                raise
        finally:
            if self._renewal is not None:
                self._renewal.stop()
                yield Wait(self._renewal.ended, _STOP_S)

    def _too_late(self, expired: LeaseExpired) -> LeaseExpired:
        return LeaseExpired(
            f"{expired.message}. The work of this block may be done twice: it took longer than its lease of "
            f"{self._lease_s:g} s; give a longer lease=, or renew=True",
            **expired.details,
        )


class Renewal:
    """Renews the leases of a meta, in a thread of its own, until it is stopped or a lease is over."""

    def __init__(self, core: ClientCore, metadata: BatchMeta, lease_s: float) -> None:
        self.ended: Future[None] = Future()
        self._core = core
        self._meta = metadata
        self._lease_s = lease_s
        self._over = threading.Event()
        threading.Thread(target=self._run, name="tq-renewal", daemon=True).start()

    def stop(self) -> None:
        """Returns at once; `ended` tells when it is over."""
        self._over.set()

    def _run(self) -> None:
        try:
            while not self._over.wait(self._pause_s()):
                with contextlib.suppress(ConnectionLost):  # the controller may come back before the lease is over
                    run(_renew(self._core, self._meta, None, self._lease_s / 3))
        except TransferQueueError:
            return  # the lease is over; who leaves the block is told so
        finally:
            self.ended.set_result(None)

    def _pause_s(self) -> float:
        """Up to when two thirds of the lease are left; shorter after a renewal that failed."""
        left_s = (self._meta.lease_deadline_s or 0.0) - time.monotonic()
        return max(left_s - self._lease_s * 2 / 3, self._lease_s / 20)


# ---------------------------------------------------------------- inside


def _settle(core: ClientCore, metadata: BatchMeta, kind: type[Ack] | type[Release], timeout_s: float) -> Operation[int]:
    requests = _requests(metadata, kind)
    if len(requests) == 1:
        return (yield from changed(core, requests[0], timeout_s))
    replies: list[Done] = yield [Call(core.controller, request, timeout_s) for request in requests]
    return sum(reply.count for reply in replies)


def _leave(core: ClientCore, requests: Sequence[Ack], timeout_s: float) -> Operation[None]:
    """Have these sent, as soon as no more than some are under way."""
    deadline_s = time.monotonic() + timeout_s
    while requests and not core.acks.give(requests, left_s := max(0.0, deadline_s - time.monotonic())):
        if not (yield Wait(core.acks.settled(), left_s)):
            raise ConnectionLost(f"{core.acks.outstanding} acknowledgements got no answer: is the controller alive?")


def _requests(metadata: BatchMeta, kind: type[K]) -> list[K]:
    """One for each lease."""
    check_meta(metadata)
    leases = metadata.rows_by_lease() if len(metadata) else {}
    return [kind(lease_token=token, **_distinct(metadata, rows)) for token, rows in leases.items()]


def _renew(core: ClientCore, metadata: BatchMeta, lease_s: float | None, timeout_s: float) -> Operation[None]:
    if len(metadata) == 0:
        return
    tokens = list(metadata.rows_by_lease())
    asked_s = time.monotonic()
    calls = [Call(core.controller, Renew(lease_token=token, lease_s=lease_s), timeout_s) for token in tokens]
    replies: list[Leased] = yield calls
    for token, reply in zip(tokens, replies, strict=True):
        metadata.mark_renewed(token, asked_s + reply.lease_s)


def _distinct(metadata: BatchMeta, rows: Any) -> dict[str, Any]:
    """Indexes and generations of these rows, each sample once."""
    indexes, generations = metadata.indexes[rows], metadata.generations[rows]
    if (indexes[1:] <= indexes[:-1]).any():
        indexes, first = np.unique(indexes, return_index=True)
        generations = generations[first]
    return {"indexes": indexes, "generations": generations}


def _note(error: BaseException, failure: TransferQueueError) -> None:
    """Say beside the error that ends a block what else went wrong."""
    text = f"the leased samples could not be given back: {type(failure).__name__}: {failure}"
    vars(error).setdefault("__notes__", []).append(text)  # as `add_note` of Python 3.11
