"""Leases: acknowledged, given back, overdue, fenced; also of data-parallel slices."""

from __future__ import annotations

import pytest

from tests.unit.ledger.driver import Driver, handle_of, ints, rows, token_of
from transfer_queue.errors import GetMetaTimeout, InvalidArgument, LeaseExpired, StaleSampleError
from transfer_queue.messages import Renew


def test_leased_rows_are_consumed_when_they_are_acknowledged() -> None:
    """Until then they are reserved: neither drawn again nor consumed."""
    queue = Driver()
    queue.put(4)
    drawn = queue.lease(3)
    assert drawn is not None
    assert drawn.lease_s == 10.0
    assert (queue.account()["reserved"], queue.account()["consumed"]) == (3, 0)
    assert queue.ack(drawn) == 3
    assert (queue.account()["reserved"], queue.account()["consumed"]) == (0, 3)
    assert rows(queue.draw(1)) == [3]


def test_an_acknowledgement_may_come_twice_and_counts_once() -> None:
    queue = Driver()
    queue.put(2)
    drawn = queue.lease(2)
    assert drawn is not None
    assert [queue.ack(drawn), queue.ack(drawn)] == [2, 0]
    assert queue.account()["leases"] == {"granted": 2, "acked": 2, "open": 0}


def test_part_of_a_lease_can_be_acknowledged_and_the_rest_given_back() -> None:
    queue = Driver()
    queue.put(4)
    drawn = queue.lease(4)
    first, rest = queue.locate(indexes=ints(0, 1)), queue.locate(indexes=ints(2, 3))
    assert queue.ack(drawn, first) == 2
    assert queue.release(drawn, rest) == 2
    assert rows(queue.draw(2)) == [2, 3]
    with pytest.raises(LeaseExpired, match="released"):
        queue.ack(drawn)


def test_rows_given_back_wake_who_waits_for_them() -> None:
    queue = Driver()
    queue.put(2)
    drawn = queue.lease(2)
    assert queue.draw(2) is None
    waiting = queue.ticket
    queue.release(drawn)
    assert rows(queue.answers[waiting]) == [0, 1]
    assert "redelivered" not in queue.account() or queue.account()["redelivered"] == 0


def test_an_overdue_lease_gives_its_rows_to_the_next_and_refuses_the_late_holder() -> None:
    """Both acknowledge: the first is refused, the second counted once; each row is known to be delivered again."""
    queue = Driver()
    queue.put(2)
    late = queue.lease(2, 5.0)
    assert queue.ledger.next_deadline() == queue.now + 5.0
    assert queue.lease(2, 30.0) is None
    queue.later(5.0)
    again = queue.answers[queue.ticket]
    assert rows(again) == [0, 1]
    assert again.extra_info["deliveries"] == [2, 2]
    before = queue.snapshot()
    with pytest.raises(LeaseExpired, match="ran out"):
        queue.ack(late)
    with pytest.raises(LeaseExpired):
        queue.release(late)
    with pytest.raises(LeaseExpired):
        queue.put(to=late, fields=("y",), lease_token=token_of(late))
    assert queue.snapshot() == before
    assert queue.ack(again) == 2
    assert queue.account()["redelivered"] == 2
    assert queue.account()["leases"] == {"granted": 4, "expired": 2, "acked": 2, "open": 0}


def test_an_acknowledgement_after_the_deadline_is_refused_even_if_nobody_noticed_yet() -> None:
    queue = Driver()
    queue.put(1)
    drawn = queue.lease(1, 5.0)
    queue.now += 5.0
    with pytest.raises(LeaseExpired):
        queue.ack(drawn)
    assert rows(queue.draw(1)) == [0]


def test_a_renewed_lease_lasts_longer() -> None:
    queue = Driver()
    queue.put(1)
    drawn = queue.lease(1, 5.0)
    queue.later(4.0)
    assert queue.renew(drawn) == 5.0
    queue.later(4.0)
    assert queue.renew(drawn, 20.0) == 20.0
    queue.later(19.0)
    assert queue.ack(drawn) == 1


def test_a_write_under_a_lease_is_taken_while_it_lasts_and_after_it_was_acknowledged() -> None:
    queue = Driver()
    queue.put(2)
    drawn = queue.lease(2)
    queue.put(to=drawn, fields=("y",), lease_token=token_of(drawn))
    queue.ack(drawn)
    queue.put(to=drawn, fields=("z",), lease_token=token_of(drawn))
    assert rows(queue.draw(2, ("y", "z"), "u")) == [0, 1]


def test_what_a_client_that_is_gone_held_goes_back_at_once() -> None:
    queue = Driver()
    queue.put(3)
    queue.lease(1, client="stays")
    queue.lease(2, client="goes")
    queue.gone("goes")
    assert rows(queue.draw(2)) == [1, 2]
    assert queue.account()["leases"] == {"granted": 3, "expired": 2, "open": 1}


def test_a_sample_that_nobody_can_finish_is_quarantined_with_its_history() -> None:
    """The third time it is given back it is dropped; the partition remembers by whom."""
    queue = Driver(max_deliveries=3)
    queue.put(2, keys=("good", "bad"))
    for client in ("a/1", "b/2", "c/3"):
        drawn = queue.lease(2, client=client)
        queue.ack(drawn, queue.locate(keys=("good",))) if client == "c/3" else queue.release(drawn)
    queue.gone("c/3")
    report = queue.ledger.reports.audit()["partitions"]["p"]
    assert report["dropped"] == {"quarantined": 1}
    assert report["quarantined"][0]["key"] == "bad"
    assert report["quarantined"][0]["given_back_by"] == {"t": ["a", "b", "c"]}
    assert queue.account()["consumed"] == 1


def test_a_group_settles_without_a_sample_that_was_dropped() -> None:
    queue = Driver(num_n_samples=3)
    queue.put(3, group_ids=("g",) * 3)
    assert queue.draw(3, get_n_samples=True) is not None
    assert queue.draw(3, task="u", get_n_samples=True, fields=("x", "y")) is None
    waiting = queue.ticket
    queue.put(to=queue.locate(indexes=ints(0, 2)), fields=("y",))
    assert waiting not in queue.answers
    queue.drop(queue.locate(indexes=ints(1)), "crashed")
    assert rows(queue.answers[waiting]) == [0, 2]
    assert queue.ledger.reports.audit()["partitions"]["p"]["dropped"] == {"crashed": 1}


@pytest.mark.parametrize("dropped", [0, 1, 3])
def test_a_group_by_position_settles_without_a_sample_that_was_dropped(dropped: int) -> None:
    """The groups beside it stay what they are; one that loses all its rows is no group any more."""
    queue = Driver(num_n_samples=4)
    queue.put(12)
    assert queue.draw(8, ("x", "y"), get_n_samples=True) is None
    waiting = queue.ticket
    queue.put(to=queue.locate(indexes=ints(*(row for row in range(8) if row != dropped))), fields=("y",))
    assert waiting not in queue.answers
    queue.drop(queue.locate(indexes=ints(dropped)))
    assert rows(queue.answers[waiting]) == [row for row in range(8) if row != dropped]
    queue.drop(queue.locate(indexes=ints(8, 9, 10, 11)))
    assert queue.draw(4, task="u", get_n_samples=True) is not None
    assert rows(queue.draw(4, task="u", get_n_samples=True)) == [4, 5, 6, 7]
    assert queue.draw(4, task="u", get_n_samples=True) is None


def test_cleared_rows_leave_their_lease() -> None:
    queue = Driver()
    queue.put(3)
    drawn = queue.lease(3)
    queue.clear_rows(0)
    with pytest.raises(StaleSampleError):
        queue.ack(drawn)
    assert queue.ack(drawn, queue.locate(indexes=ints(1, 2))) == 2
    assert queue.account()["leases"] == {"granted": 3, "removed": 1, "acked": 2, "open": 0}


def test_reset_consumption_ends_leases() -> None:
    queue = Driver()
    queue.put(2)
    drawn = queue.lease(2)
    queue.reset("t")
    assert rows(queue.draw(2)) == [0, 1]
    with pytest.raises(LeaseExpired, match="reset"):
        queue.ack(drawn)


def test_an_answer_that_never_arrived_leaves_no_lease() -> None:
    queue = Driver()
    queue.put(2)
    queue.lease(2)
    assert queue.cancel()
    assert rows(queue.draw(2)) == [0, 1]
    assert queue.ledger.next_deadline() is None


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan"), True, "10"])
def test_a_lease_lasts_a_finite_time(seconds: object) -> None:
    queue = Driver()
    queue.put(1)
    with pytest.raises((InvalidArgument, TypeError), match="lease"):
        queue.draw(1, lease_s=seconds)


def test_bad_calls_on_a_lease_change_nothing() -> None:
    queue = Driver()
    queue.put(3)
    drawn = queue.lease(2)
    other = queue.locate(indexes=ints(2))
    before = queue.snapshot()
    with pytest.raises(InvalidArgument, match=r"\[2\] are not part of lease"):
        queue.ack(drawn, other)
    with pytest.raises(LeaseExpired, match="unknown"):
        queue.after(queue.ledger.renew, Renew(lease_token=99, lease_s=None), queue.now)
    with pytest.raises(InvalidArgument, match="reason"):
        queue.drop(other, "")
    assert queue.snapshot() == before
    assert handle_of(other)["indexes"].tolist() == [2]


def test_who_holds_what_is_part_of_every_explanation() -> None:
    queue = Driver()
    queue.put(2)
    queue.lease(2, 30.0, client="trainer/abc")
    queue.now += 10.0
    with pytest.raises(GetMetaTimeout, match="2 are leased: 2 by client 'trainer' for 20.0 s more"):
        queue.draw(2, timeout_s=0.0)


class TestDataParallel:
    """A lease covers one rank's slice."""

    def test_rows_are_consumed_when_every_rank_acknowledged_its_slice(self) -> None:
        queue = Driver()
        queue.put(4)
        first = queue.rank(0, 2, 2, group="g", lease_s=10.0)
        second = queue.rank(1, 2, 2, group="g", lease_s=10.0)
        queue.ack(first)
        assert (queue.account()["reserved"], queue.account()["consumed"]) == (4, 0)
        queue.ack(second)
        assert (queue.account()["reserved"], queue.account()["consumed"]) == (0, 4)

    def test_a_lease_that_a_peer_has_is_not_withdrawn(self) -> None:
        """The answer that granted it got lost, with a rank whose next life asked again meanwhile."""
        queue = Driver()
        queue.put(2)
        queue.rank(0, 1, 2, group="g", lease_s=10.0)
        lost = queue.ticket
        peer = queue.rank(0, 1, 2, group="g", lease_s=10.0)
        assert queue.cancel(lost)
        assert queue.ack(peer) == 2
        assert queue.account()["leases"] == {"granted": 2, "acked": 2, "open": 0}

    def test_peers_of_a_rank_share_the_lease(self) -> None:
        """Before and after one of them acknowledged it."""
        queue = Driver()
        queue.put(2)
        first = queue.rank(0, 1, 2, group="g", lease_s=10.0)
        peer = queue.rank(0, 1, 2, group="g", lease_s=10.0)
        assert token_of(peer) == token_of(first)
        assert queue.ack(first) == 2
        assert token_of(queue.rank(0, 1, 2, group="g", lease_s=10.0)) == token_of(first)
        assert queue.ack(peer) == 0
        assert queue.account()["leases"] == {"granted": 2, "acked": 2, "open": 0}

    def test_an_overdue_slice_stays_with_its_rank_under_a_new_token(self) -> None:
        queue = Driver()
        queue.put(6)
        old = queue.rank(0, 2, 2, group="g", lease_s=5.0)
        queue.later(6.0)
        assert rows(queue.draw(2)) == [4, 5]
        again = queue.rank(0, 2, 2, group="g", lease_s=5.0)
        assert rows(again) == rows(old)
        assert token_of(again) != token_of(old)
        assert again.extra_info == {"replayed": True, "deliveries": [2, 2]}
        with pytest.raises(LeaseExpired):
            queue.ack(old)
        queue.ack(again)
        queue.ack(queue.rank(1, 2, 2, group="g", lease_s=5.0))
        assert queue.account()["consumed"] == 6
        assert queue.account()["redelivered"] == 2

    def test_a_rank_without_a_group_name_gets_its_overdue_slice_at_its_next_draw(self) -> None:
        queue = Driver()
        queue.put(8)
        old = queue.rank(0, 2, 2, lease_s=5.0)
        other = queue.rank(1, 2, 2, lease_s=50.0)
        queue.later(6.0)
        again = queue.rank(0, 2, 2, lease_s=5.0)
        assert rows(again) == rows(old)
        queue.ack(again)
        queue.ack(other)
        assert rows(queue.rank(0, 2, 2, lease_s=5.0)) == [4, 5]
        assert rows(queue.rank(1, 2, 2, lease_s=5.0)) == [6, 7]

    def test_ranks_with_and_without_leases_mix(self) -> None:
        queue = Driver()
        queue.put(4)
        queue.rank(0, 2, 2, group="g")
        leased = queue.rank(1, 2, 2, group="g", lease_s=5.0)
        assert queue.account()["reserved"] == 4
        queue.ack(leased)
        assert queue.account()["consumed"] == 4

    def test_an_undelivered_slice_is_not_leased(self) -> None:
        queue = Driver()
        queue.put(4)
        queue.rank(0, 2, 2, group="g", lease_s=5.0)
        assert queue.cancel()
        fresh = queue.rank(0, 2, 2, group="g", lease_s=5.0)
        assert "replayed" not in fresh.extra_info
        queue.ack(fresh)

    def test_a_slice_acknowledged_in_part_comes_again_with_the_rest_open(self) -> None:
        queue = Driver()
        queue.put(2)
        drawn = queue.rank(0, 1, 2, group="g", lease_s=5.0)
        queue.ack(drawn, queue.locate(indexes=ints(0)))
        queue.later(6.0)
        again = queue.rank(0, 1, 2, group="g", lease_s=5.0)
        assert rows(again) == [0, 1]
        assert queue.ack(again) == 1
        assert queue.account()["redelivered"] == 1
        assert queue.account()["consumed"] == 2

    def test_a_quarantined_sample_breaks_the_slice_that_has_it(self) -> None:
        queue = Driver(max_deliveries=1)
        queue.put(4)
        queue.rank(0, 2, 2, group="g", lease_s=5.0)
        queue.later(6.0)
        with pytest.raises(StaleSampleError):
            queue.rank(0, 2, 2, group="g", lease_s=5.0)
        other = queue.rank(1, 2, 2, group="g", lease_s=5.0)
        queue.ack(other)
        assert queue.account()["consumed"] == 2

    def test_a_slice_that_lost_a_row_under_its_lease_goes_back_when_the_lease_ends(self) -> None:
        """The rank is told; what is left of its slice is for others, and the group ends with the other rank."""
        queue = Driver()
        queue.put(4)
        queue.rank(0, 2, 2, group="g", lease_s=5.0)
        other = queue.rank(1, 2, 2, group="g", lease_s=50.0)
        queue.clear_rows(0)
        queue.later(6.0)
        with pytest.raises(StaleSampleError):
            queue.rank(0, 2, 2, group="g", lease_s=5.0)
        assert rows(queue.draw(1)) == [1]
        queue.ack(other)
        assert (queue.account()["reserved"], queue.account()["consumed"]) == (0, 3)

    def test_what_a_rank_acknowledged_is_not_delivered_again_when_the_rest_of_its_slice_is_dropped(self) -> None:
        queue = Driver()
        queue.put(2)
        drawn = queue.rank(0, 1, 2, group="g", lease_s=5.0)
        queue.ack(drawn, queue.locate(indexes=ints(0)))
        queue.drop(queue.locate(indexes=ints(1)))
        assert (queue.account()["reserved"], queue.account()["consumed"]) == (0, 1)
        with pytest.raises(GetMetaTimeout):
            queue.draw(1, timeout_s=0.0)

    def test_a_slice_is_given_back_as_a_whole(self) -> None:
        """What was acknowledged before stays so."""
        queue = Driver()
        queue.put(3)
        drawn = queue.rank(0, 1, 3, group="g", lease_s=5.0)
        queue.ack(drawn, queue.locate(indexes=ints(0)))
        assert queue.release(drawn, queue.locate(indexes=ints(1))) == 2
        again = queue.rank(0, 1, 3, group="g", lease_s=5.0)
        assert queue.ack(again) == 2
        assert queue.account()["consumed"] == 3


def test_a_quarantine_that_ends_other_leases_is_replayed() -> None:
    """Two tasks lease the same rows; the end of one lease drops the rows, and with them the other lease."""
    queue = Driver(max_deliveries=1)
    queue.put(2)
    queue.lease(2, 5.0, task="t", client="c/1")
    queue.lease(2, 5.0, task="u", client="c/1")
    queue.gone("c/1")
    assert queue.ledger.reports.audit()["partitions"]["p"]["dropped"] == {"quarantined": 2}
    queue.put(2)
    queue.lease(2, 5.0, task="t")
    queue.lease(2, 5.0, task="u")
    queue.later(6.0)
    assert queue.ledger.reports.audit()["partitions"]["p"]["dropped"] == {"quarantined": 4}


def test_a_group_by_position_that_lost_rows_outlives_the_compaction_of_its_partition() -> None:
    queue = Driver(num_n_samples=2)
    queue.put(6000)
    queue.drop(queue.locate(indexes=ints(4000)))
    queue.clear_rows(*range(4000))
    found = [rows(queue.draw(2, get_n_samples=True)) for _ in range(2)]
    assert found == [[4001], [4002, 4003]]
