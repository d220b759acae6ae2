"""A storage unit killed at any moment of any work: no live byte changes, nothing leaks."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.asking_unit import MIB, block_of, clear, free, ids, rows
from tests.unit.returning_unit import Controller, ReturningUnit, bytes_of, mapped, write_here
from transfer_queue.messages import Pin, Pinned, ReturnSpan, Unpin
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.holders import process_id

# ---------------------------------------------------------------- any order


class Model:
    """What must be true of a unit, whatever happens: rows that are not cleared, and bytes under pins, are unchanged."""

    def __init__(self, folder: Path) -> None:
        self.unit = ReturningUnit(folder, capacity_bytes=2 * MIB, arena_bytes=MIB)
        self.controller = self.unit.controller
        self.stored: dict[int, np.ndarray[Any, Any]] = {}
        self.pins: list[tuple[Pinned, list[tuple[int, bytes]]]] = []
        self.seen: set[int] = set()
        self.span = self.unit.reserve(MIB // 4)
        self.at = self.count = 0

    def do(self, kind: str, seed: int) -> None:
        block = list(self.stored)[seed % len(self.stored)] if self.stored else None
        if kind == "r":
            self.unit.come_back()
            assert self.unit.service.lost_blocks == {}
        elif kind in "psw" and len(self.stored) < 8:
            self._put(kind, seed)
        elif kind == "u" and self.pins:
            pinned, _ = self.pins.pop(seed % len(self.pins))
            self.unit.tell(Unpin(pin=pinned.pin))
        elif block is not None:
            self._use(kind, seed, block)

    def check(self) -> None:
        self.unit.stats()
        for block, values in self.stored.items():
            left = sorted(set(range(len(values))) - self.controller.cleared.get(block, set()))
            if left:
                np.testing.assert_array_equal(self.unit.read(block, left), values[left])
        for pinned, images in self.pins:
            for at, image in images:
                assert bytes_of(pinned)[at : at + len(image)].tobytes() == image

    def end(self) -> None:
        for pinned, _ in self.pins:
            self.unit.tell(Unpin(pin=pinned.pin))
        self.controller.committed.clear()
        self.unit.tell(free(*self.stored))
        self.unit.tell(ReturnSpan(span=self.span.span))
        assert self.unit.all_free()

    def _put(self, kind: str, seed: int) -> None:
        values = rows(1 + seed % 20, 1 + seed % 6000, first=seed % 200)
        if kind == "w":
            size = block_of(values).size_bytes
            if self.at + size > self.span.size_bytes:
                return
            block = self.span.first_block + self.count
            write_here(mapped(self.span)[self.at :], block, values)
            self.controller.committed.add(block)
            self.at, self.count = self.at + size, self.count + 1
        elif kind == "s":
            shared = np.random.default_rng(seed).permutation(np.arange(len(values) + seed % 11) % len(values))
            block, values = self.unit.commit(values, references=shared), values[shared]
        else:
            block = self.unit.commit(values)
        assert block not in self.seen
        self.seen.add(block)
        self.stored[block] = values

    def _use(self, kind: str, seed: int, block: int) -> None:
        values = self.stored[block]
        if kind == "n":
            pinned = self.unit.ask(Pin(blocks=ids(block), holder=process_id()))
            image, width = bytes_of(pinned).tobytes(), values.shape[1]
            left = set(range(len(values))) - self.controller.cleared.get(block, set())
            found = [(image.find(values[slot].tobytes()), values[slot].tobytes()) for slot in left if width > 8]
            self.pins.append((pinned, found))
        elif kind in "co":
            slots = [slot for slot in range(len(values)) if seed >> slot & 1]
            self.controller.cleared.setdefault(block, set()).update(slots)
            if kind == "o":  # the order is lost with the unit
                self.unit.come_back()
            self.unit.tell(clear(block, slots))
        elif kind == "f":
            self.controller.committed.discard(block)
            self.unit.tell(free(block))
            del self.stored[block]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ppswwfccnuro"), st.integers(0, 1 << 30)), max_size=30))
def test_any_order_of_work_and_deaths_keeps_every_live_byte(steps: list[tuple[str, int]]) -> None:
    """Puts, clears, frees, pins, and deaths in between: no live byte changes, no id comes twice, nothing leaks."""
    with ServerFolder("random") as folder:
        model = Model(folder.path)
        try:
            for kind, seed in steps:
                model.do(kind, seed)
                model.check()
            model.unit.come_back()
            model.check()
            model.end()
        finally:
            model.unit.close()


# ---------------------------------------------------------------- a real process


WORKER = """
import os, random, sys
from pathlib import Path
from tests.unit.asking_unit import MIB, clear, free, ids, rows
from tests.unit.returning_unit import ReturningUnit
from transfer_queue.messages import Pin, Unpin
from transfer_queue.wire.holders import process_id

def say(*words):
    os.write(1, (" ".join(map(str, words)) + chr(10)).encode())  # a line is told whole or not at all


unit = ReturningUnit(Path(sys.argv[1]), capacity_bytes=64 * MIB, arena_bytes=MIB)
chance, stored = random.Random(int(sys.argv[2])), []
while True:
    width, first = chance.randrange(1, 9000), chance.randrange(200)
    block = unit.put(rows(8, width, first=first))
    say("put", block, width, first)
    stored.append(block)
    pinned = unit.ask(Pin(blocks=ids(*stored), holder=process_id()))
    if len(stored) > 20:
        gone = stored.pop(chance.randrange(len(stored)))
        say("free", gone)
        unit.tell(free(gone))
    some = chance.choice(stored)
    slots = [chance.randrange(8)]
    say("clear", some, *slots)
    unit.tell(clear(some, slots))
    if chance.random() < 0.98:
        unit.tell(Unpin(pin=pinned.pin))
"""


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_process_is_taken_over(folder: Path, seed: int) -> None:
    """SIGKILL at any moment: the next process has every row that was put and not about to be cleared."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, str(folder), str(seed)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    ) as worker:
        assert worker.stdout is not None
        said = [worker.stdout.readline() for _ in range(40 + 97 * seed)]
        worker.kill()
        said += worker.stdout.read().splitlines()
    controller = Controller()
    stored: dict[int, np.ndarray[Any, Any]] = {}
    for line in said:
        kind, block, *numbers = line.split()
        if kind == "put":
            stored[int(block)] = rows(8, int(numbers[0]), first=int(numbers[1]))
        elif kind == "free":
            del stored[int(block)]
        else:
            controller.cleared.setdefault(int(block), set()).update(map(int, numbers))
    controller.committed = set(stored)
    unit = ReturningUnit(folder, controller, capacity_bytes=64 * MIB, arena_bytes=MIB)
    with contextlib.closing(unit):
        assert unit.service.lost_blocks == {} and set(stored) <= set(controller.told[0])
        for block, values in stored.items():
            left = sorted(set(range(8)) - controller.cleared.get(block, set()))
            if left:
                np.testing.assert_array_equal(unit.read(block, left), values[left])
        deadline = time.monotonic() + 5
        while unit.stats()["pins"] and time.monotonic() < deadline:
            unit.turn(1.5)
        unit.tell(free(*stored))
        while unit.stats()["blocks"] and time.monotonic() < deadline:
            unit.turn(1.5)
        assert unit.all_free()
