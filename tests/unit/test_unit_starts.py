"""A storage unit that cannot start, or starts with nothing that it could go on from."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.asking_unit import MIB, ids, rows
from tests.unit.returning_unit import Controller, ReturningUnit
from tests.unit.test_arena import dead_process
from transfer_queue.errors import CapacityExceeded, StaleSampleError
from transfer_queue.messages import Pin
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.holders import process_id

STAGES = ["Arenas", "rebuild", "Growth", "Arenas.check_first"]


@pytest.mark.parametrize(("stage", "returning"), [*((stage, False) for stage in STAGES), ("rebuild", True)])
def test_a_start_that_fails_leaves_nothing_open(
    folder: Path, stage: str, returning: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever raises: no thread, no descriptor, no file of this start; what an earlier process left is there."""
    options: Any = {"capacity_bytes": 4 * MIB, "arena_bytes": MIB}
    if returning:
        last = ReturningUnit(folder, Controller(), **options)
        last.commit(rows(1, 100))
        last.die()
    files = sorted(path.name for path in folder.iterdir())
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(f"transfer_queue.storage.unit.{stage}", _fail)
        with pytest.raises(CapacityExceeded, match="this stage fails"):
            UnitService(folder, journal=True, **options)
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, descriptors)
    assert sorted(path.name for path in folder.iterdir()) == files
    with UnitService(folder, journal=True, **options) as service:
        assert service.recovered == returning


def _fail(*arguments: Any, **named: Any) -> Any:
    raise CapacityExceeded("this stage fails")


@pytest.mark.parametrize("what", ["arenas", "everything", "journal"])
def test_a_unit_that_cannot_go_on_starts_empty(
    unit: ReturningUnit, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """Without arenas or with a damaged journal it says so, keeps no stale file, and reuses no id and no file name."""
    block = unit.commit(rows(4, 1000))
    pinned = unit.ask(Pin(blocks=ids(block), holder=dead_process()))
    unit.die()
    for path in unit.folder.glob("arena-*") if what != "journal" else []:
        path.unlink()
    segment = unit.folder / "journal" / "journal-1"
    if what == "everything":
        for path in (unit.folder / "journal").iterdir():
            path.unlink()
    if what == "journal":
        with segment.open("r+b") as file:
            file.seek(100)
            file.write(b"damage")
    unit.start()
    assert unit.service.recovered == 0 and list(unit.service.lost_blocks) == ([block] if what == "arenas" else [])
    if what == "journal":
        assert "forgets what it stored" in caplog.text and "journal-1" in caplog.text
    unit.service.return_to(3, unit.controller.reconcile)
    assert unit.controller.told[-1] == []
    with pytest.raises(StaleSampleError):
        unit.read(block, [0])
    again = unit.commit(rows(4, 1000))
    assert again != block
    found = unit.ask(Pin(blocks=ids(again), holder=process_id()))
    assert found.arenas != pinned.arenas and len(list(unit.folder.glob("arena-*"))) == 1
    unit.come_back()
    np.testing.assert_array_equal(unit.read(again, [2]), rows(4, 1000)[[2]])


def test_a_file_that_was_being_made_is_removed_and_an_empty_one_kept(unit: ReturningUnit) -> None:
    """Arenas that were offered stay, whether anything lies in them or not."""
    unit.reserve(100)
    [arena] = unit.folder.glob("arena-*")
    unit.die()
    (unit.folder / "arena-0-half").write_bytes(bytes(4096))
    unit.start()
    assert list(unit.folder.glob("arena-*")) == [arena]
    assert unit.stats()["bytes_arenas"] == MIB
