"""A storage unit when space is short, when nobody takes its answers, and when holders die."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, Unit, block_of, free, ids, rows
from transfer_queue.errors import (
    BlockLost,
    CapacityExceeded,
    ConnectionLost,
    InvalidArgument,
    StaleSampleError,
    WrongType,
)
from transfer_queue.messages import (
    Done,
    ListUnits,
    Pin,
    ProcessId,
    Reserve,
    Reserved,
    ReturnSpan,
    Write,
)
from transfer_queue.storage.arena import Arena, Arenas
from transfer_queue.wire.holders import process_id


@pytest.fixture
def unit(folder: Path) -> Iterator[Unit]:
    made = Unit(folder, capacity_bytes=4 * MIB, arena_bytes=MIB)
    with made.service:
        yield made


@pytest.fixture
def dead() -> ProcessId:
    """A process that has ended; it was given spans and pins while it lived."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return ProcessId(host=process_id().host, pid=child.pid, start_time=-1.0)


def test_a_unit_grows_and_reuses(unit: Unit) -> None:
    """More than the first arena holds is served by new ones, up to the capacity; freed space serves again."""
    blocks = [unit.put(rows(1, MIB - 8192)) for _ in range(4)]
    assert unit.stats()["bytes_arenas"] == 4 * MIB
    unit.tell(free(*blocks))
    large = unit.put(np.full((1, 4 * MIB - 4096), 5, np.uint8))
    assert unit.stats()["arenas"] == 1
    assert (unit.read(large, [0]) == 5).all()


def test_a_block_beyond_the_capacity_is_refused_at_once(unit: Unit) -> None:
    """What can never fit does not wait, and the error has both sizes."""
    with pytest.raises(CapacityExceeded, match=f"{4 * MIB + 64} bytes exceeds the capacity .* {4 * MIB} bytes"):
        unit.reserve(4 * MIB + 1)
    with pytest.raises(InvalidArgument):
        unit.reserve(0)


def test_a_reservation_waits_for_space_and_raises_at_its_deadline(unit: Unit) -> None:
    """With the unit full, a reservation is parked; another request is served meanwhile; time or space ends the wait."""
    held = [unit.put(rows(1, MIB - 8192)) for _ in range(4)]
    asked = Reserve(size_bytes=MIB // 2, holder=process_id(), timeout_s=5.0)
    first, second = unit.begin(asked), unit.begin(asked)
    unit.turn(4.9)
    assert first.replies == second.replies == [] and unit.stats()["waiting"] == 2
    unit.tell(free(held[0]))
    assert {first.result().size_bytes, second.result().size_bytes} == {MIB // 2} or second.replies == []
    late = unit.begin(asked) if second.replies else second
    unit.turn(5.1)
    with pytest.raises(CapacityExceeded, match=r"no capacity for a block of 524288 bytes within 5\.0 s") as caught:
        late.result()
    assert caught.value.details["limit_bytes"] == 4 * MIB
    assert unit.stats()["waiting"] == 0


def test_an_arena_that_cannot_be_made_is_tried_again(unit: Unit, monkeypatch: pytest.MonkeyPatch) -> None:
    """No descriptor when the file is created, or filled: nothing is left, and the next attempt is made in time."""
    unit.put(rows(1, MIB - 8192))
    asked = Reserve(size_bytes=MIB // 2, holder=process_id(), timeout_s=50.0)
    attempts: list[str] = []

    def fails(*arguments: Any) -> None:
        attempts.append("")
        raise OSError(errno.EMFILE, "too many open files")

    waiting = unit.begin(asked)
    waiting.result()
    for owner, name in ((Arenas, "create"), (Arena, "fill")):
        arenas = unit.stats()["arenas"]
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            waiting = unit.begin(Reserve(size_bytes=MIB - 8192, holder=process_id(), timeout_s=50.0))
            while len(attempts) < 2:
                unit.turn(1.1)
                time.sleep(0.001)
            assert waiting.replies == []
        attempts.clear()
        unit.turn(1.1)
        while not waiting.replies:
            unit.turn(1.1)
            time.sleep(0.001)
        assert isinstance(waiting.result(), Reserved) and unit.stats()["arenas"] == arenas + 1


def test_the_deadline_of_a_reservation_holds_when_the_dead_cannot_be_found(
    unit: Unit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waited is answered though the look at the holders fails."""
    held = unit.put(rows(1, 100))
    unit.ask(Pin(blocks=ids(held), holder=process_id()))
    waiting = unit.begin(Reserve(size_bytes=4 * MIB, holder=process_id(), timeout_s=5.0))

    def fails(holder: ProcessId) -> bool:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr("transfer_queue.storage.reaping.is_alive", fails)
    with pytest.raises(OSError, match="too many open files"):
        unit.turn(5.1)
    with pytest.raises(CapacityExceeded):
        waiting.result()


def test_a_small_reservation_is_not_held_up_by_a_large_one(unit: Unit) -> None:
    """A parked request that cannot be served does not stand in the way of the next."""
    held = [unit.put(rows(1, MIB - 8192)) for _ in range(4)]
    large = unit.begin(Reserve(size_bytes=2 * MIB, holder=process_id(), timeout_s=5.0))
    small = unit.begin(Reserve(size_bytes=MIB // 2, holder=process_id(), timeout_s=5.0))
    unit.tell(free(held[2]))
    assert small.result().size_bytes == MIB // 2 and large.replies == []
    unit.service.lost(large.ticket, None)
    assert unit.stats()["waiting"] == 0


def test_grants_that_nobody_takes_are_undone(unit: Unit) -> None:
    """A span or pin whose reply could not be delivered is given back."""
    block = unit.put(rows(1, 100))
    bytes_free = unit.stats()["bytes_free"]
    for request in (
        Reserve(size_bytes=1000, holder=process_id(), timeout_s=1.0),
        Pin(blocks=ids(block), holder=process_id()),
    ):
        asked = unit.begin(request)
        unit.service.lost(asked.ticket, asked.result())
        stats = unit.stats()
        assert (stats["pins"], stats["spans"], stats["bytes_free"]) == (0, 0, bytes_free)


def test_what_a_dead_process_held_is_released(folder: Path, dead: ProcessId) -> None:
    """Pins, unused tails and unfinished blocks go at once; sealed blocks stay if they were committed."""
    asked: list[list[int]] = []

    def settle(blocks: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        asked.append(sorted(blocks.tolist()))
        if len(asked) == 1:
            raise ConnectionLost("the controller is away")
        return (blocks == committed).astype(np.int64)

    unit = Unit(folder, capacity_bytes=4 * MIB, arena_bytes=MIB, settle=settle)
    with unit.service:
        kept = unit.put(rows(1, 100))
        unit.ask(Pin(blocks=ids(kept), holder=dead))
        committed, orphan = unit.put(rows(1, 100), dead), unit.put(rows(1, 100), dead)
        span = unit.reserve(MIB // 4, dead)
        memory = np.memmap(span.arena, np.uint8, "r+", span.offset, (span.size_bytes,))
        memory[:64] = np.frombuffer(block_of(rows(1, 100)).header(span.first_block, 1), np.uint8)
        alive = unit.reserve(1000)
        while unit.stats()["blocks"] != 2:
            unit.turn(1.1)
        stats = unit.stats()
        assert asked[0] == asked[1] == sorted([committed, orphan])
        assert (stats["pins"], stats["spans"], stats["blocks"]) == (0, 1, 2)
        with pytest.raises(StaleSampleError):
            unit.ask(Pin(blocks=ids(orphan), holder=process_id()))
        assert alive.size_bytes == 1024


def test_writes_stay_inside_their_span(unit: Unit) -> None:
    """A write beyond its span, or to one that was returned, is refused."""
    span = unit.reserve(1000)
    assert unit.ask(Write(span=span.span, offset=24, frames=(b"x" * 500, b"", b"y" * 500))).count == 1000
    for offset in (-1, 25):
        with pytest.raises(InvalidArgument, match="do not fit"):
            unit.ask(Write(span=span.span, offset=offset, frames=(b"x" * 1000,)))
    unit.tell(ReturnSpan(span=span.span))
    with pytest.raises(BlockLost, match="not lent any more"):
        unit.ask(Write(span=span.span, offset=0, frames=(b"x",)))


def test_a_closed_unit_answers_who_waits_and_leaves_no_files(folder: Path) -> None:
    """Close answers parked requests, removes the arenas, and may be called twice."""
    unit = Unit(folder, capacity_bytes=MIB, arena_bytes=MIB)
    unit.reserve(MIB)
    parked = unit.begin(Reserve(size_bytes=MIB, holder=process_id(), timeout_s=5.0))
    unit.service.close()
    unit.service.close()
    with pytest.raises(ConnectionLost, match="was closed"):
        parked.result()
    with pytest.raises(ConnectionLost):
        unit.reserve(100)
    assert [path.name for path in folder.iterdir() if path.name.startswith("arena")] == []
    assert unit.service.tick() is None


def test_requests_of_others_are_refused(unit: Unit) -> None:
    """A request for the controller gets a typed error."""
    with pytest.raises(WrongType, match="ListUnits"):
        unit.ask(ListUnits(timeout_s=0.0))


def test_done_counts_the_bytes_written(unit: Unit) -> None:
    """A write is answered with what it copied."""
    span = unit.reserve(64)
    assert isinstance(unit.ask(Write(span=span.span, offset=0, frames=(b"abc",))), Done)


def test_writers_wait_until_the_unit_knows_its_number(folder: Path) -> None:
    """Before the controller has numbered the unit, nothing that it lends could be named."""
    unit = Unit(folder, number=0, capacity_bytes=64 * MIB, arena_bytes=4 * MIB)
    early = unit.begin(Reserve(size_bytes=100, holder=process_id(), timeout_s=5.0))
    assert early.replies == []
    unit.service.number = 7
    assert early.result().first_block >> 48 == 7
    unit.service.close()
