"""Work that a unit does in threads beside: it fails, or waits, and nothing ends with it."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, rows
from tests.unit.returning_unit import Controller, ReturningUnit
from tests.unit.unit_client import Client, figures, put_elsewhere, settled
from transfer_queue.messages import Int64s, ReadBlock
from transfer_queue.storage.log import FactLog
from transfer_queue.wire.holders import ELSEWHERE


def test_an_error_that_nobody_expected_is_no_end(
    unit: ReturningUnit, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Blocks are settled later although it came again and again; the log has it once."""
    client = Client(unit, "far", ELSEWHERE)
    put_elsewhere(client)
    replies = [AssertionError("a reply of another type")] * 3

    def settle(blocks: Int64s) -> Int64s:
        if replies:
            raise replies.pop()
        return np.zeros(len(blocks), np.int64)

    monkeypatch.setattr(unit.service._reaper, "_settle", settle)
    for _ in range(4):
        unit.service.gone("far")
        settled(unit)
    assert not replies and figures(unit) == (0, 0, 0)
    assert len([message for message in caplog.messages if "_settle_dead failed" in message]) == 1


def test_a_snapshot_that_fails_is_not_the_last_one(unit: ReturningUnit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it failed of."""
    tried = []

    def fail(*arguments: Any) -> None:
        tried.append(arguments)
        raise MemoryError

    monkeypatch.setattr(FactLog, "wants_snapshot", property(lambda log: True))
    monkeypatch.setattr(FactLog, "finish_snapshot", staticmethod(fail))
    deadline = time.monotonic() + 20.0
    while len(tried) < 2:
        assert time.monotonic() < deadline, "it was not tried again"
        unit.ask(ReadBlock(block=unit.put(rows(1, 10)), offset=0, max_bytes=1))


def test_a_unit_grows_while_its_controller_is_away(folder: Path) -> None:
    """Blocks of clients that are gone wait for the controller, in all threads beside; arenas are made nevertheless."""
    controller, back = Controller(), threading.Event()
    controller.settle = lambda blocks: (back.wait(20), np.ones(len(blocks), np.int64))[1]  # type: ignore[method-assign]
    unit = ReturningUnit(folder, controller, capacity_bytes=8 * MIB, arena_bytes=MIB)
    with contextlib.closing(unit):
        for name in ("a", "b", "c"):
            put_elsewhere(Client(unit, name, ELSEWHERE))
            unit.service.gone(name)
            unit.turn(1.0)
        assert Client(unit, "here").reserve(2 * MIB).size_bytes == 2 * MIB
        back.set()
