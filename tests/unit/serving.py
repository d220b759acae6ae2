"""A handler to serve in tests, a client made of bare frames, and how to wait for what happens."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from transfer_queue.errors import InvalidArgument
from transfer_queue.messages import (
    Announce,
    Announced,
    Cancel,
    Draw,
    Drawn,
    FreesDone,
    GetAudit,
    GetExplanation,
    ListPartitions,
    ListUnits,
    Names,
    Put,
    PutDone,
    Reply,
    Report,
    Request,
)
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.codec import decode, encode_message
from transfer_queue.wire.line import open_line
from transfer_queue.wire.peer import AnyPeer
from transfer_queue.wire.security import Introduction, Kind
from transfer_queue.wire.ticket import Ticket

TOKEN = b"t" * 32
WAIT_S = 20.0

MakePeer: TypeAlias = Callable[..., AnyPeer]


class Recorder:
    """Answers audits with what they ask for, counts puts, lets draws and `ListUnits` wait, and notes all it is told."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.requests: list[Request] = []
        self.tickets: list[Ticket] = []
        self.lost_replies: list[tuple[Ticket, Reply | None]] = []
        self.holders: set[str] = set()
        self.gone_clients: list[str] = []
        self.puts = 0
        self.park_puts = False
        self.ticks = 0
        self.next_tick_s: float | None = None

    def submit(self, request: Request, ticket: Ticket) -> None:
        with self.changed:
            self.requests.append(request)
            match request:
                case GetAudit(partition_id=asked):
                    ticket.answer(Report(entries={"asked": asked}))
                case ListPartitions():
                    ticket.answer(Names(names=(ticket.client_id,)))
                case Put():
                    self.puts += 1
                    self.tickets.append(ticket)
                    if not self.park_puts:
                        ticket.answer(put_done(self.puts))
                case Announce():
                    self.tickets.append(ticket)
                    ticket.answer(Announced(number=len(self.requests)))
                case GetExplanation(task_name="bug"):
                    raise ZeroDivisionError("a bug in the handler")
                case GetExplanation(task_name="unsendable"):
                    ticket.answer(Report(entries={"x": object()}))
                case GetExplanation():
                    ticket.answer(InvalidArgument("no such task", known=["a"]))
                case Draw() | ListUnits():
                    self.tickets.append(ticket)
            self.changed.notify_all()

    def tick(self) -> float | None:
        with self.changed:
            self.ticks += 1
            self.changed.notify_all()
            return self.next_tick_s

    def lost(self, ticket: Ticket, reply: Reply | None) -> None:
        with self.changed:
            self.lost_replies.append((ticket, reply))
            self.changed.notify_all()

    def gone(self, client_id: str) -> None:
        with self.changed:
            self.gone_clients.append(client_id)
            self.changed.notify_all()

    def holding(self) -> set[str]:
        return self.holders

    def wait_for(self, predicate: Callable[[], Any]) -> None:
        """Wait until something that this handler was told makes the predicate true."""
        with self.changed:
            assert self.changed.wait_for(predicate, WAIT_S), "it did not happen"


class BareClient:
    """A connection that sends the frames it is told to."""

    def __init__(self, address: str, client_id: str = "bare/1", token: bytes = TOKEN) -> None:
        self._bell = Bell()
        self.line = open_line(address, self._bell.fd)
        self.introduction = Introduction(token, client_id)

    def __enter__(self) -> BareClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.line.close()
        self._bell.close()

    def introduce(self) -> BareClient:
        frame: bytes | None = self.introduction.hello()
        while not self.introduction.welcomed:
            if frame is not None:
                self.send_frames(frame)
            frame = self.introduction.receive(self.receive_frames()[0])
        return self

    def send_frames(self, *frames: bytes) -> None:
        assert self.line.send(frames)

    def receive_frames(self) -> list[Any]:
        """Return the next message, leaving out the empty frame with which a TCP connection begins."""
        deadline = time.monotonic() + WAIT_S
        while (frames := self.line.next()) in (None, [b""]):
            assert self.line.connected and time.monotonic() < deadline, "nothing came"
            self.line.wait(0.1)
            self.line.read()
        return frames

    def send(self, request: Any, request_id: int, floor: int = 1) -> None:
        self.send_frames(*encode_message(request, request_id, floor))

    def receive(self) -> tuple[int, Any]:
        """Return the next (request id, message), leaving out pings."""
        while True:
            frames = self.receive_frames()
            if frames[0][0] == Kind.MESSAGE:
                return decode(frames)

    def ask(self, request: Any, request_id: int, floor: int = 1) -> Any:
        self.send(request, request_id, floor)
        answered, reply = self.receive()
        assert answered == request_id
        return reply

    def cancel(self, request_id: int) -> None:
        self.send(Cancel(request_id=request_id), 0)


def put() -> Put:
    return Put(
        partition_id="p",
        global_step=None,
        num_rows=1,
        indexes=None,
        generations=None,
        keys=None,
        tags=None,
        group_ids=None,
        group_size=None,
        block_id=0,
        columns=(),
        timeout_s=1.0,
    )


def put_done(number: int) -> PutDone:
    return PutDone(partition_id="p", indexes=np.array([number]), generations=np.array([1]))


def draw() -> Draw:
    return Draw(
        partition_id="p",
        global_step=None,
        task_name="t",
        fields=(),
        batch_size=1,
        get_n_samples=False,
        sampler_params={},
        timeout_s=1.0,
    )


def drawn(number: int) -> Drawn:
    return Drawn(
        partition_id="p",
        indexes=np.array([number]),
        generations=np.array([1]),
        fields=(),
        columns=(),
        locations=(),
        produced=None,
        keys=None,
        tags=None,
        group_ids=None,
        extra_info={},
    )


def explain(task_name: str) -> GetExplanation:
    return GetExplanation(partition_id="p", global_step=None, task_name=task_name, fields=(), batch_size=1)


def announce() -> Announce:
    return Announce(unit_id="u", address="", local_address="", folder="", nonce="", capacity_bytes=1)


def frees_done(sequence: int) -> FreesDone:
    return FreesDone(unit_id="u", sequence=sequence)


def ask(peer: AnyPeer, what: str) -> Any:
    """Return what the server says that it was asked for."""
    reply = peer.begin(GetAudit(partition_id=what)).result(WAIT_S)
    assert isinstance(reply, Report)
    return reply.entries["asked"]


async def aask(peer: AnyPeer, what: str) -> Any:
    reply = await peer.acall(GetAudit(partition_id=what), WAIT_S)
    assert isinstance(reply, Report)
    return reply.entries["asked"]


def eventually(predicate: Callable[[], bool]) -> None:
    """Wait for what ZeroMQ does in threads of its own."""
    deadline = time.monotonic() + WAIT_S
    while not predicate():
        assert time.monotonic() < deadline, "it did not happen"
        os.sched_yield()
