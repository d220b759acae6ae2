"""Work shared out among threads: everything is done once, and nothing is under way afterwards."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transfer_queue.storage.shares import SHARE_BYTES, Copy, run_all


@dataclass
class Counted:
    """Work that notes which of its parts were done, and by which threads."""

    size_bytes: int
    parts: int
    done: list[int] = field(default_factory=list)
    threads: set[threading.Thread] = field(default_factory=set)

    def run(self, begin: int, end: int) -> None:
        self.done += range(begin, end)
        self.threads.add(threading.current_thread())


@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 50)), max_size=8), st.integers(1, 5))
@example([(1, 0), (0, 1)], 1)
@example([(0, 3), (8, 8), (0, 2), (0, 1)], 4)
def test_every_part_is_done_once(sizes: list[tuple[int, int]], threads: int) -> None:
    """However the work is cut, no part is left out or done twice; empty work is no trouble."""
    works = [Counted(size, parts) for size, parts in sizes]
    run_all(works, threads)
    assert [sorted(work.done) for work in works] == [list(range(work.parts)) for work in works]


def test_shares_are_of_about_one_size() -> None:
    """Four threads get a quarter of the bytes each, whatever the works are; a little work stays in the caller."""
    works = [Counted(100, 10), Counted(300, 30), Counted(400, 40)]
    run_all(works, 4)
    assert [len(work.threads) for work in works] == [1, 2, 2]
    little = Counted(2 * SHARE_BYTES - 1, 10)
    run_all([little])
    assert little.threads == {threading.current_thread()}


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_copy_moves_all_bytes(threads: int) -> None:
    """Also where the size is no multiple of the parts."""
    source = np.random.default_rng(0).integers(0, 255, (1 << 20) + 17, np.uint8)
    target = np.zeros_like(source)
    run_all([Copy(target[:5], source[:5]), Copy(target[5:], source[5:])], threads)
    np.testing.assert_array_equal(target, source)


def test_an_error_in_a_thread_is_raised_when_all_have_ended() -> None:
    """The caller learns of it, and may free the memory."""
    ended = []

    class Failing(Counted):
        def run(self, begin: int, end: int) -> None:
            if end == self.parts:
                raise ValueError("the last part")
            ended.append(begin)

    with pytest.raises(ValueError, match="the last part"):
        run_all([Failing(6, 6)], 3)
    assert len(ended) == 2 and not [one for one in threading.enumerate() if one.name == "tq-share"]


def test_work_is_done_without_threads_where_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the end of the interpreter, or at the limit of threads."""

    def refused(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    work = Counted(4, 4)
    run_all([work], 2)
    assert work.done == [2, 3, 0, 1]
