"""`StreamingDataset` and `StreamingDataLoader` (checklist 42, 43)."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict

import transfer_queue as tq
from tests.dropin.processes import CONTEXT
from tests.dropin.streams import dataset, put, rows
from transfer_queue.dataloader import StreamingDataLoader, StreamingDataset, chunk_batch_fn, default_fetch_batch_fn
from transfer_queue.metadata import BatchMeta


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lease", [None, 30.0])
def test_42_a_finite_stream_ends_when_its_partition_is_consumed(
    conf: Any, partition: str, workers: int, lease: float | None
) -> None:
    put(partition, *range(50))
    with closing(StreamingDataLoader(dataset(conf, partition, lease=lease), num_workers=workers)) as loader:
        assert sorted(rows(loader)) == list(range(50))
        assert rows(loader) == []
    assert tq.get_client().check_consumption_status("train", partition)


def test_42_ten_by_four_is_cut_alike_for_data_and_meta() -> None:
    jagged = torch.nested.as_nested_tensor([torch.arange(n) for n in range(10)], layout=torch.jagged)
    texts = NonTensorStack(*[str(n) for n in range(10)])
    data = TensorDict({"j": jagged, "d": torch.arange(20).view(10, 2), "t": texts}, batch_size=10)
    meta = BatchMeta(global_indexes=list(range(10)), partition_ids=["p"] * 10)
    pieces = list(chunk_batch_fn(data, meta, micro_batch_size=4))
    assert [(len(piece), part.size) for piece, part in pieces] == [(4, 4), (4, 4), (2, 2)]
    begin = 0
    for piece, part in pieces:
        end = begin + part.size
        assert part.global_indexes == list(range(begin, end))
        assert piece["j"].layout == torch.jagged
        assert [row.tolist() for row in piece["j"].unbind()] == [list(range(n)) for n in range(begin, end)]
        assert piece["d"].tolist() == data["d"][begin:end].tolist()
        assert piece["t"].tolist() == [str(n) for n in range(begin, end)]
        begin = end


@pytest.mark.parametrize(
    ("data", "size", "natural", "text"),
    [
        ({"x": torch.ones(4)}, 1, TypeError, "a batch to cut is a TensorDict, not dict"),
        (TensorDict({}, batch_size=[4]), 0, ValueError, "positive int, not 0"),
        (TensorDict({}, batch_size=[4]), 2.0, ValueError, r"positive int, not 2\.0"),
        (TensorDict({}, batch_size=[4]), 5, ValueError, "5 is larger than the batch of 4 rows"),
        (TensorDict({}, batch_size=[]), 1, ValueError, "no batch dimension"),
    ],
)
def test_42_what_cannot_be_cut(data: Any, size: Any, natural: type[Exception], text: str) -> None:
    with pytest.raises(natural, match=text):
        chunk_batch_fn(data, BatchMeta(), micro_batch_size=size)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"micro": 0}, "micro_batch_size must be a positive int, not 0"),
        ({"batch": -1}, "batch_size must be a positive int, not -1"),
        ({"dp_rank": -1}, "dp_rank must be an int of at least 0, not -1"),
        ({"lease": 1.0, "fetch_batch_fn": default_fetch_batch_fn}, "lease is for the default fetch_batch_fn"),
    ],
)
def test_42_bad_arguments_of_a_dataset(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        dataset({}, "p", **wrong)
    with pytest.raises(ValueError, match="data_fields is empty"):
        StreamingDataset({}, 1, 1, [], "p", "t", 0)


def test_42_an_endless_stream_goes_on_when_rows_come(conf: Any, partition: str) -> None:
    put(partition, *range(4))
    stream = dataset(conf, partition, 4, 2, should_check_consumption_status=False)
    with closing(stream):
        pieces = iter(stream)
        assert rows([next(pieces), next(pieces)]) == [0, 1, 2, 3]
        later = threading.Timer(0.3, lambda: put(partition, *range(4, 8)))
        later.start()
        begin = time.monotonic()
        assert rows([next(pieces), next(pieces)]) == [4, 5, 6, 7]
        assert 0.2 < time.monotonic() - begin < 0.9  # the draw was parked: it did not wait for its next look
        later.join()
        pieces.close()


def test_42_reset_replays_and_step_moves_on(conf: Any, partition: str) -> None:
    put(partition, *range(12))
    with closing(StreamingDataLoader(dataset(conf, partition, 6, 4))) as loader:
        first = rows(loader)
        loader.reset()
        assert rows(loader) == first
        assert [meta.size for _, meta in loader.get_buffer()] == [6, 6]
        other = f"{partition} 2"
        put(other, *range(12, 18))
        loader.step(other)
        assert loader.get_buffer() == []
        assert rows(loader) == list(range(12, 18))
        tq.get_client().clear_partition(other)


def test_42_reset_with_workers_replays_what_was_handed_out(conf: Any, partition: str) -> None:
    put(partition, *range(24))
    with closing(StreamingDataLoader(dataset(conf, partition, 6, 3), num_workers=2)) as loader:
        first = rows(loader)
        assert len(loader.get_buffer()) == 8
        loader.reset()
        assert rows(loader) == first


def test_42_an_iteration_that_was_left_goes_on_behind_its_last_piece(conf: Any, partition: str) -> None:
    put(partition, *range(20))
    with closing(dataset(conf, partition, 10, 4)) as stream:
        begun = iter(stream)
        first = rows([next(begun), next(begun)])
        begun.close()
        assert first + rows(stream) == list(range(20))


def test_42_functions_of_the_user(conf: Any, partition: str) -> None:
    put(partition, *range(8))
    calls = []

    def fetch(**given: Any) -> Any:
        calls.append(given)
        data, meta = default_fetch_batch_fn(**given)
        return (None, meta) if data is None else (data.select("x"), meta)

    def process(data: Any, meta: BatchMeta, micro_batch_size: int) -> Any:
        assert micro_batch_size == 3
        return [(data["x"].sum().item(), meta)]

    with closing(dataset(conf, partition, 4, 3, fetch_batch_fn=fetch, process_batch_fn=process)) as stream:
        assert [value for value, _ in stream] == [6, 22]
    assert calls[0]["sampling_config"] == {
        "dp_rank": 0,
        "task_name": "train",
        "partition_id": partition,
        "batch_index": 0,
    }
    assert [call["batch_index"] for call in calls[:2]] == [0, 1]


def test_42_an_error_ends_the_iteration(conf: Any, partition: str) -> None:
    def fetch(**given: Any) -> Any:
        raise ArithmeticError("no batch today")

    stream = dataset(conf, partition, fetch_batch_fn=fetch)
    with closing(stream), pytest.raises(ArithmeticError, match="no batch today"):
        next(iter(stream))


def test_42_two_ranks_get_the_same_rows_from_a_sampler_that_caches(conf: Any, partition: str) -> None:
    put(partition, *range(12))
    tq.get_client().register_sampler("cached", "RankAwareSampler")
    streams = [dataset(conf, partition, 4, 4, task_name="cached", dp_rank=0) for _ in range(2)]
    with closing(streams[0]), closing(streams[1]):
        assert rows(streams[0]) == list(range(12))
        assert rows(streams[1]) == list(range(12))  # late, when nothing is ready any more


def test_42_state_of_one_process_lets_another_go_on(conf: Any, partition: str) -> None:
    """Also in the middle of a batch, where the sampler deals batches out by their number."""
    put(partition, *range(12))
    tq.get_client().register_sampler("resumed", "RankAwareSampler")
    with closing(dataset(conf, partition, 4, 2, task_name="resumed")) as stream:
        pieces = iter(stream)
        seen = rows([next(pieces), next(pieces), next(pieces)])
        state = stream.state_dict()
        pieces.close()
    with closing(dataset(conf, "another", 4, 2, task_name="resumed")) as stream:
        stream.load_state_dict(state)
        assert seen + rows(stream) == list(range(12))


def test_42_what_is_left_of_a_sealed_partition_comes_as_a_smaller_batch(conf: Any, partition: str) -> None:
    put(partition, *range(10))
    with closing(dataset(conf, partition, 4, 4)) as stream:
        later = threading.Timer(0.3, lambda: put(partition, 10, last=True))
        later.start()
        assert rows(stream) == list(range(11))
        later.join()


def test_42_ranks_share_what_is_left(conf: Any, partition: str, caplog: pytest.LogCaptureFixture) -> None:
    """11 rows, 2 ranks with batches of 4: 4 and 4, then 1 and 1; the last one cannot be shared."""
    put(partition, *range(11), last=True)
    tq.get_client().register_sampler("shared", "DPSampler", dp_size=2)
    streams = [dataset(conf, partition, 4, 4, task_name="shared", dp_rank=rank) for rank in range(2)]
    with closing(streams[0]), closing(streams[1]), ThreadPoolExecutor(2) as pool:
        seen = list(pool.map(rows, streams))
    assert [len(part) for part in seen] == [5, 5]
    assert len(set(seen[0] + seen[1])) == 10
    assert "the last 1 rows are too few" in caplog.text


def test_42_what_was_drawn_ahead_under_a_lease_is_given_back(conf: Any, partition: str) -> None:
    put(partition, *range(12))
    with closing(dataset(conf, partition, 4, 4, lease=60.0)) as stream:
        assert rows([next(iter(stream))]) == [0, 1, 2, 3]
    assert tq.get_client().get_meta(["x"], 8, partition, task_name="train", timeout=1.0).size == 8
    assert tq.get_client().check_consumption_status("train", partition)


# ---------------------------------------------------------------- other processes


def _rank(address: str, partition: str, out: Path) -> None:
    """Write a line per piece; with its workers this process is a group of its own, which can be killed as a whole."""
    os.setsid()
    conf = tq.init({"address": address})
    stream = StreamingDataset(conf, 64, 16, ["x"], partition, "train", 0, True, lease=30.0, keep_batches=False)
    loader = StreamingDataLoader(stream, num_workers=2)
    with out.open("a", buffering=1) as file:
        for data, _ in loader:
            file.write(json.dumps(data["x"].tolist()) + "\n")
    loader.close()
    tq.close()


class _Ranks:
    """Processes that read one partition. Rows come as they are read: none has all before another has begun."""

    def __init__(self, address: str, partition: str, folder: Path) -> None:
        self.total = 0
        self._places = address, partition
        self._folder = folder
        self._processes: dict[str, Any] = {}

    def start(self, name: str) -> None:
        process = CONTEXT.Process(target=_rank, args=(*self._places, self._folder / name))
        process.start()
        self._processes[name] = process

    def lines(self, name: str) -> list[str]:
        file = self._folder / name
        return file.read_text().splitlines() if file.exists() else []

    def put(self, count: int, *, last: bool = False) -> None:
        data = {"x": torch.arange(self.total, self.total + count)}
        tq.get_client().put(data, partition_id=self._places[1], is_last=last)
        self.total += count

    def feed(self, name: str, pieces: int, total: int) -> None:
        """Put rows until this rank has written so many pieces of 16, and at least so many rows were put in all."""
        deadline = time.monotonic() + 60
        while len(self.lines(name)) < pieces or self.total < total:
            assert time.monotonic() < deadline
            if self.total - 16 * sum(len(self.lines(each)) for each in self._processes) < 1280:
                self.put(640)
            time.sleep(0.005)

    def kill(self, name: str) -> None:
        os.killpg(self._processes[name].pid, signal.SIGKILL)

    def statuses(self) -> list[int | None]:
        for process in self._processes.values():
            process.join(60)
        return [process.exitcode for process in self._processes.values()]

    def close(self) -> None:
        for name, process in self._processes.items():
            if process.is_alive():
                self.kill(name)
            process.join()
            process.close()


@pytest.mark.timeout(120)
def test_42_no_row_is_lost_when_a_rank_is_killed_and_started_again(conf: Any, partition: str, tmp_path: Path) -> None:
    """2 ranks with 2 workers each; what those of a killed rank had drawn ahead goes to others."""
    with closing(_Ranks(conf.address, partition, tmp_path)) as ranks:
        ranks.put(640)
        for name in ("0", "1"):
            ranks.start(name)
        ranks.feed("1", pieces=25, total=640)
        ranks.kill("1")
        ranks.start("2")
        ranks.feed("2", pieces=1, total=6400)
        ranks.put(64, last=True)
        assert ranks.statuses() == [0, -signal.SIGKILL, 0]
        lines = [line for name in ("0", "1", "2") for line in ranks.lines(name)]
        counts = Counter(value for line in lines for value in json.loads(line))
        assert len(counts) == ranks.total
    twice = [value for value, count in counts.items() if count == 2]
    assert counts.total() - len(counts) == len(twice) <= 16  # the piece that it had in hand when the signal came


def test_43_a_stream_may_start_before_its_producer(conf: Any, partition: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Consumers know that the partition is unfinished before anything is written."""
    monkeypatch.setenv("TQ_PRE_ALLOC_SAMPLE_NUM", "12")
    with closing(dataset(conf, partition, 4, 4)) as stream:
        later = threading.Timer(0.2, lambda: [put(partition, *range(n, n + 4)) for n in (0, 4)])
        last = threading.Timer(0.6, lambda: put(partition, *range(8, 12)))
        for timer in (later, last):
            timer.start()
        assert rows(stream) == list(range(12))
        for timer in (later, last):
            timer.join()
