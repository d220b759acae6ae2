"""Storage units that lose their index with their process: no put is acknowledged whose data is not there."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.integration.starting import wait_until
from transfer_queue.client import writing
from transfer_queue.client.steps import Operation
from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.runtime.endpoint import EndpointFile

STORAGE = {"capacity_bytes": 64 << 20, "arena_bytes": 1 << 20}


@pytest.fixture
def queue(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A session of processes with one unit, or as many as the parameter says."""
    storage = STORAGE | {"num_data_storage_units": getattr(request, "param", 1)}
    yield tq.init({"runtime": "processes", "backend": {"SimpleStorage": storage}})
    tq.close()


def lose_index(queue: Any, name: str, damage: Callable[[Path], None]) -> None:
    """Kill a unit, damage its folder before its successor sees it, and wait for that."""
    [folder] = [Path(info.folder) for info in queue.backend.SimpleStorage.zmq_info.values() if info.id == name]
    pid = status(queue)[name]["pid"]
    os.kill(pid, signal.SIGSTOP)  # it writes nothing more, and nobody starts its successor yet
    damage(folder)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: status(queue)[name]["state"] == "running" and status(queue)[name]["pid"] != pid)


def status(queue: Any) -> dict[str, Any]:
    return EndpointFile(queue.address).status()


def remove_journal(folder: Path) -> None:
    shutil.rmtree(folder / "journal")


def cut_journal(folder: Path) -> None:
    """The last records are gone, and nothing in the file says so."""
    last = max((folder / "journal").glob("journal-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    data = last.read_bytes()
    used = len(data.rstrip(b"\0"))
    with last.open("r+b") as file:
        file.seek(used - 60)
        file.write(bytes(60))


def truncate_journal(folder: Path) -> None:
    for path in (folder / "journal").glob("journal-*"):
        os.truncate(path, path.stat().st_size // 2)


def remove_arenas(folder: Path) -> None:
    for path in folder.glob("arena-*"):
        path.unlink()


def remove_everything(folder: Path) -> None:
    remove_journal(folder)
    remove_arenas(folder)
    (folder / "journal.end").unlink()


DAMAGES = [remove_journal, cut_journal, truncate_journal, remove_arenas, remove_everything]


def test_a_put_under_way_succeeds_although_its_unit_forgets(queue: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit is killed between store and commit, and forgets: the call stores again, and what it put is read."""
    client = tq.get_client()
    store = writing.store
    stored: list[int] = []

    def store_and_lose(*arguments: Any) -> Operation[Any]:
        unit, block = yield from store(*arguments)
        stored.append(block)
        if len(stored) == 1:
            lose_index(queue, "unit-0", damage)
        return unit, block

    for rows, damage in zip((16, 4096, 16, 4096, 16), DAMAGES, strict=True):  # in the shared span, and in their own
        before, now = f"before {damage.__name__}", f"after {damage.__name__}"
        client.put({"x": torch.zeros(8)}, partition_id=before)
        stored.clear()
        values = torch.randn(rows, 128)
        with monkeypatch.context() as patch:
            patch.setattr(writing, "store", store_and_lose)
            meta = client.put({"x": values}, partition_id=now, keys=[f"k{row}" for row in range(rows)])
        assert len(stored) == 2
        assert torch.equal(client.get_data(meta)["x"], values)
        drawn = client.get_meta(["x"], rows, now, task_name="t")
        assert torch.equal(client.get_data(drawn)["x"], values)
        audit = client.audit()["partitions"]
        assert (audit[now]["inserted"], audit[now]["lost"]) == (rows, {})
        assert len(audit[before]["lost"]["x"]) == 8


def test_spans_of_before_are_used_no_more(queue: Any) -> None:
    """Small puts that go on in the span of before are stored again; rows of before are stale, and can be put again."""
    client = tq.get_client()
    first = client.put({"x": torch.zeros(4)}, partition_id="p")
    lose_index(queue, "unit-0", remove_journal)
    for number in range(3):
        meta = client.put({"x": torch.full((4,), float(number))}, partition_id="p")
        assert client.get_data(meta)["x"].tolist() == [number] * 4
    with pytest.raises((StaleSampleError, InvalidArgument)):
        client.get_data(first)
    client.put({"x": torch.ones(4)}, metadata=first)
    assert client.get_data(first)["x"].tolist() == [1.0] * 4
    assert client.audit("p")["partitions"]["p"]["lost"] == {}


@pytest.mark.parametrize("queue", [2], indirect=True)
def test_of_two_units_one_forgets(queue: Any) -> None:
    """What the other one has stays; puts to either succeed, by a client on this host and by one elsewhere."""
    info = queue.controller.zmq_info
    with tq.TransferQueueClient("far", info, transport="tcp") as far:
        clients = (tq.get_client(), far)
        before = [client.put({"x": torch.zeros(4)}, partition_id="p") for _ in range(4) for client in clients]
        lose_index(queue, "unit-1", remove_journal)
        after = [
            (n, client.put({"x": torch.full((4,), float(n))}, partition_id="q")) for n in range(4) for client in clients
        ]
        for reader in clients:
            for n, meta in after:
                assert reader.get_data(meta)["x"].tolist() == [n] * 4
            assert [_is_there(reader, meta) for meta in before].count(True) == 4
        assert len(far.audit("p")["partitions"]["p"]["lost"]["x"]) == 16


def _is_there(client: Any, meta: Any) -> bool:
    try:
        client.get_data(meta)
    except (StaleSampleError, InvalidArgument):  # the latter: its fields are not ready any more
        return False
    return True
