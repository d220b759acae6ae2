"""The journal of a storage unit: room for each fact, short, and full."""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.unit.asking_unit import MIB, Answer, free, ids, rows
from tests.unit.returning_unit import ReturningUnit, mapped, write_here
from transfer_queue.errors import CapacityExceeded, InvalidArgument
from transfer_queue.messages import (
    Pin,
    Pinned,
    ProcessId,
    Reserve,
    ReturnSpan,
    Unpin,
)
from transfer_queue.storage import log as fact_log
from transfer_queue.storage.arena import Arena
from transfer_queue.storage.facts import pin_fact
from transfer_queue.storage.log import FactLog
from transfer_queue.storage.spans import Span
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.holders import process_id
from transfer_queue.wire.security import MAX_CLIENT_ID_BYTES


def test_the_room_for_a_fact_suffices_for_the_longest_names(folder: Path) -> None:
    """A span of the longest client id and host, with the largest numbers, fits; a longer host is refused."""
    arena = Arena(folder / ("arena-" + "x" * 64), 4096)
    most, asked = (1 << 63) - 1, ("ä" * (MAX_CLIENT_ID_BYTES // 2), (1 << 63) - 1)
    holder = ProcessId(host="ö" * 64, pid=most, start_time=1e300)
    span = Span(most, most, arena, most, most, holder, asked, [])
    for fact in (span.fact(), pin_fact(most, holder, asked, ids())):
        assert len(msgpack.packb([fact])) < fact_log._FACT_BYTES
    arena.close()
    with UnitService(folder, capacity_bytes=MIB, arena_bytes=MIB) as service:
        request = Reserve(size_bytes=1, holder=ProcessId(host="ö" * 65, pid=1, start_time=0.0), timeout_s=0.0)
        answer = Answer(request)
        service.submit(request, answer.ticket)
        with pytest.raises(InvalidArgument, match="more than 128 bytes"):
            answer.result()


def test_a_full_journal_is_told_of_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As long as it fails; when it worked again, the next failure is news."""
    log, _ = FactLog.open(folder)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    facts: list[Any] = [(1, "x" * (2 * MIB))]
    try:
        for _ in range(2):
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            for _ in range(3):
                log.write(facts)
            assert facts
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            log.write(facts)
            assert not facts
            facts.append((1, "x" * (2 * MIB)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        log.close(remove=True)
    assert len(caplog.messages) == 2


def test_a_full_journal_refuses_grants_and_takes_what_ends_them(unit: ReturningUnit) -> None:
    """With no space for the journal, pins and reservations raise; unpins and frees work, and then all goes on."""
    block = unit.commit(rows(4, 8192))
    many = Pin(blocks=np.repeat(ids(block), 10_000), holder=process_id())
    pins: list[Pinned] = []
    spans: list[Any] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 2, limits[1]))
    try:
        for request, grants in ((many, pins), (Reserve(size_bytes=64, holder=process_id(), timeout_s=0.0), spans)):
            with pytest.raises(CapacityExceeded, match="journal"):
                grants.extend(unit.ask(request) for _ in range(5000))
        stats = unit.stats()
        assert stats["pins"] == len(pins)
        unit.tell(Unpin(pin=pins[0].pin))
        unit.tell(free(block))
        assert unit.stats()["pins"] == len(pins) - 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    unit.come_back()
    assert unit.stats()["pins"] == len(pins) - 1
    for pinned in pins:
        unit.tell(Unpin(pin=pinned.pin))
    assert unit.stats()["blocks"] == 0 and unit.stats()["spans"] == len(spans)
    assert unit.commit(rows(1, 10))


def test_the_journal_stays_short(unit: ReturningUnit) -> None:
    """After facts of many times the size of a snapshot, the files are small, and everything is there again."""
    block = unit.commit(rows(4, 8192))
    span = unit.reserve(MIB // 4)
    at = write_here(mapped(span), span.first_block, rows(1, 100))
    held = unit.ask(Pin(blocks=ids(block, span.first_block), holder=process_id()))
    unit.tell(free(span.first_block))
    many = Pin(blocks=np.repeat(ids(block), 20_000), holder=process_id())
    for _ in range(40):
        unit.tell(Unpin(pin=unit.ask(many).pin))
    deadline = time.monotonic() + 5
    while journal_bytes(unit.folder) > 8 * MIB and time.monotonic() < deadline:
        unit.tell(Unpin(pin=unit.ask(many).pin))
    assert journal_bytes(unit.folder) <= 8 * MIB
    unit.come_back()
    write_here(mapped(span)[at:], span.first_block + 1, rows(1, 100, first=7))
    np.testing.assert_array_equal(unit.read(span.first_block + 1, [0]), rows(1, 100, first=7))
    np.testing.assert_array_equal(unit.read(block, [3]), rows(4, 8192)[[3]])
    unit.tell(Unpin(pin=held.pin))
    unit.tell(free(block, span.first_block + 1))
    unit.tell(ReturnSpan(span=span.span))
    assert unit.all_free()


def journal_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "journal").iterdir())
