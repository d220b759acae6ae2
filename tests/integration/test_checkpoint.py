"""Checkpoints: one moment of the whole queue in a folder, and back into a queue of any number of units."""

from __future__ import annotations

import functools
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from transfer_queue import TransferQueueClient
from transfer_queue.client import checkpoint
from transfer_queue.client.checkpoint_files import BLOCKS, INDEX, METADATA, STATE
from transfer_queue.client.drivers import run
from transfer_queue.client.steps import Call, Compute, Operation, Step
from transfer_queue.config import merged, settings
from transfer_queue.errors import (
    CapacityExceeded,
    ConnectionLost,
    DecodeError,
    InvalidArgument,
    LeaseExpired,
    StaleSampleError,
)
from transfer_queue.messages import KeepCut, Reconcile
from transfer_queue.runtime.embedded import EmbeddedRuntime

Start = Callable[..., TransferQueueClient]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts queues of their own and returns a client of each."""
    closing: list[Any] = []

    def begin(units: int = 1, transport: str = "auto", **controller: Any) -> TransferQueueClient:
        storage = {"num_data_storage_units": units, "capacity_bytes": 64 << 20, "arena_bytes": 8 << 20}
        conf = {"runtime": "embedded", "controller": controller, "backend": {"SimpleStorage": storage}}
        runtime = EmbeddedRuntime(settings(merged({**conf, "transport": transport})))
        client = TransferQueueClient("tester", runtime.info, transport=transport, connector=runtime)
        closing.extend((client, runtime))
        return client

    yield begin
    for resource in closing:
        resource.close()


def fill(client: TransferQueueClient) -> dict[str, Any]:
    """Rows of several kinds, of which some were drawn and some are cleared; returns what each field holds."""
    values = torch.arange(24, dtype=torch.bfloat16).reshape(8, 3)
    ragged = torch.nested.as_nested_tensor([torch.arange(n) for n in range(8)], layout=torch.jagged)
    texts = [f"text {n}" for n in range(8)]
    keys = [f"k{n}" for n in range(8)]
    meta = client.put(
        {"values": values, "ragged": ragged, "texts": texts},
        partition_id="train",
        keys=keys,
        tags=[{"n": n} for n in range(8)],
        group_ids=[n // 2 for n in range(8)],
        group_size=2,
    )
    client.put({"more": [{"n": n, "t": (n,)} for n in range(8)]}, metadata=meta)
    client.get_meta(["values"], 2, partition_id="train", task_name="actor")
    client.clear_samples(meta.select_samples([7]))
    client.put({"values": torch.ones(2, 3)}, partition_id="val")
    return {"values": values[:7], "texts": texts[:7], "keys": keys[:7]}


def check(client: TransferQueueClient, expected: dict[str, Any]) -> None:
    """The queue holds what `fill` put, and goes on where it stood."""
    meta = client.kv_retrieve_meta(expected["keys"], partition_id="train")
    data = client.get_data(meta)
    assert torch.equal(data["values"], expected["values"])
    assert [row.tolist() for row in data["ragged"].unbind()] == [list(range(n)) for n in range(7)]
    assert data["texts"].tolist() if hasattr(data["texts"], "tolist") else list(data["texts"]) == expected["texts"]
    assert client.get_partition_list() == ["train", "val"]
    rest = client.get_meta(["values", "more"], 5, partition_id="train", task_name="actor")
    assert rest.global_indexes == [2, 3, 4, 5, 6]
    audit = client.audit("train")["partitions"]["train"]["tasks"]["actor"]
    assert audit["balanced"]
    assert (audit["inserted"], audit["consumed"], audit["dropped"]) == (8, 7, {"cleared": 1})


@pytest.mark.parametrize(("before", "after"), [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_what_was_saved_is_there_again_in_another_queue(
    start: Start, tmp_path: Path, before: int, after: int, transport: str
) -> None:
    """Data, keys, tags, groups and consumption; with any number of units, on this host and by TCP."""
    first = start(before, transport)
    expected = fill(first)
    first.save_checkpoint(tmp_path / "step_1", metadata={"global_steps": 1})
    assert json.loads((tmp_path / "step_1" / METADATA).read_text())["user_metadata"] == {"global_steps": 1}
    second = start(after, transport)
    assert second.load_checkpoint(tmp_path / "step_1") == 9
    check(second, expected)
    check(first, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


async def test_the_awaitable_face_saves_and_loads(start: Start, tmp_path: Path) -> None:
    client = start()
    expected = fill(client)
    await client.async_save_checkpoint(tmp_path / "c")
    await client.async_clear_partition("train")
    assert await client.async_load_checkpoint(tmp_path / "c") == 9
    check(client, expected)


def test_loading_into_the_same_queue_takes_everything_back(start: Start, tmp_path: Path) -> None:
    """What came after the cut is gone, what was drawn after it comes again, and metas from before name nothing."""
    client = start()
    expected = fill(client)
    client.save_checkpoint(tmp_path / "c")
    old = client.kv_retrieve_meta(["k2"], partition_id="train")
    late = client.put({"values": torch.zeros(1, 3)}, partition_id="late")
    drawn = client.get_meta(["values"], 5, partition_id="train", task_name="actor")
    assert drawn.global_indexes == [2, 3, 4, 5, 6]
    client.load_checkpoint(tmp_path / "c")
    for stale in (old, late, drawn):
        assert client.clear_samples(stale) == 0
        with pytest.raises(StaleSampleError):
            client.put({"more": list(range(len(stale)))}, metadata=stale)
    check(client, expected)


def test_a_lease_that_was_open_is_over_and_its_samples_are_ready(start: Start, tmp_path: Path) -> None:
    client = start()
    client.put({"x": torch.arange(6)}, partition_id="p")
    client.ack(client.get_meta(["x"], 2, partition_id="p", task_name="t", lease=600.0))
    leased = client.get_meta(["x"], 2, partition_id="p", task_name="t", lease=600.0)
    client.save_checkpoint(tmp_path / "c")
    client.load_checkpoint(tmp_path / "c")
    with pytest.raises((LeaseExpired, StaleSampleError)):
        client.ack(leased)
    again = client.get_meta(["x"], 4, partition_id="p", task_name="t", lease=600.0)
    assert again.global_indexes == [2, 3, 4, 5]
    assert client.ack(again) == 4
    assert client.audit("p")["partitions"]["p"]["tasks"]["t"]["balanced"]


def test_a_rank_that_had_not_come_gets_its_slice_after_loading(start: Start, tmp_path: Path) -> None:
    client = start()
    client.put({"x": torch.arange(8)}, partition_id="p")

    def rank(number: int) -> list[int]:
        params = {"dp_rank": number, "dp_size": 2, "dp_group_id": "g"}
        meta = client.get_meta(["x"], 2, partition_id="p", task_name="t", sampler_params=params)
        found: list[int] = meta.global_indexes
        return found

    assert rank(0) == [0, 1]
    client.save_checkpoint(tmp_path / "c")
    assert rank(1) == [2, 3]
    client.load_checkpoint(tmp_path / "c")
    assert (rank(0), rank(1)) == ([0, 1], [2, 3])
    assert client.get_meta(["x"], 4, partition_id="p", task_name="t").global_indexes == [4, 5, 6, 7]


def test_a_draw_that_waits_is_looked_at_again(start: Start, tmp_path: Path) -> None:
    client = start()
    client.put({"x": torch.arange(2)}, partition_id="p")
    client.save_checkpoint(tmp_path / "c")
    client.clear_partition("p")
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(client.get_meta(["x"], 2, partition_id="p", task_name="t", timeout=20.0))
    )
    waiting.start()
    client.load_checkpoint(tmp_path / "c")
    waiting.join()
    assert found[0].global_indexes == [0, 1]


def test_traffic_goes_on_while_a_checkpoint_is_saved_and_each_put_is_wholly_in_or_out(
    start: Start, tmp_path: Path
) -> None:
    """Producers put two fields at once, a consumer clears; the checkpoint has rows with both fields or neither."""
    client = start()
    stop = threading.Event()
    puts = 0

    def produce() -> None:
        nonlocal puts
        while not stop.is_set():
            value = torch.full((4, 64), float(puts))
            meta = client.put({"a": value, "b": value + 0.5}, partition_id="p")
            if puts % 3 == 0:
                client.clear_samples(meta)
            puts += 1

    producer = threading.Thread(target=produce)
    producer.start()
    for number in range(5):
        client.save_checkpoint(tmp_path / f"c{number}")
    stop.set()
    producer.join()
    assert puts > 5
    other = start()
    for number in range(5):
        other.load_checkpoint(tmp_path / f"c{number}")
        if "p" in other.get_partition_list():
            meta = other.get_meta(["a", "b"], 1, mode="force_fetch", partition_id="p", task_name="t")
            assert len(meta) % 4 == 0
            if len(meta):  # all may have been cleared just before the cut
                data = other.get_data(meta)
                assert torch.equal(data["a"] + 0.5, data["b"])


def test_memory_is_reused_after_a_save_and_after_a_load(start: Start, tmp_path: Path) -> None:
    """Ten times more passes through than there is room for."""
    client = start()
    for number in range(20):
        meta = client.put({"x": torch.zeros(64, 20_000)}, partition_id="p", timeout=10.0)
        client.save_checkpoint(tmp_path / "c")
        if number % 2:
            client.load_checkpoint(tmp_path / "c")
            client.clear_partition("p")
        else:
            client.clear_samples(meta)


class TestInterrupted:
    """A save that is killed on the way leaves the old checkpoint or the new one, whole."""

    @pytest.fixture
    def two(self, start: Start, tmp_path: Path) -> tuple[TransferQueueClient, Path, Path]:
        client = start()
        client.put({"x": torch.arange(2)}, partition_id="old")
        client.save_checkpoint(tmp_path / "one")
        client.put({"x": torch.arange(2)}, partition_id="new")
        client.save_checkpoint(tmp_path / "two")
        return client, tmp_path / "one", tmp_path / "two"

    def test_while_the_files_are_written(self, two: Any, tmp_path: Path) -> None:
        client, old, new = two
        new.rename(tmp_path / "one.tmp")
        (tmp_path / "one.tmp" / METADATA).unlink()
        client.load_checkpoint(old)
        assert client.get_partition_list() == ["old"]
        client.save_checkpoint(old)
        assert not (tmp_path / "one.tmp").exists()

    def test_between_the_two_renames(self, two: Any, tmp_path: Path) -> None:
        client, old, new = two
        old.rename(tmp_path / "one.old")
        new.rename(tmp_path / "one.tmp")
        client.load_checkpoint(old)
        assert client.get_partition_list() == ["old"]

    def test_before_the_old_one_is_removed(self, two: Any, tmp_path: Path) -> None:
        client, old, new = two
        old.rename(tmp_path / "one.old")
        new.rename(tmp_path / "one")
        client.load_checkpoint(tmp_path / "one")
        assert client.get_partition_list() == ["old", "new"]
        client.save_checkpoint(tmp_path / "one")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]

    def test_a_save_that_fails_changes_nothing(self, two: Any, tmp_path: Path) -> None:
        client, old, _ = two
        blocked = tmp_path / "file"
        blocked.write_text("not a folder")
        with pytest.raises(CapacityExceeded, match="was not written, an older one is as it was"):
            client.save_checkpoint(blocked / "c")
        client.load_checkpoint(old)
        assert client.get_partition_list() == ["old"]


class TestHeld:
    """While the blocks of a cut are copied nothing of them is reused; a save that was not held all the time fails."""

    @staticmethod
    def meddled(operation: Operation[None], meddle: Callable[[Step | list[Call]], object]) -> Operation[None]:
        """The same operation; `meddle` is told of each step before it is done."""
        step = next(operation)
        while True:
            try:
                meddle(step)
                value = yield step
            except BaseException as error:
                send: Callable[[], Any] = functools.partial(operation.throw, error)
            else:
                send = functools.partial(operation.send, value)
            try:
                step = send()
            except StopIteration:
                return

    @pytest.fixture
    def saved(self, start: Start, tmp_path: Path) -> tuple[TransferQueueClient, Path]:
        """A queue, and a checkpoint of an earlier state of it."""
        client = start()
        client.put({"x": torch.arange(2)}, partition_id="old")
        client.save_checkpoint(tmp_path / "c")
        for _ in range(3):
            client.put({"x": torch.zeros(64, 20_000)}, partition_id="new")
        return client, tmp_path / "c"

    @pytest.mark.parametrize("how", ["it took too long", "the client was taken for dead", "a unit came back"])
    def test_a_cut_that_was_let_go_fails_the_save(self, saved: Any, how: str) -> None:
        """With a typed error, whatever was copied by then; the older checkpoint is as it was."""
        client, path = saved
        service = client._core.controller.peer._handler
        copied = 0

        def end(step: Any) -> None:
            nonlocal copied
            if isinstance(step, Compute):
                copied += 1
                if copied == 2:
                    cuts = service._cuts
                    match how:
                        case "it took too long":
                            assert cuts.end_overdue(math.inf)
                        case "a unit came back":
                            blocks = np.array(list(service.inspect(lambda ledger: ledger.blocks.cells)), np.int64)
                            service.ask(Reconcile(unit=1, blocks=blocks))
                        case _:
                            assert cuts.end_of(*cuts.clients())

        with pytest.raises(LeaseExpired, match="not held any more"):
            run(self.meddled(checkpoint.save_checkpoint(client._core, path), end))
        assert copied > 2
        assert [each.name for each in path.parent.iterdir()] == ["c"]
        client.load_checkpoint(path)
        assert client.get_partition_list() == ["old"]

    def test_a_save_that_takes_long_renews_it(self, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each block takes a minute: twice as long in all as the cut is held at first."""
        client, path = saved
        service, now = client._core.controller.peer._handler, [time.monotonic()]
        clock = SimpleNamespace(monotonic=lambda: now[0], time=time.time)
        monkeypatch.setattr("transfer_queue.client.checkpoint.time", clock)
        monkeypatch.setattr(service, "_clock", lambda: now[0])
        renewed = 0

        def pass_time(step: Any) -> None:
            nonlocal renewed
            renewed += isinstance(step, Call) and isinstance(step.request, KeepCut)
            if isinstance(step, Compute):
                now[0] += 40.0
                service.tick()
                assert service._ledger.blocks.copied

        run(self.meddled(checkpoint.save_checkpoint(client._core, path, timeout=1.0), pass_time))
        assert renewed >= 4
        client.load_checkpoint(path)
        assert client.get_partition_list() == ["old", "new"]

    def test_a_server_that_is_gone_is_no_full_disk(self, saved: Any) -> None:
        """The error says what happened, although it is an `OSError` too."""
        client, path = saved

        def lose(step: Any) -> None:
            if isinstance(step, Compute):
                raise ConnectionLost("the storage unit is gone")

        with pytest.raises(ConnectionLost, match="unit is gone"):
            run(self.meddled(checkpoint.save_checkpoint(client._core, path), lose))
        assert [each.name for each in path.parent.iterdir()] == ["c"]


class TestDamaged:
    """A checkpoint that is not what was written is refused, and the queue stays as it is."""

    @pytest.fixture
    def saved(self, start: Start, tmp_path: Path) -> tuple[TransferQueueClient, Path]:
        client = start()
        client.put({"x": torch.arange(1000)}, partition_id="p")
        client.put({"x": torch.arange(1000)}, partition_id="q")
        client.save_checkpoint(tmp_path / "c")
        client.clear_partition("q")
        return client, tmp_path / "c"

    def refused(self, client: TransferQueueClient, path: Path, match: str) -> None:
        with pytest.raises(DecodeError, match=match):
            client.load_checkpoint(path)
        assert client.get_partition_list() == ["p"]
        meta = client.get_meta(["x"], 1, mode="force_fetch", partition_id="p", task_name="t")
        assert client.get_data(meta)["x"].tolist() == list(range(1000))

    @pytest.mark.parametrize("name", [BLOCKS, STATE, INDEX])
    @pytest.mark.parametrize("where", [0.1, 0.6, 0.95])
    def test_a_flipped_bit(self, saved: Any, name: str, where: float) -> None:
        client, path = saved
        data = bytearray((path / name).read_bytes())
        data[int(len(data) * where)] ^= 4
        (path / name).write_bytes(data)
        self.refused(client, path, rf"{name}.*damaged|damaged.*{name}|{name} is damaged")

    @pytest.mark.parametrize("name", [BLOCKS, STATE, INDEX])
    def test_a_missing_and_a_short_file(self, saved: Any, name: str) -> None:
        client, path = saved
        data = (path / name).read_bytes()
        (path / name).write_bytes(data[:-1])
        self.refused(client, path, f"{name} has {len(data) - 1} bytes instead of {len(data)}")
        (path / name).unlink()
        self.refused(client, path, f"{name} is missing")

    def test_the_state_of_another_version(self, saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """It lacks what this one keeps, or has what this one does not know."""
        client, path = saved
        monkeypatch.setattr("transfer_queue.controller.checkpoint.FORMAT", 3)
        with pytest.raises(InvalidArgument, match="has format 2, this version reads 3"):
            client.load_checkpoint(path)

    def test_another_format(self, saved: Any) -> None:
        client, path = saved
        content = json.loads((path / METADATA).read_text())
        (path / METADATA).write_text(json.dumps(content | {"format": 99}))
        self.refused(client, path, "has format 99, this version of transfer_queue reads 1")

    def test_a_state_that_is_none(self, saved: Any) -> None:
        """The right checksum over the wrong content."""
        from transfer_queue.messages import Restore

        client, _ = saved
        nothing = np.empty(0, np.int64)
        peer = client._core.controller
        for state in (b"", b"\xc1", b"\x80", b"\x93\x01\x02\x03"):
            with pytest.raises(DecodeError, match="not the state of a checkpoint"):
                peer.begin(Restore(old=nothing, new=nothing, state=(state,))).result(5.0)
        assert client.get_partition_list() == ["p"]

    def test_none_at_all(self, saved: Any, tmp_path: Path) -> None:
        client, _ = saved
        with pytest.raises(FileNotFoundError, match="no checkpoint in"):
            client.load_checkpoint(tmp_path / "nowhere")
        shutil.rmtree(tmp_path / "c")
        with pytest.raises(FileNotFoundError):
            client.load_checkpoint(tmp_path / "c")

    def test_metadata_that_json_cannot_hold(self, saved: Any, tmp_path: Path) -> None:
        client, _ = saved
        with pytest.raises(TypeError, match="JSON"):
            client.save_checkpoint(tmp_path / "d", metadata={"x": object()})
        assert not (tmp_path / "d").exists()


def test_a_queue_with_other_steps_refuses(start: Start, tmp_path: Path) -> None:
    first = start(global_batch_size=2, num_global_batch=2)
    first.put({"x": torch.arange(2)}, global_step=0)
    first.save_checkpoint(tmp_path / "c")
    second = start()
    second.put({"x": torch.arange(2)}, partition_id="mine")
    with pytest.raises(InvalidArgument, match="2 step windows, this queue 0"):
        second.load_checkpoint(tmp_path / "c")
    assert second.get_partition_list() == ["mine"]


def test_a_checkpoint_that_does_not_fit_leaves_no_bytes_behind(start: Start, tmp_path: Path) -> None:
    first = start(units=3)
    for _ in range(12):
        first.put({"x": torch.zeros(100, 20_000)}, partition_id="p")
    first.save_checkpoint(tmp_path / "c")
    second = start(units=1)
    with pytest.raises(CapacityExceeded):
        second.load_checkpoint(tmp_path / "c", timeout=0.5)
    assert second.get_partition_list() == []
    second.put({"x": torch.zeros(500, 20_000)}, partition_id="p", timeout=10.0)
