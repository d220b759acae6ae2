"""A unit dies and comes back with all, some or none of what it knew: whatever is put afterwards can be read."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.asking_unit import MIB, Unit, block_of, rows
from tests.unit.controller.life import Life
from tests.unit.controller.test_recovery import without_deadlines
from tests.unit.ledger.driver import differ, ints, put_request
from tests.unit.returning_unit import mapped, write_here
from transfer_queue.errors import BlockLost, CapacityExceeded, ConnectionLost, InvalidArgument
from transfer_queue.messages import Announce, Announced, ListUnits, Reconcile, Reconciled
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.requests import Answered


def announcement(life: str, unit: str = "unit-0") -> Announce:
    place = {"address": f"tcp://{unit}", "local_address": "", "folder": "", "nonce": ""}
    return Announce(unit_id=unit, capacity_bytes=1, life=life, **place)


def announce(controller: Life, life: str, unit: str = "unit-0") -> int:
    announced = controller.ask(announcement(life, unit), client=f"{unit}/1")
    assert isinstance(announced, Announced)
    return announced.number


# ---------------------------------------------------------------- the controller alone


@pytest.fixture
def controller(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path / "first")
    yield one
    one.service.close()


def test_another_life_has_another_number(controller: Life) -> None:
    """The old one is refused at once, also for a put that comes again; rows of before are named as lost."""
    assert [announce(controller, "a"), announce(controller, "x", "unit-1"), announce(controller, "a")] == [1, 2, 1]
    put, late = put_request(1, ("x",), 1 << 48), put_request(1, ("x",), 1 << 48 | 1)
    done = controller.ask(put, request_id=70)
    assert announce(controller, "b") == 3
    with pytest.raises(BlockLost, match="together with its storage unit"):
        controller.ask(late, request_id=71)
    answered = controller.service.requests.find("client/1", 70, 0)  # sent again, it is answered as it was applied
    assert isinstance(answered, Answered) and answered.reply is done
    controller.ask(put_request(1, ("x",), 3 << 48))
    assert controller.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {"x": [0]}
    assert [info.number for info in controller.ask(ListUnits(timeout_s=0.0)).units] == [3, 2]
    assert announce(controller, "a") == 4  # nobody has a number again
    with pytest.raises(InvalidArgument, match="no storage unit has number 3"):
        controller.ask(Reconcile(unit=3, blocks=ints(3 << 48)))
    with pytest.raises(InvalidArgument, match="does not have"):
        controller.ask(put_request(1, ("x",), 5 << 48))


@pytest.mark.parametrize("snapshot", [False, True])
def test_what_is_refused_outlives_the_controller(controller: Life, tmp_path: Path, snapshot: bool) -> None:
    """Killed after every step, from records or from a snapshot, it refuses the same and gives the same numbers."""

    def steps() -> Iterator[None]:
        announce(controller, "a")
        controller.ask(put_request(1, ("x",), 1 << 48))
        yield
        lost = {"lost": ints(1 << 48 | 7), "lost_spans": ints(1 << 48 | 2 << 16)}
        controller.ask(Reconcile(unit=1, blocks=ints(1 << 48), **lost))
        yield
        controller.service.gone("unit-0/1")
        controller.pass_time(31.0)
        yield
        announce(controller, "a")
        controller.ask(Reconcile(unit=1, blocks=ints(1 << 48), **lost))
        yield
        announce(controller, "b")
        yield

    keeper = controller.service._answers.keeper
    assert keeper is not None
    for number, _ in enumerate(steps()):
        if snapshot:
            keeper.snapshot().join()
        again = controller.killed(tmp_path / "second")
        states = (without_deadlines(life.ledger.state()) for life in (controller, again))
        assert not list(differ(*states)), number
        given_up = again.ask(announcement("b" if number == 4 else "a"), client="unit-0/1", request_id=90).given_up
        assert given_up == (number == 2)
        for block in (1 << 48, 1 << 48 | 7, 1 << 48 | 2 << 16 | 3) if number else ():
            with pytest.raises((BlockLost, InvalidArgument)):
                again.ask(put_request(1, ("x",), block), request_id=91)
        assert announce(again, "c") == (3 if number == 4 else 2)
        again.service.close()


def test_numbers_may_run_out(controller: Life) -> None:
    """They are 15 bits of a block id; a unit beyond is refused, and the others go on."""
    announce(controller, "a")
    controller.service._units._numbers = (1 << 15) - 1
    with pytest.raises(CapacityExceeded, match="32767"):
        announce(controller, "b")
    assert announce(controller, "a") == 1


# ---------------------------------------------------------------- a unit and a controller


class World:
    """A unit, its controller, and a client that writes into the span it has, whatever became of the unit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.controller = Life(folder / "controller-0")
        self.controllers = 1
        self.unit = Unit.__new__(Unit)
        self.unit.now = 100.0
        (folder / "unit").mkdir()
        self.span: Any = None
        self.written: list[tuple[int, Any]] = []
        self.acknowledged: dict[int, Any] = {}
        self.since: set[int] = set()  # acknowledged since the controller heard what the unit has
        self.start()
        self.come_back()

    def start(self) -> None:
        clock = lambda: self.unit.now  # noqa: E731
        options = {"capacity_bytes": 2 * MIB, "arena_bytes": MIB // 4}
        self.unit.service = UnitService(self.folder / "unit", clock=clock, journal=True, **options)

    def come_back(self, failures: str = "", puts: int = 0) -> None:
        """`failures`: the controller does not hear the question (q), or the unit not the answer (a); then again."""
        number = announce(self.controller, self.unit.service.life)
        failing, decided = list(failures.replace("r", "")), list[bool]()

        def ask(question: Reconcile) -> Reconciled:
            kind = failing.pop() if failing else ""
            for _ in range(puts):
                self.put(0)
            if kind == "q":
                raise ConnectionLost("the question was lost")
            found = self.controller.ask(question)
            if not decided:
                self.since.clear()
            decided.append(True)
            for _ in range(puts):
                self.put(0)
            if kind == "a":
                raise ConnectionLost("the answer was lost")
            assert isinstance(found, Reconciled)
            return found

        while True:
            try:
                self.unit.service.return_to(number, ask)
                return
            except ConnectionLost:
                if "r" in failures:
                    self.restart_controller()
                    assert announce(self.controller, self.unit.service.life) == number

    def die(self, damage: str) -> None:
        self.unit.service.abandon()
        journal = self.folder / "unit" / "journal"
        if damage == "tail":
            last = max(journal.glob("journal-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
            with last.open("r+b") as file:
                file.seek(max(len(file.read().rstrip(b"\0")) - 40, 0))
                file.write(bytes(40))
        elif damage == "journal":
            shutil.rmtree(journal)
        elif damage == "end":
            (self.folder / "unit" / "journal.end").unlink()
        elif damage == "arenas":
            for path in sorted((self.folder / "unit").glob("arena-*"))[::2]:
                path.unlink()
        self.start()

    def restart_controller(self) -> None:
        old, self.controllers = self.controller, self.controllers + 1
        self.controller = old.killed(self.folder / f"controller-{self.controllers}")
        self.controller.ids = old.ids
        old.service.close()

    def reserve(self) -> None:
        self.span = self.unit.reserve(MIB // 8)
        self.memory, self.at, self.count = mapped(self.span), 0, 0

    def write(self, seed: int) -> None:
        values = rows(1, 1 + seed % 3000, first=seed % 200)
        if self.span is None or self.at + block_of(values).size_bytes > self.span.size_bytes:
            return
        block = self.span.first_block + self.count
        self.at += write_here(self.memory[self.at :], block, values)
        self.count += 1
        self.written.append((block, values))

    def put(self, seed: int) -> None:
        if not self.written:
            return
        block, values = self.written.pop(seed % len(self.written))
        try:
            self.controller.ask(put_request(1, ("x",), block))
        except BlockLost:
            if self.span is not None and block >> 16 == self.span.first_block >> 16:
                self.span = None
        else:
            self.acknowledged[block] = values
            self.since.add(block)

    def check(self) -> None:
        """Whatever the controller counts as stored is read; what was acknowledged since the return counts as stored."""
        cells = self.controller.ledger.blocks.cells
        assert self.since <= cells.keys() <= self.acknowledged.keys()
        for block in cells:
            np.testing.assert_array_equal(self.unit.read(block, [0]), self.acknowledged[block])

    def close(self) -> None:
        self.unit.service.close()
        self.controller.service.close()


DAMAGES = ["", "", "tail", "journal", "end", "arenas"]
CALM = ["write", "write", "put", "put", "reserve", "controller", "given up"]
STEPS = st.one_of(
    st.tuples(st.sampled_from(CALM), st.integers(0, 9999)),
    st.tuples(
        st.just("die"),
        st.tuples(st.sampled_from(DAMAGES), st.sampled_from(["", "q", "a", "qa", "aqr"]), st.integers(0, 2)),
    ),
)


def play(world: World, what: str, how: Any) -> None:
    match what:
        case "write":
            world.write(how)
        case "put":
            world.put(how)
        case "reserve":
            world.reserve()
        case "controller":
            world.restart_controller()
            announce(world.controller, world.unit.service.life)
        case "given up":
            world.controller.service.gone("unit-0/1")
            world.controller.pass_time(31.0)
            world.put(how)
            world.come_back()
        case "die":
            damage, failures, puts = how
            world.die(damage)
            world.write(puts)
            world.come_back(failures, puts)


@settings(max_examples=15, deadline=None)
@given(st.lists(STEPS, max_size=16))
def test_nothing_is_acknowledged_that_cannot_be_read(steps: list[tuple[str, Any]]) -> None:
    """Deaths with every kind of loss, agreements that fail half-way and are repeated, controllers started again."""
    with ServerFolder("random") as folder:
        world = World(folder.path)
        try:
            world.reserve()
            for what, how in steps:
                play(world, what, how)
                world.check()
        finally:
            world.close()


@pytest.mark.parametrize("damage", ["tail", "journal", "end", "arenas"])
@pytest.mark.parametrize("failures", ["", "qa", "ar"])
def test_what_was_written_before_the_loss_is_refused_after_it(damage: str, failures: str) -> None:
    """A block stored, one put, and one carved while the unit was away; the next span is good."""
    with ServerFolder("random") as folder:
        world = World(folder.path)
        try:
            world.reserve()
            world.write(1)
            world.put(0)
            world.write(2)
            world.die(damage)
            world.write(3)
            world.come_back(failures)
            for left in (1, 0):
                world.put(0)
                assert len(world.written) == left and not world.since
            assert world.span is None
            world.reserve()
            world.write(4)
            world.put(0)
            world.check()
            assert len(world.since) == 1
        finally:
            world.close()
