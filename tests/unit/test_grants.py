"""What a client has of a unit, told over real sockets: nothing stays granted because a message was lost."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, Unit, ids, rows
from tests.unit.returning_unit import Controller
from tests.unit.serving import TOKEN
from transfer_queue.errors import InvalidArgument
from transfer_queue.messages import (
    AbortBlocks,
    Fetch,
    GetUnitStats,
    Pin,
    Pinned,
    Reserve,
    Reserved,
    ReturnSpan,
    StillHeld,
    Unpin,
)
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire import grants
from transfer_queue.wire.bell import Bell
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.grants import Grants
from transfer_queue.wire.holders import ELSEWHERE, process_id
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.requests import RequestIds
from transfer_queue.wire.server import Server

WAIT_S = 20.0


class Place(Unit):
    """A unit that listens, dies and comes back at the same place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.controller = Controller()
        self.port = 0
        self.told: list[StillHeld] = []
        self.start()

    def start(self) -> None:
        self.service = UnitService(
            self.folder, capacity_bytes=4 * MIB, arena_bytes=MIB, journal=True, settle=self.controller.settle
        )
        self.service.return_to(3, self.controller.reconcile)
        self.submit, self.service.submit = self.service.submit, self._submit  # type: ignore[method-assign]
        path = str(self.folder / "request")
        self.server = Server(self.service, TOKEN, local_path=path, tcp_port=self.port).start()
        self.port = int(self.server.address.rpartition(":")[2])

    def _submit(self, request: Any, ticket: Any) -> None:
        if isinstance(request, StillHeld):
            self.told.append(request)
        self.submit(request, ticket)

    def die(self) -> None:
        self.server.close()
        self.service.abandon()

    def come_back(self) -> None:
        self.die()
        self.start()

    def close(self) -> None:
        self.server.close()
        self.service.close()

    def has(self, spans: int, pins: int) -> bool:
        stats = self.stats()
        return (stats["spans"], stats["pins"]) == (spans, pins)


@pytest.fixture
def place() -> Iterator[Place]:
    with ServerFolder("test") as folder, contextlib.closing(Place(folder.path)) as made:
        yield made


@pytest.fixture
def peer(place: Place) -> Iterator[Peer]:
    with contextlib.closing(Peer.at(place.server.local_address, token=TOKEN, client_id="c")) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def reserve(peer: Any, **options: Any) -> Reserved:
    request = Reserve(size_bytes=4096, timeout_s=5.0, **{"holder": process_id(), **options})
    reply: Reserved = peer.begin(request).result(WAIT_S)
    return reply


def pin(peer: Any, *blocks: int) -> Pinned:
    reply: Pinned = peer.begin(Pin(blocks=ids(*blocks), holder=process_id())).result(WAIT_S)
    return reply


@pytest.mark.parametrize("face", ["blocking", "awaitable"])
@pytest.mark.parametrize("end", ["message", "close"])
def test_what_ends_while_the_unit_is_away_is_told_when_it_is_back(
    place: Place, peer: Peer, face: str, end: str
) -> None:
    """Nobody uses the connection any more, and yet a pin and a span are given back; what is still held stays."""
    block = place.put(rows(1, 100))
    span, kept = reserve(peer), reserve(peer)
    pinned = pin(peer, block)
    assert place.has(2, 1)
    place.die()

    async def give_back() -> None:
        for message in (ReturnSpan(span=span.span), Unpin(pin=pinned.pin)):
            peer.notify(message)

    started = time.monotonic()
    if end == "close":
        peer.close()
    if face == "awaitable":
        asyncio.run(give_back())
    else:
        peer.notify(ReturnSpan(span=span.span))
        peer.notify(Unpin(pin=pinned.pin))
    assert time.monotonic() - started < 1.0  # nobody waits for the unit
    place.start()
    until(lambda: place.has(1, 0))
    assert kept.span in place.service._space.spans


def test_an_abort_arrives_although_the_unit_was_away(place: Place, peer: Peer) -> None:
    """It names a block, so it is kept until the unit has it; the client does not name the block any more."""
    span = reserve(peer)
    peer.unput.add(span.first_block)
    place.die()
    peer.notify(AbortBlocks(blocks=ids(span.first_block)))
    assert peer.unput == set()
    aborted: list[int] = []
    place.start()
    place.service._space.abort = lambda client, blocks: aborted.extend(blocks.tolist())  # type: ignore[method-assign]
    until(lambda: aborted == [span.first_block])
    del place.service._space.abort


@pytest.mark.parametrize("face", ["blocking", "awaitable"])
@pytest.mark.parametrize("other", [False, True])
def test_an_abort_that_was_lost_on_its_way_comes_with_the_next_use(
    place: Place, face: str, other: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TCP nobody is told that the connection broke with it. `other`: the next use is of another link."""
    aborted: list[int] = []
    abort = place.service._space.abort
    monkeypatch.setattr(place.service._space, "abort", lambda *what: (aborted.extend(what[1].tolist()), abort(*what)))

    async def use() -> None:
        await peer.acall(GetUnitStats(), WAIT_S)

    with contextlib.closing(Peer.at(place.server.address, token=TOKEN, client_id="far")) as peer:
        block = reserve(peer, holder=ELSEWHERE).first_block
        [link] = peer._pool._idle
        with monkeypatch.context() as broken:
            broken.setattr(link, "_send", lambda frames, hold=False: None)
            peer.notify(AbortBlocks(blocks=ids(block)))
        assert peer._pool._idle == [link]
        if other:
            peer._pool._idle.append(peer._pool._open_link(peer._pool.bell.fd, peer._pool.grants.preface))
        else:
            link._introduction.lost()
            link._greet()
        for turn in range(2):
            if face == "awaitable":
                asyncio.run(use())
            else:
                peer.begin(GetUnitStats()).result(WAIT_S)
            assert aborted == [block], turn  # an answer shows that it arrived
        assert link.take_kept() == []


def test_every_connection_begins_with_what_is_held(place: Place, peer: Peer) -> None:
    """Before the request that it was made for, and before those that are sent again; not before anything was held."""
    peer.begin(GetUnitStats()).result(WAIT_S)
    span = reserve(peer)
    assert place.told == []
    order: list[type] = []
    submit = place.submit

    def note(request: Any, ticket: Any) -> None:
        order.append(type(request))
        submit(request, ticket)

    place.submit = note
    thread = threading.Thread(target=lambda: [peer.begin(GetUnitStats()).result(WAIT_S) for _ in range(2)])
    first = peer.begin(GetUnitStats())  # so that the other thread needs a connection of its own
    thread.start()
    thread.join()
    first.result(WAIT_S)
    assert [kind for kind in order if kind is StillHeld] == [StillHeld]
    assert order.index(StillHeld) < len(order) - 2
    assert len(place.told[0].requests) == 3 and place.told[0].before > place.told[0].requests.max()
    place.come_back()
    peer.begin(GetUnitStats()).result(WAIT_S)
    assert len(place.told) == 2
    peer.notify(ReturnSpan(span=span.span))


def test_a_peer_that_is_closed_leaves_nothing(place: Place, peer: Peer) -> None:
    """The unit died with the last message unread in its socket: who closes the peer tells it again."""
    span = reserve(peer)
    place.service._space.return_span = lambda *which: None  # type: ignore[method-assign]
    peer.notify(ReturnSpan(span=span.span))
    place.die()
    peer.close()
    place.start()
    assert place.has(1, 0) or place.told
    until(lambda: place.has(0, 0))


def test_a_unit_that_is_gone_for_good_is_not_waited_for(place: Place, peer: Peer) -> None:
    """Its folder is gone: the thread that would tell it ends."""
    span = reserve(peer)
    place.close()
    (place.folder / "request").unlink(missing_ok=True)
    peer.notify(ReturnSpan(span=span.span))
    assert couriers()
    for path in place.folder.iterdir():
        path.unlink()
    place.folder.rmdir()
    until(lambda: not couriers())


def test_a_unit_that_never_returns_is_not_waited_for_for_ever(
    place: Place, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is kept for the next process. While the client is open the thread goes on; then it ends some time."""
    monkeypatch.setattr(grants, "_LAST_TRIES_S", 0.2)
    monkeypatch.setattr(grants, "_WAIT_S", 0.01)
    span = reserve(peer)
    place.die()
    peer.notify(ReturnSpan(span=span.span))
    time.sleep(0.3)
    assert couriers() == 1
    peer.close()
    until(lambda: couriers() == 0)
    place.start()


def test_a_message_is_delivered_when_there_is_a_descriptor_again(
    place: Place, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one the thread that would tell the unit waits."""
    span = reserve(peer)
    failures = [OSError(errno.EMFILE, "Too many open files")] * 2

    def bell() -> Bell:
        if failures:
            raise failures.pop()
        return Bell()

    monkeypatch.setattr(grants, "Bell", bell)
    monkeypatch.setattr(grants, "_WAIT_S", 0.05)
    place.die()
    peer.notify(ReturnSpan(span=span.span))
    place.start()
    until(lambda: place.has(0, 0) and not couriers())
    assert failures == []


def couriers() -> int:
    return sum(thread.name == "tq-courier" for thread in threading.enumerate())


@pytest.mark.parametrize("face", ["blocking", "awaitable"])
def test_a_grant_that_came_to_nobody_is_taken_back(place: Place, peer: Peer, face: str) -> None:
    """The call is interrupted when its reply is here already."""
    block = place.put(rows(1, 100))

    async def cancelled() -> None:
        await peer.acall(GetUnitStats(), WAIT_S)
        for turns in range(5):  # in one of them the reply is here, and the call does not know
            call = asyncio.ensure_future(peer.acall(Pin(blocks=ids(block), holder=process_id()), WAIT_S))
            for _ in range(3):
                await asyncio.sleep(0)
            until(lambda: place.has(0, 1))  # blocks the loop, so that the reply waits in the socket
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            [outcome] = await asyncio.gather(call, return_exceptions=True)
            if isinstance(outcome, Pinned):
                peer.notify(Unpin(pin=outcome.pin))
            until(lambda: place.has(0, 0))

    if face == "awaitable":
        asyncio.run(cancelled())
    else:
        withdrawn, last = (peer.begin(Pin(blocks=ids(block), holder=process_id())) for _ in range(2))
        reply: Any = last.result(WAIT_S)
        withdrawn.cancel()
        peer.notify(Unpin(pin=reply.pin))
    until(lambda: place.has(0, 0))


def test_a_producer_elsewhere_that_vanishes_holds_nothing(place: Place) -> None:
    """The server notices that the connection is gone, and the span is free within the grace period and two turns."""
    far = Peer.at(place.server.address, token=TOKEN, client_id="far")
    here = Peer.at(place.server.address, token=TOKEN, client_id="here")
    reserve(far, holder=ELSEWHERE)
    reserve(here)
    assert place.has(2, 0)
    place.server._desk.gate.presence._grace_s = 0.1
    for each in (far, here):
        each.close()
    until(lambda: place.has(1, 0))


@pytest.mark.parametrize("kind", [Peer, LocalPeer])
def test_a_client_id_is_bounded_where_it_enters(place: Place, kind: type) -> None:
    """As the name on the wire, with all that is added to it, has to fit."""
    with pytest.raises(InvalidArgument, match="at most 243 bytes, not 244"):
        _peer_of(kind, place, "x" * 244)
    longest = _peer_of(kind, place, "ä" * 121 + "x")
    reserve(longest)
    longest.close()


def _peer_of(kind: type, place: Place, client_id: str) -> Any:
    if kind is LocalPeer:
        return LocalPeer(place.service, client_id)
    return Peer.at(place.server.address, token=TOKEN, client_id=client_id)


def test_requests_are_named_from_before_they_are_sent_until_they_are_given_back() -> None:
    """Under way, granted, given back; a request that was granted nothing is not named."""
    known = RequestIds()
    noted = Grants(known)
    assert noted.preface() is None

    def named() -> set[int]:
        before, under_way = known.under_way()
        assert all(number < before for number in under_way)
        return {*under_way, *noted._held.values()}

    number, _ = known.take()
    assert named() == {number}
    request = Reserve(size_bytes=1, holder=process_id(), timeout_s=0.0)
    reserved = Reserved(span=7, first_block=1, arena="", offset=0, size_bytes=1)
    noted.concluded(request, number, reserved)
    known.answered(number)
    assert named() == {number} and noted.used
    assert not noted.given_back(Fetch(blocks=ids(), slots=ids(), fields=(), max_bytes=1))
    assert noted.given_back(ReturnSpan(span=7)) and named() == set()
    assert noted.given_back(AbortBlocks(blocks=np.empty(0, np.int64)))
    other, _ = known.take()
    noted.concluded(request, other, None)
    known.answered(other)
    assert named() == set() and noted.preface() is not None
