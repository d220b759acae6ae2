"""A controller whose journal has no space refuses typed, changes nothing by halves, and goes on when there is space."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.journal.faulty import FaultyFiles
from tests.unit.ledger.driver import differ, draw_request, handle_of, put_request
from transfer_queue.errors import CapacityExceeded, GetMetaTimeout
from transfer_queue.ledger.records import Record
from transfer_queue.messages import Ack, Clear, Done, Drop, GetAudit, GetKeys, Locate, WaitKeys
from transfer_queue.messages.journal import Marked


class FullLife(Life):
    """A life on a disk that can be filled."""

    def __init__(self, folder: Path) -> None:
        self.files = FaultyFiles()
        super().__init__(folder, files=self.files)

    @property
    def keeper(self) -> Any:
        keeper = self.service._answers.keeper
        assert keeper is not None
        return keeper

    def fill(self, left_bytes: int) -> None:
        """Fill the disk, and all that the journal has, up to so many bytes, with records that change nothing."""
        self.files.space_bytes = 0
        for size in (500_000, 50_000, 5_000, 500):
            try:
                while True:
                    self.keeper._journal.check_room(size + 500 + left_bytes, essential=True)
                    self.keeper.keep([Record(Marked(), self.now, client="x" * size)])
            except CapacityExceeded:
                pass
        assert not self.keeper.behind


@pytest.fixture
def life(tmp_path: Path) -> Iterator[FullLife]:
    one = FullLife(tmp_path / "first")
    announce(one)
    yield one
    one.service.close()


def test_an_ack_that_cannot_be_written_down_is_refused_before_it_changes_anything(life: FullLife) -> None:
    """The reserve is used up as well; reads are answered, and with space again the same ack is done."""
    life.ask(put_request(2, ("x",), UNIT + 1))
    leased = life.ask(draw_request(2, ("x",), "t", lease_s=1000.0))
    life.fill(0)
    before = life.ledger.state()
    ack = Ack(lease_token=leased.lease_token, **handle_of(leased))
    for request in (ack, Drop(reason="x", **handle_of(leased)), put_request(1, ("x",), UNIT + 2)):
        with pytest.raises(CapacityExceeded, match="capacity"):
            life.ask(request)
    assert not list(differ(before, life.ledger.state()))
    life.ask(Locate(partition_id="p", global_step=None, indexes=None, generations=None, keys=None, fields=None))
    life.files.space_bytes = None
    assert life.ask(ack).count == 2
    life.ask(put_request(1, ("x",), UNIT + 2))


def test_keys_are_read_and_waited_for_however_full_it_is(life: FullLife) -> None:
    """Neither is written down."""
    life.ask(put_request(2, (), 0, keys=("a", "b")))
    life.fill(0)
    assert life.ask(GetKeys(partition_id="p", since=None)).keys == ("a", "b")
    wait: dict[str, Any] = {
        "partition_id": "p",
        "fields": (),
        "count": None,
        "where": {},
        "since": None,
        "timeout_s": 5.0,
    }
    assert life.ask(WaitKeys(keys=("a",), **wait)).keys == ("a",)
    assert life.ask(WaitKeys(keys=("c",), **wait), request_id=70) is None
    life.now += 6.0
    life.service.tick()
    assert isinstance(life.answers[70], GetMetaTimeout)


def test_what_changed_by_itself_is_written_down_when_there_is_space_again(
    life: FullLife, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Leases ran out on the full disk: nothing is served meanwhile; then all goes on, and a restart knows it."""
    life.ask(put_request(2, ("x",), UNIT + 1))
    for _ in range(2):
        life.ask(draw_request(1, ("x",), "t", lease_s=10.0))
    life.fill(0)
    life.now += 11.0
    with caplog.at_level(logging.ERROR):
        while not life.keeper.behind:  # what is left of the margin may hold some
            life.service._answers._records.add(Record(Marked(), life.now, client="x" * 400))
            life.service.tick()
    assert sum("journal of the controller is full" in message for message in caplog.messages) == 1
    for request in (GetAudit(partition_id=None), draw_request(2, ("x",), "t"), put_request(1, ("x",), UNIT + 2)):
        with pytest.raises(CapacityExceeded, match="nothing is served until there is space"):
            life.ask(request)
    life.files.space_bytes = None
    assert life.service.tick() is None
    assert life.ask(GetAudit(partition_id=None)).entries["journal"]["unwritten"] == 0
    assert life.ask(draw_request(2, ("x",), "t")).indexes.tolist() == [0, 1]
    again = life.killed(tmp_path / "second")
    assert not list(differ(life.ledger.state(), again.ledger.state()))
    again.service.close()


def test_an_answer_waits_until_what_it_tells_is_written_down(life: FullLife, tmp_path: Path) -> None:
    """A request that needed more room than was looked for is no error: it was done, once, and is told when it is safe.

    Units hear of what may be reused no sooner; who waits in vain for something else is told at its time.
    """
    done = life.ask(put_request(1, ("x",), UNIT + 1))
    assert life.ask(draw_request(5, ("x",), "t", timeout_s=5.0)) is None
    waiting = max(life.ids.__reduce__()[1]) - 1
    append, room = life.keeper._journal.append, [False]

    def short(*parts: bytes, essential: bool = False) -> int:
        if not room[0]:
            raise CapacityExceeded("no capacity")
        number: int = append(*parts, essential=essential)
        return number

    life.keeper._journal.append = short
    clear = Clear(partition_id=None, global_step=None, **handle_of(done))
    assert life.ask(clear, request_id=70) is None
    assert life.pushed == []
    assert ("client/1", 70) not in {
        (client, number) for client, _, _, known in life.service.requests.dump() for number, *_ in known
    }
    life.now += 6.0
    life.service.tick()
    assert isinstance(life.answers[waiting], GetMetaTimeout)
    room[0] = True
    life.service.tick()
    told = life.answers[70]
    assert isinstance(told, Done) and told.count == 1
    assert [order.blocks.tolist() for order in life.pushed] == [[UNIT + 1]]
    again = life.killed(tmp_path / "second")
    assert again.ledger.reports.audit("p")["partitions"]["p"]["live"] == 0
    assert again.service.requests.find("client/1", 70, 1) is not None
    again.service.close()


def test_a_restart_without_space_serves_when_there_is_some(life: FullLife, tmp_path: Path) -> None:
    """That it was started again is a change itself."""
    life.ask(put_request(2, ("x",), UNIT + 1))
    life.service.close()
    for path in life.folder.glob("spare-*"):
        path.unlink()
    files = FaultyFiles()
    files.space_bytes = 0
    again = Life(life.folder, files=files)
    with pytest.raises(CapacityExceeded):
        again.ask(GetAudit(partition_id=None))
    files.space_bytes = None
    assert again.ask(GetAudit(partition_id=None)).entries["partitions"]["p"]["live"] == 2
    again.service.close()


class TestSnapshots:
    """One that cannot be written harms nobody, and is tried again."""

    def due(self, life: FullLife) -> None:
        """So much is written that a snapshot is wanted, and the thread that writes it has ended."""
        for _ in range(60):
            life.keeper.keep([Record(Marked(), life.now, client="x" * 100_000)])
        life.service.tick()
        if life.keeper._snapshot is not None:
            life.keeper._snapshot.join()

    @pytest.mark.parametrize("error", [MemoryError("no memory"), OSError("no disk"), RuntimeError("can't start")])
    @pytest.mark.parametrize("where", ["state", "thread"])
    def test_a_snapshot_that_fails(
        self,
        life: FullLife,
        error: Exception,
        where: str,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """It is logged once, told by audits, and tried again after some more records; the next one takes its place."""
        calls = []

        def fail(state: object = None) -> list[bytes]:
            calls.append(state)
            raise error

        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            if where == "state":
                patch.setattr(life.keeper, "state", fail)
            else:
                patch.setattr("transfer_queue.controller.keeping.pack_state", fail)
            self.due(life)
            assert len(calls) == 1
            told = life.ask(GetAudit(partition_id=None)).entries["journal"]["snapshot_error"]
            assert told == f"{type(error).__name__}: {error}"
            life.ask(put_request(1, ("x",), UNIT + 1))
            assert len(calls) == 1
            self.due(life)
            assert len(calls) == 2
        assert sum("no snapshot" in message for message in caplog.messages) == 1
        assert list(life.folder.glob("snapshot-*")) == []
        self.due(life)
        assert life.ask(GetAudit(partition_id=None)).entries["journal"]["snapshot_error"] is None
        assert len(list(life.folder.glob("snapshot-*"))) == 1
