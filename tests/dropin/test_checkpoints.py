"""`save_checkpoint` and `load_checkpoint` of the module, in one live queue (checklist 41)."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import NonTensorStack, TensorDict
from transfer_queue.sampler import RankAwareSampler

import transfer_queue as tq
from tests.dropin.columns import jagged
from transfer_queue import TransferQueueClient
from transfer_queue.errors import NotInitialized, StaleSampleError, WrongType

CONF = {
    "runtime": "embedded",
    "controller": {"sampler": RankAwareSampler, "polling_mode": True},
    "backend": {"SimpleStorage": {"capacity_bytes": 1 << 23, "arena_bytes": 1 << 20}},
}
ROWS = 6
KEYS = [f"k{row}" for row in (3, 1, 5, 0, 2, 4)]


@pytest.fixture
def client() -> Iterator[TransferQueueClient]:
    tq.close()
    tq.init(CONF)
    yield tq.get_client()
    tq.close()


def columns() -> TensorDict:
    objects = [{"row": row, "path": (row, "a")} if row % 2 else None for row in range(ROWS)]
    return TensorDict(
        {
            "dense": torch.arange(ROWS * 2, dtype=torch.bfloat16).view(ROWS, 2),
            "ragged": jagged(*range(ROWS), dtype=torch.int64),
            "text": NonTensorStack(*[f"text {row}" if row else "" for row in range(ROWS)]),
            "objects": NonTensorStack(*objects),
        },
        batch_size=ROWS,
    )


def fill() -> None:
    """Two partitions with keys, one of them emptied again, and rows without keys."""
    tq.kv_batch_put(KEYS, "train", columns(), [{"n": row, "list": [row]} for row in range(ROWS)])
    tq.kv_put("k1", "train", tag={"late": True})
    tq.kv_put("only a tag", "train", tag={"status": "pending"})
    tq.kv_put("gone", "emptied", tag={})
    tq.kv_clear("gone", "emptied")
    tq.get_client().put({"x": torch.arange(4)}, partition_id="plain")


def draw(client: TransferQueueClient, rank: int, index: int = 0) -> list[int]:
    params = {"dp_rank": rank, "batch_index": index, "task_name": "actor", "partition_id": "plain"}
    meta = client.get_meta(["x"], 2, "plain", task_name="actor", sampling_config=params)
    values: list[int] = client.get_data(meta)["x"].tolist() if meta.size else []
    return values


def seen() -> list[Any]:
    """All that can be read of the keys: order, tags, values and layouts."""
    listing = tq.kv_list()
    data = tq.kv_batch_get(KEYS, "train", ["dense", "ragged", "text", "objects"])
    ragged = [row.tolist() for row in data["ragged"].unbind()]
    order = [(name, list(keys)) for name, keys in listing.items()]
    values = [data["dense"].tolist(), data["dense"].dtype, ragged, data["text"].tolist(), data["objects"].tolist()]
    return [order, listing, *values]


def test_41_save_clear_load(client: TransferQueueClient, tmp_path: Path) -> None:
    """Everything is as it was: keys in order, tags, values, consumption, what samplers keep."""
    fill()
    assert (draw(client, 0), client.check_consumption_status("actor", "plain")) == ([0, 1], False)
    before = seen()
    tq.save_checkpoint(tmp_path / "step", metadata={"global_steps": 3})
    assert draw(client, 1) == [2, 3] and client.check_consumption_status("actor", "plain")
    tq.kv_clear(KEYS, "train")
    client.clear_partition("plain")
    tq.kv_put("new", "later", {"dense": torch.ones(1)}, {})
    tq.load_checkpoint(tmp_path / "step")
    assert seen() == before
    assert "later" not in client.get_partition_list() and tq.kv_list("emptied") == {"emptied": {}}
    assert draw(client, 0) == [0, 1]  # the batch that the sampler had kept for this rank
    assert draw(client, 1) == [2, 3]
    assert client.check_consumption_status("actor", "plain")
    assert tq.get_client() is client


def test_41_metadata_json(client: TransferQueueClient, tmp_path: Path) -> None:
    """What others read of it, and the names that a save leaves."""
    tq.kv_put("a", "p", {"x": torch.ones(1)})
    tq.save_checkpoint(str(tmp_path / "a" / "b"), metadata={"global_steps": 3, "nested": {"list": [1, None, "x"]}})
    tq.save_checkpoint(tmp_path / "plain")
    written = json.loads((tmp_path / "a" / "b" / "metadata.json").read_text())
    assert written["storage_saved"] is True
    assert written["user_metadata"] == {"global_steps": 3, "nested": {"list": [1, None, "x"]}}
    assert json.loads((tmp_path / "plain" / "metadata.json").read_text())["user_metadata"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "plain"]


def test_41_storage_is_always_saved(
    client: TransferQueueClient, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows are in memory: leaving them out is warned of and not done."""
    tq.kv_put("a", "p", {"x": torch.ones(1)})
    with caplog.at_level(logging.WARNING, "transfer_queue"):
        tq.save_checkpoint(tmp_path / "c", include_storage=False)
    assert "include_storage" in caplog.text
    tq.kv_clear("a", "p")
    tq.load_checkpoint(tmp_path / "c")
    assert tq.kv_batch_get("a", "p")["x"].tolist() == [[1.0]]


def test_41_errors(client: TransferQueueClient, tmp_path: Path) -> None:
    """Each is a `RuntimeError` and its natural type, and leaves queue and folders as they were."""
    tq.kv_put("a", "p", tag={"n": 1})
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "nothing", tmp_path / "empty"):
        for natural in (FileNotFoundError, RuntimeError):
            with pytest.raises(natural, match=nothing.name):
                tq.load_checkpoint(nothing)
    for natural in (TypeError, WrongType):
        with pytest.raises(natural, match="JSON"):
            tq.save_checkpoint(tmp_path / "c", metadata={"x": object()})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty"]
    assert tq.kv_list() == {"p": {"a": {"n": 1}}}


def test_41_without_a_queue(tmp_path: Path) -> None:
    tq.close()
    for call in (lambda: tq.save_checkpoint(tmp_path / "c"), lambda: tq.load_checkpoint(tmp_path / "c")):
        with pytest.raises(NotInitialized, match="not initialized"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_41_a_save_that_fails_leaves_the_old_checkpoint(
    client: TransferQueueClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no `.tmp` beside it; neither does a load of a damaged one change the queue."""
    tq.kv_put("a", "p", {"x": torch.ones(1)})
    tq.save_checkpoint(tmp_path / "c", metadata={"n": 1})
    tq.kv_put("b", "p", {"x": torch.ones(1)})
    with monkeypatch.context() as patch:
        patch.setattr("transfer_queue.client.checkpoint_files.sync_tree", _no_space)
        with pytest.raises(RuntimeError, match="no space"):
            tq.save_checkpoint(tmp_path / "c", metadata={"n": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert json.loads((tmp_path / "c" / "metadata.json").read_text())["user_metadata"] == {"n": 1}
    damaged = shutil.copytree(tmp_path / "c", tmp_path / "damaged")
    (damaged / "blocks.bin").write_bytes(b"")
    with pytest.raises(RuntimeError, match="damaged"):
        tq.load_checkpoint(damaged)
    assert list(tq.kv_list("p")["p"]) == ["a", "b"]
    tq.load_checkpoint(tmp_path / "c")
    assert list(tq.kv_list("p")["p"]) == ["a"]


def _no_space(path: Path) -> None:
    raise OSError(28, "no space left on device")


def test_41_a_leftover_old_checkpoint_is_taken_back(client: TransferQueueClient, tmp_path: Path) -> None:
    """A save that died between two renames left only `<dir>.old`; one beside a whole checkpoint is not used."""
    tq.kv_put("a", "p", tag={"n": 1})
    tq.save_checkpoint(tmp_path / "c")
    (tmp_path / "c").rename(tmp_path / "c.old")
    tq.kv_clear("a", "p")
    tq.load_checkpoint(tmp_path / "c")
    assert tq.kv_list("p") == {"p": {"a": {"n": 1}}}
    shutil.copytree(tmp_path / "c", tmp_path / "c.old")
    tq.kv_put("a", "p", tag={"n": 2})
    tq.save_checkpoint(tmp_path / "c")
    tq.load_checkpoint(tmp_path / "c")
    assert tq.kv_list("p") == {"p": {"a": {"n": 2}}}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_41_puts_that_run_meanwhile_are_wholly_in_or_out(client: TransferQueueClient, tmp_path: Path) -> None:
    """One moment for key, tag and columns of a put of two rows."""
    stop = threading.Event()

    def produce() -> None:
        number = 0
        while not stop.is_set():
            keys = [f"{number}-a", f"{number}-b"]
            data = TensorDict({"x": torch.full((2, 8), number), "y": torch.full((2,), number)}, batch_size=2)
            tq.kv_batch_put(keys, "p", data, [{"n": number}] * 2)
            number += 1

    tq.kv_put("first", "p", tag={})
    producer = threading.Thread(target=produce)
    producer.start()
    for number in range(4):
        tq.save_checkpoint(tmp_path / str(number))
    stop.set()
    producer.join()
    for number in range(4):
        tq.load_checkpoint(tmp_path / str(number))
        listing = tq.kv_list("p")["p"]
        keys = [key for key in listing if key != "first"]
        assert [key for key in keys if key.endswith("a")] == [f"{pair}-a" for pair in range(len(keys) // 2)]
        if keys:
            data = tq.kv_batch_get(keys, "p", strict=True)
            assert data["y"].tolist() == data["x"][:, 0].tolist() == [listing[key]["n"] for key in keys]


def test_41_handles_from_before_are_stale_and_parked_draws_are_looked_at(
    client: TransferQueueClient, tmp_path: Path
) -> None:
    meta = client.put({"x": torch.arange(2)}, partition_id="plain")
    tq.save_checkpoint(tmp_path / "c")
    client.clear_partition("plain")
    found: list[Any] = []
    params = {"dp_rank": 0, "batch_index": 0, "task_name": "t", "partition_id": "plain"}
    parked = threading.Thread(
        target=lambda: found.append(client.get_meta(["x"], 2, "plain", "fetch", "t", params, timeout=30))
    )
    parked.start()
    tq.load_checkpoint(tmp_path / "c")
    parked.join(30)
    assert client.get_data(found[0])["x"].tolist() == [0, 1]
    with pytest.raises(StaleSampleError):
        client.put({"y": torch.ones(2)}, metadata=meta)
