"""A controller killed at any moment comes back from its journal: same rows, leases, units and answers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.controller.life import UNIT, Life, announce
from tests.unit.ledger.driver import differ, draw_request, handle_of, ints, put_request
from transfer_queue.controller import ControllerService
from transfer_queue.controller.recording import pack_state
from transfer_queue.errors import (
    BlockLost,
    CapacityExceeded,
    InvalidArgument,
    JournalDamaged,
    LeaseExpired,
    SamplerError,
)
from transfer_queue.ledger import Ledger
from transfer_queue.messages import (
    AbortGroup,
    Ack,
    Clear,
    Done,
    Drawn,
    Drop,
    FreesDone,
    PutDone,
    Reconcile,
    Reconciled,
    RegisterSampler,
    Release,
    Renew,
    ResetConsumption,
    Restore,
    SealGroup,
    SetTags,
)
from transfer_queue.samplers import BaseSampler
from transfer_queue.wire.ticket import Answer, Ticket


@pytest.fixture
def life(tmp_path: Path) -> Iterator[Life]:
    one = Life(tmp_path / "first", num_n_samples=2)
    yield one
    one.service.close()


def play(life: Life) -> Iterator[str]:
    """A bit of everything; yields after each step."""
    announce(life)
    yield "announce"
    first: PutDone = life.ask(
        put_request(4, ("x", "y"), UNIT + 1, group_ids=("a", "a", "b", "b"), tags=({"n": 1},) * 4)
    )
    yield "put"
    life.ask(put_request(2, ("x",), UNIT + 2, keys=("k", "l")))
    yield "put with keys"
    life.ask(SetTags(tags=({"n": 2}, {"m": (1, 2)}), indexes=ints(0, 1), generations=ints(0, 0)))
    yield "tags"
    assert life.ask(draw_request(9, ("x",), "later")) is None
    yield "a draw that waits"
    leased: Drawn = life.ask(draw_request(2, ("x", "y"), "actor", lease_s=30.0))
    yield "lease"
    life.ask(Renew(lease_token=leased.lease_token, lease_s=60.0))
    yield "renew"
    life.ask(Ack(lease_token=leased.lease_token, indexes=leased.indexes[:1], generations=leased.generations[:1]))
    yield "ack"
    rank = {"dp_rank": 0, "dp_size": 2, "dp_group_id": "g"}
    life.ask(draw_request(1, ("x",), "ref", sampler_params=rank))
    yield "a rank"
    life.ask(draw_request(1, ("x",), "critic", sampler_params={"dp_rank": 1, "dp_size": 2}, lease_s=30.0))
    yield "a leased rank without a group"
    life.ask(put_request(4, ("z",), UNIT + 3, indexes=first.indexes, generations=first.generations))
    yield "a further field"
    life.ask(RegisterSampler(task_name="reward", sampler="GRPOSampler", arguments={"num_n_samples": 2}))
    yield "sampler"
    life.ask(draw_request(2, ("z",), "reward"))
    yield "groups"
    life.ask(put_request(1, ("x",), UNIT + 4, partition_id="q", group_ids=("c",)))
    life.ask(SealGroup(partition_id="q", group_id="c"))
    yield "seal"
    life.ask(Drop(reason="bad", indexes=first.indexes[3:], generations=first.generations[3:]))
    yield "drop"
    life.ask(Release(lease_token=leased.lease_token, **rest_of(leased, 1)))
    yield "release"
    life.ask(Clear(partition_id=None, global_step=None, indexes=first.indexes[:1], generations=first.generations[:1]))
    yield "clear rows"
    life.ask(FreesDone(unit_id="unit-0", sequence=1), request_id=0)
    yield "frees done"
    life.now += 100.0
    life.service.tick()
    yield "leases ran out"
    life.ask(AbortGroup(partition_id="p", group_id="b", reason="late"))
    yield "abort"
    life.ask(Reconcile(unit=1, blocks=ints(UNIT + 1, UNIT + 3)))
    yield "a block was lost"
    life.ask(ResetConsumption(partition_id="p", global_step=None, task_name=None))
    yield "reset"
    life.ask(Clear(partition_id="q", global_step=None, indexes=None, generations=None))
    yield "clear"


def answers_of(life: Life) -> dict[tuple[str, int], Any]:
    """What clients may ask for again."""
    clients = life.service.requests.dump()
    return {(client, number): reply for client, _, _, answers in clients for number, _, reply in answers}


def rest_of(drawn: Drawn, start: int) -> dict[str, Any]:
    return {"indexes": drawn.indexes[start:], "generations": drawn.generations[start:]}


def without_deadlines(state: dict[str, Any]) -> dict[str, Any]:
    """Leases last longer after a restart."""
    leases = [(head[:5], *rest) for head, *rest in state["leases"]["open"]]
    return state | {"leases": state["leases"] | {"open": leases}}


def test_killed_after_every_step_it_comes_back_as_it_was(life: Life, tmp_path: Path) -> None:
    """The ledger, the units and the answers that a client may ask for again."""
    for step in play(life):
        again = life.killed(tmp_path / "second", num_n_samples=2)
        differences = list(differ(without_deadlines(life.ledger.state()), without_deadlines(again.ledger.state())))
        assert not differences, (step, str(differences)[:500])
        known, then = answers_of(life), answers_of(again)
        assert known.keys() <= then.keys(), step  # a clear is answered when its units did their part
        for key, reply in known.items():
            assert_equal(reply, then[key])
        again.service.close()


def test_a_snapshot_takes_the_place_of_the_records(life: Life, tmp_path: Path) -> None:
    """With a snapshot written after each step, the next life is the same."""
    for step in play(life):
        keeper = life.service._answers.keeper
        assert keeper is not None
        keeper.snapshot().join()
        again = life.killed(tmp_path / "second", num_n_samples=2)
        differences = list(differ(without_deadlines(life.ledger.state()), without_deadlines(again.ledger.state())))
        assert not differences, (step, str(differences)[:500])
        again.service.close()


def assert_equal(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for name in one.__slots__:
        mine, theirs = getattr(one, name), getattr(other, name)
        if isinstance(mine, np.ndarray):
            assert np.array_equal(mine, theirs), name
        elif name not in ("locations", "columns", "lease_s"):
            assert mine == theirs, name


def test_a_lease_lasts_for_its_whole_time_after_a_restart(life: Life, tmp_path: Path) -> None:
    """Nobody could renew it while there was no controller; its token goes on to be good."""
    announce(life)
    life.ask(put_request(2, ("x",), UNIT + 1))
    leased = life.ask(draw_request(2, ("x",), "actor", lease_s=30.0))
    life.now += 29.0
    again = life.killed(tmp_path / "second", num_n_samples=2)
    again.now += 20.0
    again.service.tick()
    assert again.ask(Ack(lease_token=leased.lease_token, **handle_of(leased)), request_id=50).count == 2
    again.service.close()


def test_a_lease_that_ran_out_stays_so(life: Life, tmp_path: Path) -> None:
    announce(life)
    life.ask(put_request(2, ("x",), UNIT + 1))
    leased = life.ask(draw_request(2, ("x",), "actor", lease_s=30.0))
    life.now += 31.0
    life.service.tick()
    again = life.killed(tmp_path / "second", num_n_samples=2)
    with pytest.raises(LeaseExpired):
        again.ask(Ack(lease_token=leased.lease_token, **handle_of(leased)), request_id=50)
    again.service.close()


class Last(BaseSampler):
    """The last ready rows first; remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def sample(self, ready_indices: list[int], batch_size: int, **kwargs: Any) -> list[int]:
        self.asked += 1
        return ready_indices[-batch_size:]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


def test_a_sampler_given_as_an_object_has_to_be_given_again(life: Life, tmp_path: Path) -> None:
    """Until then its task is told so, and others go on; then it knows what it knew."""
    announce(life)
    life.ask(put_request(6, ("x",), UNIT + 1))
    life.service.inspect(lambda ledger: ledger.register_sampler("mine", Last()))
    assert life.ask(draw_request(1, ("x",), "mine")).indexes.tolist() == [5]
    again = life.killed(tmp_path / "second", num_n_samples=2)
    with pytest.raises(InvalidArgument, match=r"sampler of task 'mine', .*Last.* register it again"):
        again.ask(draw_request(1, ("x",), "mine"), request_id=50)
    assert again.ask(draw_request(1, ("x",), "other"), request_id=51).indexes.tolist() == [0]
    mine = Last()
    again.service.inspect(lambda ledger: ledger.register_sampler("mine", mine))
    assert mine.asked == 1
    assert again.ask(draw_request(1, ("x",), "mine"), request_id=52).indexes.tolist() == [4]
    again.service.close()


def test_frees_that_a_unit_did_not_confirm_are_sent_again_after_a_restart(life: Life, tmp_path: Path) -> None:
    announce(life)
    life.ask(put_request(2, ("x",), UNIT + 1))
    life.ask(Clear(partition_id="p", global_step=None, indexes=None, generations=None))
    assert [order.blocks.tolist() for order in life.pushed] == [[UNIT + 1]]
    again = life.killed(tmp_path / "second", num_n_samples=2)
    announce(again)
    assert [order.blocks.tolist() for order in again.pushed] == [[UNIT + 1]]
    again.ask(FreesDone(unit_id="unit-0", sequence=again.pushed[0].sequence), request_id=0)
    third = again.killed(tmp_path / "third", num_n_samples=2)
    announce(third)
    assert third.pushed == []
    third.service.close()
    again.service.close()


def test_rows_of_a_lost_block_are_named_and_wait_until_they_are_written_again(life: Life) -> None:
    announce(life)
    done = life.ask(put_request(2, ("x",), UNIT + 1))
    kept = life.ask(put_request(1, ("x",), UNIT + 2))
    life.ask(Clear(partition_id=None, global_step=None, indexes=done.indexes[:1], generations=done.generations[:1]))
    reconciled = life.ask(Reconcile(unit=1, blocks=ints(UNIT + 2, UNIT + 9)))
    assert isinstance(reconciled, Reconciled)
    assert reconciled.committed.tolist() == [1, 0]
    report = life.ledger.reports.audit("p")["partitions"]["p"]
    assert report["lost"] == {"x": [int(done.indexes[1])]}
    assert life.ask(draw_request(2, ("x",), "t")) is None
    assert "was lost with a storage unit" in life.ledger.reports._explain("p", "t", ("x",), 2, life.now, None)
    waiting = max(life.ids.__reduce__()[1]) - 1
    again = {"indexes": done.indexes[1:], "generations": done.generations[1:]}
    life.ask(put_request(1, ("x",), UNIT + 3, **again))
    assert sorted(life.answers[waiting].indexes.tolist()) == sorted([*kept.indexes.tolist(), int(done.indexes[1])])
    assert life.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {}


def test_slots_that_were_cleared_are_told_to_a_unit_that_comes_back(life: Life) -> None:
    announce(life)
    done = life.ask(put_request(5, ("x",), UNIT + 1))
    life.ask(Clear(partition_id=None, global_step=None, indexes=done.indexes[1:3], generations=done.generations[1:3]))
    reconciled = life.ask(Reconcile(unit=1, blocks=ints(UNIT + 1)))
    assert reconciled.cleared_blocks.tolist() == [UNIT + 1] * 2
    assert reconciled.cleared_slots.tolist() == [1, 2]


def test_a_record_that_does_not_fit_is_damage_and_says_which(life: Life, tmp_path: Path) -> None:
    """A journal of another queue behind a snapshot of this one, say."""
    announce(life)
    done = life.ask(put_request(1, ("x",), UNIT + 1))
    life.ask(Drop(**handle_of(done), reason="spoiled"))
    shutil.copytree(life.folder, tmp_path / "copy")
    from transfer_queue.journal import Journal

    journal, recovered = Journal.open(tmp_path / "copy")
    journal.append(recovered.records[-1])
    journal.close()
    with pytest.raises(JournalDamaged, match=r"record 4 of the journal does not fit .* 3 records before it are good"):
        Life(tmp_path / "copy")


def test_a_put_is_refused_when_the_journal_has_no_room_and_clearing_goes_on(tmp_path: Path) -> None:
    """Nothing of the put is visible; what gives room back is still written down."""
    life = Life(tmp_path / "small")
    announce(life)
    done = life.ask(put_request(1, ("x",), UNIT + 1))
    keeper = life.service._answers.keeper
    assert keeper is not None

    def full(size_bytes: int, *, essential: bool = False) -> None:
        if not essential:
            raise CapacityExceeded("no capacity left for the journal")

    keeper._journal.check_room = full  # type: ignore[method-assign]
    before = life.ledger.state()
    with pytest.raises(CapacityExceeded, match="journal"):
        life.ask(put_request(1, ("x",), UNIT + 2))
    with pytest.raises(CapacityExceeded, match="journal"):
        life.ask(draw_request(1, ("x",), "t"))
    assert not list(differ(before, life.ledger.state()))
    assert life.ask(Clear(partition_id=None, global_step=None, **handle_of(done)), request_id=90) is None
    life.now += 2.0  # the unit takes too long to confirm
    life.service.tick()
    assert isinstance(life.answers[90], Done)
    life.service.close()


def test_on_a_disk_answers_wait_until_their_change_is_durable(tmp_path: Path) -> None:
    """With `sync`, an answer comes from the thread that made a whole group durable at once."""
    life = Life(tmp_path / "unused")
    life.service.close()
    ledger = Ledger()
    service = ControllerService(ledger)
    service.keep_in(tmp_path / "disk", sync=True)
    answers: list[Answer] = []
    for number in range(20):
        request = put_request(1, (), 0)
        service.submit(request, Ticket("c", number + 1, None, request, lambda ticket, answer: answers.append(answer)))
    deadline = time.monotonic() + 5
    while len(answers) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [answer.indexes.tolist() for answer in answers] == [[number] for number in range(20)]
    service.close()


class Moody(BaseSampler):
    """Keeps what a journal cannot hold, or fails to say what it keeps."""

    def __init__(self, state: Any) -> None:
        self._state = state

    def sample(self, ready_indices: list[int], batch_size: int, **kwargs: Any) -> list[int]:
        return ready_indices[:batch_size]

    def state_dict(self) -> dict[str, Any]:
        if isinstance(self._state, Exception):
            raise self._state
        return {"state": self._state}


@pytest.mark.parametrize("state", [RuntimeError("no"), object()])
def test_a_sampler_whose_state_cannot_be_kept_fails_its_own_draw_and_nothing_else(life: Life, state: Any) -> None:
    """Nothing is consumed, and the next request is served."""
    announce(life)
    life.ask(put_request(2, ("x",), UNIT + 1))
    life.service.inspect(lambda ledger: ledger.register_sampler("mine", Moody(state)))
    with pytest.raises(SamplerError, match="Moody"):
        life.ask(draw_request(2, ("x",), "mine"))
    assert life.ask(draw_request(2, ("x",), "other")).indexes.tolist() == [0, 1]
    assert life.ledger.reports.audit("p")["partitions"]["p"]["tasks"]["mine"]["pending"] == 2


def test_a_put_to_a_unit_that_was_given_up_is_refused(life: Life) -> None:
    announce(life)
    life.ask(put_request(1, ("x",), UNIT + 1))
    life.service.gone("unit-0/1")
    life.pass_time(31.0)
    with pytest.raises(BlockLost, match="was given up"):
        life.ask(put_request(1, ("x",), UNIT + 2))
    assert life.ledger.reports.audit("p")["partitions"]["p"]["lost"] == {"x": [0]}


def test_a_restored_state_outlives_the_controller_and_is_restored_once(life: Life, tmp_path: Path) -> None:
    """Also if a snapshot of before is under way; asking again gives the answer and frees nothing."""
    announce(life)
    life.ask(put_request(2, ("x",), UNIT + 1))
    keeper = life.service._answers.keeper
    assert keeper is not None
    cuts: list[Any] = []
    life.service._cuts.begin(Ticket("c", 1, None, None, lambda ticket, answer: cuts.append(answer)), 60.0, life.now)
    deadline = time.monotonic() + 5
    while not cuts and time.monotonic() < deadline:
        time.sleep(0.01)
    cut = cuts[0]
    life.service._cuts.end(cut.hold)
    life.ask(Clear(partition_id="p", global_step=None, indexes=None, generations=None))
    before = keeper._journal.begin_snapshot(), pack_state(keeper.state())
    request = Restore(old=cut.blocks, new=cut.blocks + 100, state=cut.state)
    life.now += 2.0
    life.service.tick()
    life.ask(request, request_id=70)
    before[0].write(before[1])
    again = life.killed(tmp_path / "second", num_n_samples=2)
    assert again.ledger.reports.audit("p")["partitions"]["p"]["live"] == 2
    assert again.service.requests.find("client/1", 70, 1) is not None
    again.service.close()
