"""Limits of samples and bytes: what each bounds, who goes first, and what an admission keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.ledger.claims import claim, fill, total
from transfer_queue.errors import CapacityExceeded, InvalidArgument, WrongType
from transfer_queue.ledger.admissions import ADMITTED_S
from transfer_queue.ledger.limits import Claim, Limits
from transfer_queue.ledger.usage import Usage

# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "1"])
def test_limits_are_positive_whole_numbers(value: Any) -> None:
    """Anything else is refused, naming the key."""
    with pytest.raises((InvalidArgument, WrongType), match=r"limits\.partition_bytes"):
        Limits(partition_bytes=value)


def test_no_limits() -> None:
    """Without limits there is nothing to wait for, whatever is held."""
    usage = Usage(Limits())
    fill(usage, claim(1000, 1 << 40))
    assert not Limits() and not Limits().bounds_bytes
    assert (
        Limits(total_samples=1) and not Limits(total_samples=1).bounds_bytes and Limits(producer_bytes=1).bounds_bytes
    )
    usage.check(claim(10, 1 << 50))
    assert usage.obstacle(claim(10, 1 << 50)) is None


@pytest.mark.parametrize("scope", ["total", "partition", "producer"])
@pytest.mark.parametrize("unit", ["bytes", "samples"])
def test_each_limit_bounds_what_its_holder_has(scope: str, unit: str) -> None:
    """A put waits if it does not fit under the limit of its own partition, producer or the total, and says why."""
    usage = Usage(Limits(**{f"{scope}_{unit}": 100}))
    fill(usage, claim(60, 60))
    assert usage.obstacle(claim(40, 40)) is None
    text = usage.obstacle(claim(41, 41))
    assert text is not None and f"limits.{scope}_{unit}" in text
    assert "100, of which 60 are held, and 41 are needed: 1 too many" in text
    assert "partition 'train' holds 60" in text and "client 'rollout-0' holds 60" in text
    elsewhere = usage.obstacle(claim(41, 41, "val", "rollout-1"))
    assert (elsewhere is None) == (scope != "total")


def test_a_put_that_can_never_fit_is_refused() -> None:
    """It names the limit, what is needed and what is allowed; one that adds to rows that exist is never refused."""
    usage = Usage(Limits(total_samples=10, producer_bytes=1000))
    with pytest.raises(
        CapacityExceeded, match=r"11 samples exceeds the capacity: limits.total_samples is 10"
    ) as caught:
        usage.check(claim(11, 1))
    assert caught.value.details == {"limit": "total_samples", "needed": 11, "allowed": 10}
    with pytest.raises(CapacityExceeded, match=r"1001 bytes .* limits.producer_bytes is 1000, 1 less"):
        usage.check(claim(1, 1001))
    usage.check(claim(0, 5000))
    assert usage.obstacle(claim(0, 5000)) is None


def test_the_error_at_the_deadline_says_by_how_much_and_who_holds_it() -> None:
    """The message for people, the details for programs; holders with most first."""
    usage = Usage(Limits(total_bytes=100))
    fill(usage, claim(1, 20), 0, 1)
    fill(usage, claim(1, 70, "val", "rollout-1"), 1, 2)
    error = usage.too_late(claim(2, 30), 1.5)
    assert "no capacity for 2 samples (30 bytes) in partition 'train' after 1.5 s: limits.total_bytes is 100" in str(
        error
    )
    assert "20 too many (partition 'val' holds 70, partition 'train' holds 20" in str(error)
    assert error.details["excess"] == 20
    assert error.details["partitions"] == {"val": 70, "train": 20}
    assert list(error.details["producers"]) == ["rollout-1", "rollout-0"]


# ---------------------------------------------------------------- order


def test_first_come_first_served_per_limit() -> None:
    """A small put does not overtake a large one that waits for the same limit; one that needs others passes."""
    usage = Usage(Limits(partition_samples=10, total_samples=1000))
    fill(usage, claim(8))
    large, small, other = claim(5), claim(1), claim(1, partition="val")
    assert usage.obstacle(large) is not None
    usage.wait(large)
    assert usage.obstacle(small) == "earlier puts wait for limits.partition_samples of 'train'"
    assert "earlier puts wait" in str(usage.too_late(small, 1.0))
    assert usage.obstacle(other) is None
    usage.remove("train", np.arange(8))
    usage.next_round()
    assert usage.obstacle(large) is None
    fill(usage, large)
    assert usage.obstacle(small) is None


# ---------------------------------------------------------------- admissions


def test_room_is_kept_for_a_put_that_was_admitted() -> None:
    """It counts until the put comes, which is then let in whatever else waits; nothing is counted twice."""
    usage = Usage(Limits(total_bytes=100))
    number = usage.admit(claim(2, 80), 0.0, "c")
    assert total(usage, "bytes") == 80 and usage.obstacle(claim(1, 30)) is not None
    assert usage.use(number, claim(2, 80))
    assert total(usage, "bytes") == total(usage, "samples") == 0
    assert not usage.use(number, claim(2, 80))


@pytest.mark.parametrize("other", [claim(3, 80), claim(2, 81), claim(2, 80, "val"), claim(2, 80, producer="rollout-1")])
def test_an_admission_covers_what_it_was_asked_for(other: Claim) -> None:
    """A larger put, or one of another partition or producer, is treated as if it had none."""
    usage = Usage(Limits(total_bytes=100))
    assert not usage.use(usage.admit(claim(2, 80), 0.0, "c"), other)
    assert total(usage, "bytes") == 0


def test_admissions_end() -> None:
    """By withdrawal, or a minute after they were granted."""
    usage = Usage(Limits(total_bytes=100))
    assert usage.admissions.next_expiry() is None
    first, second = usage.admit(claim(1, 10), 5.0, "c"), usage.admit(claim(1, 10), 6.0, "c")
    assert usage.admissions.next_expiry() == 5.0 + ADMITTED_S
    assert not usage.expire(4.9 + ADMITTED_S)
    assert usage.expire(5.0 + ADMITTED_S)
    assert not usage.use(first, claim(1, 10))
    usage.withdraw(second)
    usage.withdraw(second)
    assert total(usage, "bytes") == 0 and usage.admissions.next_expiry() is None


def test_the_admissions_of_a_client_that_is_gone_end() -> None:
    """Their room goes to who waits at once; another life of a client of the same name keeps its own."""
    usage = Usage(Limits(total_bytes=100))
    mine = [usage.admit(claim(1, 20), 0.0, "rollout/a1") for _ in range(2)]
    other = usage.admit(claim(1, 30), 0.0, "rollout/b2")
    assert usage.admissions.clients() == {"rollout/a1", "rollout/b2"}
    usage.next_round()
    usage.leave("rollout/a1")
    assert usage.room_made and total(usage, "bytes") == 30
    assert usage.admissions.clients() == {"rollout/b2"}
    assert [usage.use(number, claim(1, 20)) for number in mine] == [False, False]
    assert usage.use(other, claim(1, 30))
