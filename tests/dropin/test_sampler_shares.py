"""Shares dealt to all ranks at once, on any schedule and through a session (checklist 26, 27)."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import transfer_queue as tq
from tests.dropin.sampling import Keeps, ask
from tests.unit.ledger.driver import Driver, differ, rows
from transfer_queue import GRPOGroupNSampler, RankAwareSampler, SeqlenBalancedSampler

# ---------------------------------------------------------------- 27: balanced shares on any schedule


def _put_groups(queue: Driver, rng: random.Random, groups: int, size: int) -> None:
    lengths = [{"total_lengths": rng.randint(1, 50)} if rng.random() < 0.9 else None for _ in range(groups * size)]
    queue.put(groups * size, tags=lengths)


def _check_shares(dealt: dict[tuple[int, int], list[int]], size: int) -> None:
    handed = Counter(index for share in dealt.values() for index in share)
    assert set(handed.values()) <= {1}, "a row was dealt twice"
    for share in dealt.values():
        for at in range(0, len(share), size):
            group = share[at : at + size]
            assert group == list(range(group[0], group[0] + size)) and group[0] % size == 0, "a group was torn apart"


@pytest.mark.parametrize("part", range(10))
def test_27_balanced_shares_on_random_schedules(part: int) -> None:
    """100 schedules in each part: ranks in any order and speed, repeated, with puts between them. No row twice."""
    for seed in range(100 * part, 100 * (part + 1)):
        rng = random.Random(seed)
        size, ranks, groups = rng.choice([1, 2, 3]), rng.choice([1, 2, 4]), rng.choice([1, 2])
        queue = Driver(sampler=SeqlenBalancedSampler(size, ranks))
        queue.compared = 0 if seed % 25 == 0 else 1000  # the state is compared with its replay in some of them only
        dealt: dict[tuple[int, int], list[int]] = {}
        at = [0] * ranks
        for _ in range(16):
            if rng.random() < 0.3:
                _put_groups(queue, rng, rng.randint(1, 4), size)
            rank = rng.randrange(ranks)
            index = rng.randint(0, at[rank])
            got = ask(queue, rank, index, groups * size)
            if got is None:
                assert (rank, index) not in dealt, "a share was not dealt again"
                continue
            assert dealt.setdefault((rank, index), got) == got, "a rank got two different shares"
            assert len(got) == groups * size
            at[rank] = max(at[rank], index + 1)
        _check_shares(dealt, size)
        if queue.ledger._rows.partitions and "t" in queue.ledger._rows.partitions["p"].accounts:
            found = queue.account()
            assert found["consumed"] == sum(map(len, dealt.values()))
            assert found["reserved"] % (groups * size) == 0


def test_27_all_shares_are_reserved_by_the_first_rank_that_asks() -> None:
    """Those that come late find theirs, though others ask for more in between; `explain` tells what is reserved."""
    queue = Driver(sampler=SeqlenBalancedSampler(1, 2))
    queue.put(5, tags=[{"total_lengths": n} for n in (9, 1, 8, 2, 7)])
    assert ask(queue, 0) is not None
    assert (queue.account()["consumed"], queue.account()["reserved"]) == (2, 2)
    assert "2 are reserved by the sampler for dp_rank 1, batch_index 0" in queue.explain(2)
    assert ask(queue, 0, 1) is None
    other = ask(queue, 1)
    assert other is not None and set(other).isdisjoint(ask(queue, 0) or [])
    assert queue.account()["consumed"] == 4


def test_27_a_share_that_loses_a_row_before_its_rank_comes_goes_back() -> None:
    """The rest of it is ready again, and the rank is dealt another one, without the others."""
    queue = Driver(sampler=lambda: SeqlenBalancedSampler(1, 2))
    queue.put(4)
    mine = ask(queue, 0)
    assert mine is not None
    rest = sorted(set(range(4)) - set(mine))
    queue.clear_rows(rest[0])
    queue.put(1, fields=["x", "new"])
    got = ask(queue, 1)
    assert got is not None and rest[1] in got and set(got).isdisjoint(mine)
    assert ask(queue, 0) == mine


def test_27_groups_by_id_come_first() -> None:
    """Interleaved responses of two prompts come out by prompt; rows without an id form runs of indexes."""
    queue = Driver(sampler=GRPOGroupNSampler(2))
    queue.put(4, group_ids=["a", "b", "a", "b"], group_size=2)
    queue.put(2)
    assert rows(queue.draw(6)) == [0, 2, 1, 3, 4, 5]


# ---------------------------------------------------------------- composed with what the native dialect has


def test_whole_groups_and_splits_work_over_samplers_that_return_pairs() -> None:
    """`get_n_samples` chooses among groups; a `DPSampler` splits what its inner sampler chose."""
    queue = Driver(num_n_samples=2, sampler=Keeps())
    queue.put(6)
    assert ask(queue, 0, 0, 4, get_n_samples=True) == [0, 1, 2, 3]
    assert ask(queue, 0, 0, 4, get_n_samples=True) == [0, 1, 2, 3]
    split = Driver(sampler=tq.DPSampler(inner=GRPOGroupNSampler(2)))
    split.put(4)
    assert [rows(split.rank(rank, 2, 2, group="g")) for rank in (1, 0)] == [[2, 3], [0, 1]]


def test_a_ledger_that_fails_between_two_draws_is_made_again_from_its_records() -> None:
    """Random draws, clears, resets and lost answers; the shadow of the driver has the same state after each."""
    for seed in range(6):
        rng = random.Random(seed)
        queue = Driver(sampler=rng.choice([lambda: SeqlenBalancedSampler(1, 2), RankAwareSampler, Keeps]))
        queue.put(8)
        for _ in range(40):
            match rng.randrange(8):
                case 0:
                    queue.put(rng.randint(1, 4))
                case 1:
                    alive = queue.locate(partition_id="p", allow_missing=True).indexes.tolist()
                    if alive:
                        queue.clear_rows(*rng.sample(alive, min(len(alive), 2)))
                case 2:
                    queue.reset("t") if rng.random() < 0.2 else queue.cancel()
                case 3:
                    queue.restart()
                case _:
                    ask(queue, rng.randrange(2), rng.randrange(4))
        assert not list(differ(queue.ledger.state(), queue.shadow.state()))
        drawing, table = queue.ledger._drawing, queue.ledger._rows.table
        kept = [table.alive(one.chosen).tolist() for _, one in drawing.assignments.of_partition("p")]
        assert max(Counter(itertools.chain(*kept)).values(), default=1) == 1, "a row is kept twice"
        assert "t" not in queue.ledger._rows.partitions["p"].accounts or queue.account()


# ---------------------------------------------------------------- through a session


@pytest.fixture
def session(request: pytest.FixtureRequest) -> Iterator[Any]:
    tq.init({"runtime": "embedded", "controller": {"sampler": request.param}})
    yield tq.get_client()
    tq.close()


def _table(count: int, **columns: list[int]) -> TensorDict:
    return TensorDict(
        {"x": torch.arange(count), **{k: torch.tensor(v) for k, v in columns.items()}}, batch_size=[count]
    )


def _get(client: Any, size: int, **config: Any) -> Any:
    return client.get_meta(
        data_fields=["x"], batch_size=size, partition_id="p", task_name="t", sampling_config=config, timeout=5
    )


@pytest.mark.parametrize("session", [SeqlenBalancedSampler(2, 2)], indirect=True)
def test_27_balanced_shares_through_a_client(session: Any) -> None:
    """As Relax asks: the entries of `sampling_config` are the names of the draw."""
    meta = session.put(_table(8), partition_id="p")
    meta.update_custom_meta([{"total_lengths": n} for n in (1, 1, 9, 9, 8, 8, 2, 2)])
    session.set_custom_meta(meta)
    got = [
        session.get_data(_get(session, 4, dp_rank=rank, batch_index=0, task_name="t", partition_id="p"))["x"].tolist()
        for rank in (1, 0, 1)
    ]
    assert got[0] == got[2]
    assert sorted(map(tuple, got[:2])) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert session.check_consumption_status(task_name="t", partition_id="p")


@pytest.mark.parametrize("session", [RankAwareSampler, "RankAwareSampler", Keeps()], indirect=True)
def test_26_the_same_rows_through_a_client_never_a_cleared_one(session: Any) -> None:
    """Peers read the same values; after a clear the same names get new ones."""
    session.put(_table(2), partition_id="p")
    config = {"dp_rank": 0, "batch_index": 0}
    metas = [_get(session, 2, **config) for _ in range(2)]
    assert [session.get_data(meta)["x"].tolist() for meta in metas] == [[0, 1], [0, 1]]
    session.clear_samples(metas[0])
    session.put(TensorDict({"x": torch.tensor([7, 8])}, batch_size=[2]), partition_id="p")
    assert session.get_data(_get(session, 2, **config))["x"].tolist() == [7, 8]


@pytest.mark.parametrize("session", [RankAwareSampler()], indirect=True)
def test_26_what_is_kept_is_part_of_a_checkpoint(session: Any, tmp_path: Any) -> None:
    """Loaded into the live queue, a rank gets the batch that it had at the time of the save."""
    session.put(_table(4), partition_id="p")
    config = {"dp_rank": 0, "batch_index": 0}
    first = session.get_data(_get(session, 2, **config))["x"].tolist()
    session.save_checkpoint(tmp_path / "saved")
    session.clear_partition("p")
    session.put(_table(2), partition_id="p")
    session.load_checkpoint(tmp_path / "saved")
    assert session.get_data(_get(session, 2, **config))["x"].tolist() == first
    assert session.get_data(_get(session, 2, dp_rank=0, batch_index=1))["x"].tolist() == [2, 3]
