"""Several processes on one queue: attaching, forking, dying."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.integration.starting import TIMEOUT_S, line_of, program
from transfer_queue.errors import ConnectionLost, NotAuthorized, NotInitialized, UnknownName
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.unit_server import UnitServer


@pytest.fixture
def queue() -> Iterator[Any]:
    """An embedded session of this process."""
    yield tq.init({"runtime": "embedded"})
    tq.close()


def test_importing_loads_nothing_heavy_and_starts_nothing() -> None:
    """`import transfer_queue` loads neither ray nor torch nor zmq, and servers work without torch."""
    code = """
        import sys, threading
        import transfer_queue
        assert not {"ray", "torch", "tensordict", "zmq"} & set(sys.modules), sys.modules.keys()
        import transfer_queue.runtime.controller_server, transfer_queue.runtime.unit_server
        assert not {"ray", "torch", "tensordict"} & set(sys.modules)
        assert threading.active_count() == 1
        """
    with program(code) as process:
        _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, errors


def test_attach_by_address(queue: Any, forked: Any) -> None:
    """Another process attaches by the endpoint file, puts and draws; its close leaves the session alone."""
    code = """
        import sys, torch
        import transfer_queue as tq
        tq.init({"address": sys.argv[1]})
        client = tq.get_client()
        client.put({"x": torch.arange(4)}, partition_id="p")
        meta = client.get_meta(["x"], 2, "p", task_name="t")
        print(client.get_data(meta)["x"].tolist())
        tq.close()
        """
    with forked(code, queue.address) as process:
        output, errors = process.communicate()
    assert output.strip() == "[0, 1]", errors
    client = tq.get_client()
    assert client.get_data(client.get_meta(["x"], 2, "p", task_name="t"))["x"].tolist() == [2, 3]
    assert oct(os.stat(queue.address).st_mode & 0o777) == "0o600"
    assert oct(os.stat(Path(queue.address).parent).st_mode & 0o777) == "0o700"


def test_attach_to_nothing_says_what_was_looked_for(tmp_path: Path) -> None:
    """A wrong address is an error at once, and leaves the process uninitialized."""
    with pytest.raises(ConnectionLost, match=r"no endpoint file at .*nowhere.json"):
        tq.init({"address": str(tmp_path / "nowhere.json")})
    with pytest.raises(NotInitialized, match=r"init\(\) first"):
        tq.get_client()


def test_wrong_token_is_refused(queue: Any) -> None:
    """A client with another token gets `NotAuthorized`, on both transports."""
    record = queue.controller.zmq_info.to_record() | {"token": "00" * 32}
    for transport in ("auto", "tcp"):
        stranger = tq.TransferQueueClient("stranger", ZMQServerInfo.from_record(record), transport=transport)
        with stranger, pytest.raises(NotAuthorized, match="token"):
            stranger.get_partition_list()
    assert tq.get_client().get_partition_list() == []


def test_rows_of_several_units(queue: Any) -> None:
    """Two processes' worth of units, one client each: a draw over both units reads every row in order."""
    info = queue.controller.zmq_info
    with tq.TransferQueueClient("a", info) as first:
        first.put({"x": torch.arange(3), "r": torch.ones(3, 2)}, partition_id="p")
        other = UnitServer(info, unit_id="second", host="127.0.0.1", capacity_bytes=64 << 20)
        with tq.TransferQueueClient("b", info) as second:
            for k in range(4):
                second.put({"x": torch.arange(3) + 3 * k + 3, "r": torch.zeros(3, 2 + k % 2)}, partition_id="p")
            meta = second.get_meta(["x", "r"], 15, "p", task_name="t")
            assert len({block >> 48 for place in meta.locations for block in place.blocks.tolist()}) == 2
            for client in (first, second):
                assert client.get_data(meta)["x"].tolist() == list(range(15))
                assert [len(row) for row in client.get_data(meta)["r"].unbind()][:6] == [2] * 6
        other.close()


def _child(address: str, pipe: Any) -> None:
    """In a forked child: the parent's session is not ours, but its address is."""
    try:
        tq.get_client()
    except NotInitialized:
        tq.init({"address": address})
        client = tq.get_client()
        client.put({"x": torch.full((2,), os.getpid())}, partition_id="forked")
        pipe.send(client.get_data(client.get_meta(["x"], 2, "forked", task_name=str(os.getpid())))["x"].tolist())
        tq.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_children_attach_anew(queue: Any) -> None:
    """A fork after traffic: the child attaches and works, the parent's client goes on."""
    client = tq.get_client()
    client.put({"x": torch.zeros(2, dtype=torch.int64)}, partition_id="forked")
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_child, args=(queue.address, theirs))
    child.start()
    assert mine.poll(TIMEOUT_S) and mine.recv() == [0, 0]
    child.join(TIMEOUT_S)
    assert child.exitcode == 0
    client.put({"x": torch.ones(2, dtype=torch.int64)}, partition_id="forked")
    assert client.get_meta(["x"], 6, "forked", task_name="all").size == 6
    mine.close()
    theirs.close()


def test_what_a_killed_process_leaves_goes_at_the_next_start(forked: Any) -> None:
    """SIGKILL leaves folders in shared memory; the user's next session removes them, and spares those of the living."""
    script = """
        import time, torch
        import transfer_queue as tq
        conf = tq.init({"runtime": "embedded"})
        tq.get_client().put({"x": torch.zeros(1 << 20)}, partition_id="p")
        print(conf.address, flush=True)
        time.sleep(60)
        """
    with forked(script) as process:
        folder = Path(line_of(process)).parent
        assert folder.is_dir()
        living = tq.init({"runtime": "embedded"}).address
        assert folder.is_dir(), "a living session's folder was removed"
        tq.close()
    assert folder.is_dir()
    tq.init({"runtime": "embedded"})
    tq.close()
    assert not folder.exists() and not Path(living).exists()


def test_exit_without_close(forked: Any) -> None:
    """A process that ends without `close` ends cleanly and leaves nothing."""
    code = """
        import torch
        import transfer_queue as tq
        print(tq.init({"runtime": "embedded"}).address)
        tq.get_client().put({"x": torch.zeros(4)}, partition_id="p")
        """
    with forked(code) as process:
        output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert not Path(output.strip()).parent.exists()


def test_many_threads_and_loops(queue: Any) -> None:
    """16 threads, short-lived loops and 1000 concurrent coroutines share one client; each gets its own answers."""
    client = tq.get_client()
    wrong: list[Any] = []

    def work(number: int) -> None:
        for k in range(10):
            client.put({"x": torch.tensor([number * 100 + k])}, partition_id=f"thread-{number}")
            got = client.get_data(client.get_meta(["x"], 1, f"thread-{number}", task_name="t"))["x"].tolist()
            if got != [number * 100 + k]:
                wrong.append((number, k, got))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    async def one(k: int) -> None:
        await client.async_put({"x": torch.tensor([k])}, partition_id="many", keys=[str(k)])
        meta = await client.async_kv_retrieve_meta([str(k)], "many")
        got = (await client.async_get_data(meta))["x"].tolist()
        if got != [k]:
            wrong.append((k, got))

    async def all_at_once() -> None:
        await asyncio.gather(*(one(k) for k in range(1000)))

    asyncio.run(all_at_once())
    for k in range(50):
        asyncio.run(one(k))
    assert not wrong


def test_a_cancelled_draw_takes_nothing(queue: Any) -> None:
    """A coroutine cancelled while its draw waits leaves the rows to the next one."""
    client = tq.get_client()

    async def scenario() -> int:
        waiting = asyncio.create_task(client.async_get_meta(["x"], 2, "p", task_name="t"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await client.async_put({"x": torch.arange(2)}, partition_id="p")
        return (await client.async_get_meta(["x"], 2, "p", task_name="t", timeout=5)).size

    assert asyncio.run(scenario()) == 2


def test_closing_ends_waiting_draws(queue: Any) -> None:
    """`close` ends a draw that waits in another thread, with a typed error."""
    ended: list[BaseException] = []
    started = threading.Event()

    def wait() -> None:
        client = tq.get_client()
        started.set()
        try:
            client.get_meta(["x"], 1, "p", task_name="t", timeout=40)
        except ConnectionLost as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    started.wait()
    tq.close()
    thread.join(10)
    assert len(ended) == 1


def test_bad_configuration_is_named() -> None:
    """Unknown values name the known ones; nothing is left running."""
    for conf, match in [
        ({"runtime": "embeded"}, "did you mean 'embedded'"),
        ({"backend": {"storage_backend": "Simple"}}, "unknown backend 'Simple'"),
        ({"layout": "flat"}, "known: as_put, dense, jagged"),
        ({"runtime": "embedded", "controller": {"sampler": "GRPO"}}, "did you mean 'GRPOSampler'|known:"),
    ]:
        with pytest.raises(UnknownName, match=match):
            tq.init(conf)
    with pytest.raises(ValueError, match="num_data_storage_units must be a positive int, not 0"):
        tq.init({"backend": {"SimpleStorage": {"num_data_storage_units": 0}}})
