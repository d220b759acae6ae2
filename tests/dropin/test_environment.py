"""Environment variables: each is read when it is used, and named when it is malformed (checklist 48)."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transfer_queue.utils.logging_utils import get_logger

import transfer_queue as tq
from tests.dropin.columns import batch
from transfer_queue import TransferQueueClient
from transfer_queue.dataloader import default_fetch_batch_fn
from transfer_queue.errors import CapacityExceeded, GetMetaTimeout
from transfer_queue.storage import shares

EMBEDDED = {"runtime": "embedded", "backend": {"SimpleStorage": {"capacity_bytes": 1 << 22, "arena_bytes": 1 << 20}}}
IGNORED = """
TQ_ZERO_COPY_SERIALIZATION TQ_CONTROLLER_GET_METADATA_CHECK_INTERVAL TQ_SOCKET_POOL_SIZE TQ_CLIENT_ZMQ_IO_THREADS
TQ_CLIENT_ZMQ_MAX_SOCKETS TQ_CONTROLLER_ZMQ_MAX_SOCKETS TQ_STORAGE_ZMQ_BACKLOG TQ_STORAGE_POLLER_TIMEOUT
TQ_STORAGE_HANDSHAKE_TIMEOUT TQ_STORAGE_HANDSHAKE_RETRY_INTERVAL TQ_STORAGE_HANDSHAKE_MAX_RETRIES
TQ_DATA_UPDATE_RESPONSE_TIMEOUT TQ_SIMPLE_STORAGE_MAX_ATTEMPTS TQ_SIMPLE_STORAGE_PROBE_TIMEOUT
TQ_METRICS_STORAGE_TIMEOUT TQ_ACCEPT_PROBE_INTERVAL TQ_STORAGE_SLOW_REQUEST_SECONDS TQ_STORAGE_LARGE_PAYLOAD_MB
TQ_PERF_LOG_FLUSH_INTERVAL
"""

Env = pytest.MonkeyPatch


@pytest.fixture
def session() -> Iterator[TransferQueueClient]:
    tq.close()
    tq.init(EMBEDDED)
    yield tq.get_client()
    tq.close()


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """That of the library, whose level is put back."""
    found = logging.getLogger("transfer_queue")
    level = found.level
    yield found
    found.setLevel(level)


def fetch(client: TransferQueueClient, partition: str) -> Any:
    return default_fetch_batch_fn(client, ["x"], 4, partition, "t", {}, 0)


USES: dict[str, Callable[[TransferQueueClient, str], object]] = {
    "TQ_LAYOUT": lambda client, partition: client.kv_batch_get(["a"], partition),
    "TQ_CONTROLLER_GET_METADATA_TIMEOUT": lambda client, partition: client.get_meta(["x"], 4, partition, task_name="t"),
    "TQ_STREAMING_DATASET_EMPTY_BATCH_SLEEP_INTERVAL": fetch,
    "TQ_SIMPLE_STORAGE_SEND_RECV_TIMEOUT": lambda client, partition: client.put(batch(1), partition_id=partition),
    "TQ_NUM_THREADS": lambda client, partition: shares.run_all([Noted(4 * shares.SHARE_BYTES)]),
    "TQ_LOGGING_LEVEL": lambda client, partition: get_logger("transfer_queue.not_yet_named"),
}


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("value", ["soon", "-1"])
def test_48_a_malformed_variable_is_named(
    client: TransferQueueClient, partition: str, monkeypatch: Env, name: str, value: str
) -> None:
    """By the call that reads it, not before."""
    client.kv_put("a", partition, {"x": torch.ones(2)})
    monkeypatch.setattr(shares, "_cores", lambda: 4)
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=name):
        USES[name](client, partition)
    monkeypatch.delenv(name)
    assert client.get_meta(["x"], 1, partition, task_name="t").size == 1


@pytest.mark.parametrize("name", ["TQ_LAYOUT", "TQ_CONTROLLER_GET_METADATA_TIMEOUT", "TQ_LOGGING_LEVEL"])
def test_48_init_names_a_malformed_variable(monkeypatch: Env, name: str) -> None:
    """And starts nothing."""
    monkeypatch.setenv(name, "no such thing")
    with pytest.raises(ValueError, match=name):
        tq.init(EMBEDDED)
    assert tq.interface._TQ_CLIENT is None


@pytest.mark.parametrize(("given", "level"), [("ERROR", logging.ERROR), ("debug", logging.DEBUG), ("15", 15)])
def test_48_logging_level(logger: logging.Logger, monkeypatch: Env, given: str, level: int) -> None:
    """By name or number, at the start of a session; no handlers are added."""
    handlers = list(logger.handlers)
    monkeypatch.setenv("TQ_LOGGING_LEVEL", given)
    tq.close()
    tq.init(EMBEDDED)
    tq.close()
    assert (logger.level, logger.handlers) == (level, handlers)
    assert get_logger(f"transfer_queue.own_{given}").level == level


def test_48_how_long_an_unserved_draw_waits(client: TransferQueueClient, partition: str, monkeypatch: Env) -> None:
    monkeypatch.setenv("TQ_CONTROLLER_GET_METADATA_TIMEOUT", "0.05")
    begin = time.monotonic()
    with pytest.raises(GetMetaTimeout):
        client.get_meta(["x"], 4, partition, task_name="t")
    assert 0.05 <= time.monotonic() - begin < 1.0


def test_48_how_long_a_request_for_data_waits(monkeypatch: Env) -> None:
    """A put for which there is no room is one."""
    tq.close()
    tq.init({**EMBEDDED, "limits": {"total_samples": 2}})
    tq.get_client().put(batch(2), partition_id="p")
    monkeypatch.setenv("TQ_SIMPLE_STORAGE_SEND_RECV_TIMEOUT", "0.05")
    for put in (lambda: tq.get_client().put(batch(1), partition_id="p"), lambda: tq.kv_put("a", "p", tag={})):
        begin = time.monotonic()
        with pytest.raises(CapacityExceeded, match="capacity"):
            put()
        assert 0.05 <= time.monotonic() - begin < 1.0
    tq.close()


def test_48_how_long_a_stream_waits_before_it_looks_again(
    client: TransferQueueClient, partition: str, monkeypatch: Env
) -> None:
    """At most so long: data wakes it earlier."""
    monkeypatch.setenv("TQ_STREAMING_DATASET_EMPTY_BATCH_SLEEP_INTERVAL", "0.05")
    begin = time.monotonic()
    data, meta = fetch(client, partition)
    assert data is None and meta.size == 0
    assert 0.05 <= time.monotonic() - begin < 1.0
    monkeypatch.setenv("TQ_STREAMING_DATASET_EMPTY_BATCH_SLEEP_INTERVAL", "30")
    later = threading.Timer(0.05, lambda: client.put(batch(4), partition_id=partition))
    later.start()
    data, _ = fetch(client, partition)
    later.join()
    assert data["x"].tolist() == [[0], [1], [2], [3]]
    assert time.monotonic() - begin < 10.0


class Noted:
    """Work that notes the threads that do it, and ends when so many are at it."""

    parts = 16

    def __init__(self, size_bytes: int, meet: int = 1) -> None:
        self.size_bytes = size_bytes
        self.threads: set[threading.Thread] = set()
        self._meeting = threading.Barrier(meet)

    def run(self, begin: int, end: int) -> None:
        self.threads.add(threading.current_thread())
        self._meeting.wait(10)


@pytest.mark.parametrize(("bound", "threads"), [(None, 4), ("1", 1), ("3", 3), ("64", 4)])
def test_48_how_many_threads_copy(monkeypatch: Env, bound: str | None, threads: int) -> None:
    """PyTorch's own number of threads stays as it is."""
    monkeypatch.setattr(shares, "_cores", lambda: 16)
    monkeypatch.delenv("TQ_NUM_THREADS", raising=False)
    if bound is not None:
        monkeypatch.setenv("TQ_NUM_THREADS", bound)
    before = torch.get_num_threads()
    work = Noted(16 * shares.SHARE_BYTES, meet=threads)
    shares.run_all([work])
    assert len(work.threads) == threads
    assert torch.get_num_threads() == before


def test_48_other_variables_change_nothing(monkeypatch: Env) -> None:
    """Those of older versions are accepted, whatever is in them."""
    for name in IGNORED.split():
        monkeypatch.setenv(name, "nonsense")
    tq.close()
    tq.init(EMBEDDED)
    tq.kv_put("a", "p", {"x": torch.ones(2)})
    assert tq.kv_batch_get("a", "p")["x"].tolist() == [[1.0, 1.0]]
    tq.close()


def test_48_the_layout_of_this_process_comes_before_that_of_the_queue(
    session: TransferQueueClient, monkeypatch: Env
) -> None:
    """And after that of the call."""
    tq.kv_put("a", "p", {"x": torch.ones(2)})
    monkeypatch.setenv("TQ_LAYOUT", "jagged")
    assert tq.kv_batch_get("a", "p")["x"].is_nested
    assert not tq.kv_batch_get("a", "p", layout="dense")["x"].is_nested
    monkeypatch.delenv("TQ_LAYOUT")
    assert not tq.kv_batch_get("a", "p")["x"].is_nested
