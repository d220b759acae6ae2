"""Groups of rows: complete ones only, sealed smaller or aborted when told, never shortened silently."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.unit.ledger.driver import Driver, rows
from transfer_queue import BaseSampler, GRPOSampler
from transfer_queue.errors import InvalidArgument, SamplerError, StaleSampleError, UnknownName


def test_interleaved_producers_never_make_a_mixed_or_partial_group() -> None:
    """Rows of many groups come in any order; each draw holds whole groups, their rows adjacent."""
    order = random.Random(7)
    queue = Driver(num_n_samples=4, sampler=GRPOSampler(4))
    members = [f"g{group}" for group in range(25) for _ in range(4)]
    order.shuffle(members)
    owner: dict[int, str] = {}
    seen: list[str] = []
    for group in members:
        owner[rows(queue.put(1, group_ids=[group]))[0]] = group
        drawn = queue.draw(8, timeout_s=60.0) if order.random() < 0.3 else None
        if drawn is not None:
            found = [owner[row] for row in rows(drawn)]
            assert found[:4] == [found[0]] * 4
            assert found[4:] == [found[4]] * 4
            seen += found[::4]
    seen += [owner[row] for answer in queue.answers.values() for row in rows(answer)[::4]]
    assert len(seen) == len(set(seen))


def test_groups_by_position_are_blocks_of_ordinals() -> None:
    """Without ids the n responses of a prompt are n rows in allocation order; a window never straddles two prompts."""
    queue = Driver(num_n_samples=3, sampler=GRPOSampler())
    done = queue.put(9, fields=())
    late = queue.locate(done)
    part = {"indexes": late.indexes[1:], "generations": late.generations[1:]}
    queue.put(8, ["x"], **part)
    assert rows(queue.draw(3)) == [3, 4, 5]
    assert rows(queue.draw(3)) == [6, 7, 8]
    assert queue.draw(3) is None
    queue.put(1, ["x"], indexes=late.indexes[:1], generations=late.generations[:1])
    assert rows(queue.answers[queue.ticket - 1]) == [0, 1, 2]


def test_a_group_that_lacks_a_row_is_waited_for_while_later_ones_are_served() -> None:
    """The failed member of a group holds up its own group alone."""
    queue = Driver(num_n_samples=2, sampler=GRPOSampler())
    queue.put(3, group_ids=["a", "b", "b"])
    assert rows(queue.draw(2)) == [1, 2]
    assert queue.draw(2) is None
    text = queue.explain(2)
    assert "1 of 2 samples ready" in text
    queue.later(100.0)
    assert "1 groups lack rows: 'a' has 1 of 2" in str(queue.answers[queue.ticket])


def test_a_sealed_group_is_complete_with_the_rows_it_has() -> None:
    """Sealing wakes whom the group kept waiting, and refuses later rows."""
    queue = Driver(num_n_samples=3, sampler=GRPOSampler())
    queue.put(2, group_ids=["a", "a"])
    assert queue.draw(3) is None
    queue.seal("a")
    assert rows(queue.answers[queue.ticket]) == [0, 1]
    with pytest.raises(InvalidArgument, match="sealed with 2 rows"):
        queue.put(1, group_ids=["a"])


def test_a_sealed_group_that_loses_a_row_stays_closed_until_sealed_again() -> None:
    """A cleared member neither shortens the group silently nor opens it again."""
    queue = Driver(num_n_samples=3, sampler=GRPOSampler())
    queue.put(3, group_ids=["a"] * 3)
    queue.seal("a")
    queue.clear_rows(1)
    assert queue.draw(3) is None
    with pytest.raises(InvalidArgument, match="sealed"):
        queue.put(1, group_ids=["a"])
    queue.seal("a")
    assert rows(queue.answers[queue.ticket - 1]) == [0, 2]


def test_an_aborted_group_goes_as_a_whole_and_is_accounted_for() -> None:
    """Its rows are dropped under the reason, also those that come late."""
    queue = Driver(num_n_samples=2, sampler=GRPOSampler())
    queue.put(4, group_ids=["a", "b", "a", "b"])
    assert queue.draw(4, ["x", "y"]) is None
    assert queue.abort("a") == 2
    assert queue.account()["dropped"] == {"bad": 2}
    with pytest.raises(StaleSampleError, match="'a' was aborted"):
        queue.put(1, group_ids=["a"])
    assert rows(queue.draw(2)) == [1, 3]


def test_sealing_and_aborting_name_groups_and_partitions_that_exist() -> None:
    """An unknown partition or group is an error, and changes nothing."""
    queue = Driver(num_n_samples=2)
    queue.put(1, group_ids=["a"])
    before = queue.snapshot()
    for call in (queue.seal, queue.abort):
        with pytest.raises(StaleSampleError, match="no group 'b'"):
            call("b")
        with pytest.raises(UnknownName, match="no partition 'pp'.*did you mean 'p'"):
            call("a", "pp")
    assert queue.snapshot() == before


def test_the_last_aborted_groups_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order in which they were aborted, also by a ledger that goes on from the state."""
    monkeypatch.setattr("transfer_queue.ledger.groups.REMEMBERED", 2)
    queue = Driver()
    for group in (3, "b", "a"):
        queue.put(1, group_ids=[group])
        queue.abort(group)
    queue.restart()
    assert list(queue.ledger._rows.partitions["p"].groups.aborted) == ["b", "a"]
    with pytest.raises(StaleSampleError, match="'b' was aborted"):
        queue.put(1, group_ids=["b"])
    queue.put(1, group_ids=[3])


def test_a_group_name_may_be_used_again_after_all_its_rows_were_cleared() -> None:
    """A group lives as long as its rows."""
    queue = Driver(num_n_samples=2, sampler=GRPOSampler())
    queue.clear(queue.put(2, group_ids=["a"] * 2))
    queue.put(2, group_ids=["a"] * 2)
    assert rows(queue.draw(2)) == [0, 1]


@pytest.mark.parametrize("declared", [True, False])
def test_whole_groups_on_top_of_the_default_sampler(declared: bool) -> None:
    """`get_n_samples` hands out whole groups, adjacent, although the sampler knows none; `batch_size` counts rows."""
    queue = Driver(num_n_samples=2)
    done = queue.put(6, fields=(), group_ids=["a", "b", "c", "a", "b", "c"] if declared else None)
    ready = [0, 1, 2, 4, 5]
    queue.put(5, ["x"], indexes=done.indexes[ready], generations=done.generations[ready])
    assert queue.draw(6, get_n_samples=True) is None
    assert rows(queue.draw(4, get_n_samples=True)) == ([1, 4, 2, 5] if declared else [0, 1, 4, 5])


def test_whole_groups_beside_rows_drawn_one_by_one() -> None:
    """A row that another draw took makes its group incomplete; a reset makes it whole."""
    queue = Driver(num_n_samples=2)
    queue.put(4)
    assert rows(queue.draw(1)) == [0]
    assert rows(queue.draw(2, get_n_samples=True)) == [2, 3]
    queue.reset()
    assert rows(queue.draw(4, get_n_samples=True)) == [0, 1, 2, 3]


def test_declared_and_positional_groups_are_served_by_their_first_row() -> None:
    """Both kinds may live in one partition."""
    queue = Driver(num_n_samples=2, sampler=GRPOSampler())
    queue.put(2)
    queue.put(2, group_ids=["a"] * 2)
    queue.put(2)
    assert rows(queue.draw(6)) == [0, 1, 2, 3, 4, 5]


def test_groups_survive_the_compaction_of_a_long_lived_partition() -> None:
    """A stream through one partition keeps its groups, by id and by position, and its waiting draws."""
    queue = Driver(num_n_samples=3, sampler=GRPOSampler())
    drawn = 0
    for step in range(40):
        waiting = queue.draw(600)
        assert waiting is None
        done = queue.put(300)
        queue.put(300, group_ids=[f"{step}-{i // 3}" for i in range(300)])
        answer = queue.answers[queue.ticket - 2]
        assert len(rows(answer)) == 600
        drawn += 600
        queue.clear(answer)
        assert rows(done)
    assert queue.account()["consumed"] == drawn == 24_000
    assert len(queue.ledger.reports.consumption_status("t")) <= 2048


def test_sealed_groups_smaller_than_the_usual_size_are_drawn_by_any_sampler() -> None:
    """Also on top of the default one: as many groups as were asked for, whatever rows they have."""
    queue = Driver(num_n_samples=4)
    queue.put(4, group_ids=["a", "a", "b", "b"])
    assert queue.draw(8, get_n_samples=True) is None
    queue.seal("a")
    queue.seal("b")
    assert rows(queue.answers[queue.ticket]) == [0, 1, 2, 3]


class ByGroups(BaseSampler):
    """Hands out rows of groups although it is asked for first rows."""

    lazy = True

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        return ready_indices.groups(batch_size, 2)[1][:batch_size]


def test_a_sampler_that_hands_out_other_rows_than_the_first_of_groups_is_refused() -> None:
    """What a view of groups gives out besides is not taken for its own rows."""
    queue = Driver(num_n_samples=2, sampler=ByGroups())
    queue.put(8)
    with pytest.raises(SamplerError, match="not ready for this draw"):
        queue.draw(4, get_n_samples=True, timeout_s=0)
