"""Iterations of a `StreamingDataLoader` that are left or repeated, and what its workers leave."""

from __future__ import annotations

import errno
import gc
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import transfer_queue as tq
from tests.dropin.streams import dataset, put, rows
from transfer_queue.dataloader import StreamingDataLoader


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("transfer_queue loader")


def opened() -> int:
    links = [Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    return sum("transfer_queue loader" in os.readlink(link) for link in links if link.is_symlink())


def test_42_the_memory_of_workers_ends_with_their_iteration(conf: Any, partition: str) -> None:
    """That of pieces that are kept ends with them; the loader can go on without workers."""
    put(partition, *range(8))
    with closing(StreamingDataLoader(dataset(conf, partition, 4, 4, keep_batches=False), num_workers=1)) as loader:
        kept = list(loader)
        assert mapped() == 1
        kept.clear()
        gc.collect()
        assert mapped() == 0
        put(partition, *range(8, 12))
        loader.num_workers, loader.prefetch_factor = 0, None
        assert rows(loader) == [8, 9, 10, 11]


def test_42_workers_that_cannot_start_leave_no_descriptor(conf: Any, partition: str) -> None:
    stream = dataset(conf, partition, process_batch_fn=lambda data, meta, micro_batch_size: [(data, meta)])
    before = opened()
    with closing(StreamingDataLoader(stream, num_workers=1, multiprocessing_context="spawn")) as loader:
        for _ in range(3):
            with pytest.raises(Exception, match="pickle"):
                next(iter(loader))
    gc.collect()
    assert opened() <= before + 1  # the last exception may still hold what was to be sent


@pytest.mark.parametrize("lease", [None, 30.0])
def test_42_workers_that_persist_go_on(conf: Any, partition: str, lease: float | None) -> None:
    stream = dataset(conf, partition, 4, 2, keep_batches=False, lease=lease)
    with closing(StreamingDataLoader(stream, num_workers=2, persistent_workers=True)) as loader:
        for values in (range(8), range(8, 24)):
            put(partition, *values)
            assert sorted(rows(loader)) == list(values)


def test_42_workers_that_persist_and_a_sampler_that_deals_by_number(conf: Any, partition: str) -> None:
    """An iteration that is left gives up its workers, which are ahead; the next one goes on behind its last piece."""
    tq.get_client().register_sampler("persist", "RankAwareSampler")
    put(partition, *range(24))
    stream = dataset(conf, partition, 4, 2, keep_batches=False, task_name="persist")
    with closing(StreamingDataLoader(stream, num_workers=2, persistent_workers=True)) as loader:
        left = iter(loader)
        seen = rows([next(left), next(left), next(left)])
        left.close()
        seen += rows(loader)
    assert sorted(seen) == list(range(24))


def test_42_a_batch_that_was_not_begun_is_handed_out_whole(conf: Any, partition: str) -> None:
    """Where the draw gives what comes next, nothing of it is skipped for a batch that was left in the middle."""
    put(partition, *range(4))
    with closing(StreamingDataLoader(dataset(conf, partition, 4, 2, keep_batches=False), num_workers=1)) as loader:
        left = iter(loader)
        assert rows([next(left)]) == [0, 1]
        left.close()
        put(partition, *range(4, 12))
        assert rows(loader) == list(range(4, 12))


def test_42_under_a_lease_what_was_left_comes_again(conf: Any, partition: str) -> None:
    """Those who had drawn it are gone, so their leases are over; what was handed out is acknowledged."""
    put(partition, *range(12), last=True)
    stream = dataset(conf, partition, 4, 2, keep_batches=False, lease=30.0)
    with closing(StreamingDataLoader(stream, num_workers=1)) as loader:
        left = iter(loader)
        seen = rows([next(left), next(left), next(left)])
        left.close()
        seen += rows(loader)
    assert sorted(seen) == list(range(12))


def test_42_where_there_is_no_such_memory_batches_come_all_the_same(
    conf: Any, partition: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put(partition, *range(8))

    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.EFBIG, "file too large")

    before = opened()
    monkeypatch.setattr(os, "ftruncate", refuse)
    with closing(StreamingDataLoader(dataset(conf, partition, 4, 2, keep_batches=False), num_workers=1)) as loader:
        iterator = iter(loader)
        first = rows([next(iterator)])
        monkeypatch.undo()
        assert first + rows(iterator) == list(range(8))
    assert "slower way" in caplog.text and opened() <= before
