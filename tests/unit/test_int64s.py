"""int64 arrays of messages: exact, short where the numbers follow a rule, and never more than what is allowed."""

from __future__ import annotations

import struct

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.errors import DecodeError
from transfer_queue.messages import Done, PutDone
from transfer_queue.wire.codec import decode, encode_message
from transfer_queue.wire.values import MAX_RANGE, RANGE, unpack_value

LOWEST, HIGHEST = -(1 << 63), (1 << 63) - 1


def back(array: np.ndarray) -> np.ndarray:
    done = PutDone(partition_id="p", indexes=array, generations=array[:0])
    found = decode(encode_message(done, 1))[1].indexes
    assert found.dtype == np.int64
    assert not found.flags.writeable
    return found


@given(
    first=st.integers(LOWEST, HIGHEST),
    step=st.integers(-(1 << 55), 1 << 55) | st.sampled_from([0, 1, -1]),
    count=st.sampled_from([0, 1, 2, 255, 256, 257, 1000]),
    changed=st.none() | st.tuples(st.integers(0, 999), st.integers(LOWEST, HIGHEST)),
)
def test_every_array_comes_back(first: int, step: int, count: int, changed: tuple[int, int] | None) -> None:
    """Runs of equal steps, runs with one number changed, and runs that leave the 64 bits and wrap around."""
    wrapped = [(first + number * step - LOWEST) % (1 << 64) + LOWEST for number in range(count)]
    if changed is not None and changed[0] < count:
        wrapped[changed[0]] = changed[1]
    array = np.array(wrapped, np.int64)
    np.testing.assert_array_equal(back(array), array)


def test_runs_are_short_on_the_wire() -> None:
    """The rows of a put of a million samples take no more bytes than those of ten."""
    million = PutDone(partition_id="p", indexes=np.arange(10**6), generations=np.zeros(10**6, np.int64))
    assert sum(map(len, encode_message(million, 1))) < 150
    np.testing.assert_array_equal(back(np.arange(MAX_RANGE + 1)), np.arange(MAX_RANGE + 1))


@pytest.mark.parametrize(
    ("first", "step", "count"),
    [(0, 1, -1), (0, 1, 0), (0, 1, 1), (0, 1, MAX_RANGE + 1), (0, 1 << 62, 4), (LOWEST, -1, 2), (HIGHEST, 1, 300)],
)
def test_ranges_beyond_what_is_allowed_are_refused(first: int, step: int, count: int) -> None:
    """Nothing is allocated for a claim, and no number leaves the 64 bits."""
    with pytest.raises(DecodeError, match="range"):
        unpack_value(msgpack.packb(msgpack.ExtType(RANGE, struct.pack("<qqq", first, step, count))))


def test_many_ranges_in_one_message_are_refused() -> None:
    """A short message cannot claim much memory with many small claims."""
    one = msgpack.ExtType(RANGE, struct.pack("<qqq", 0, 1, MAX_RANGE))
    with pytest.raises(DecodeError, match="in ranges"):
        unpack_value(msgpack.packb([one] * 10))
    assert decode(encode_message(Done(count=3), 1))[1].count == 3
