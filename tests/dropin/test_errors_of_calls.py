"""Errors of calls as their callers catch them, from the queue's own process and from others (checklist 56)."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

import transfer_queue as tq
from tests.dropin.columns import batch
from tests.dropin.processes import in_processes
from transfer_queue import BatchMeta, TransferQueueClient, ZMQServerInfo, errors
from transfer_queue.config import merged, settings
from transfer_queue.runtime.embedded import EmbeddedRuntime
from transfer_queue.samplers import BaseSampler

LIMIT = 64
STORAGE = {"capacity_bytes": 1 << 23, "arena_bytes": 1 << 20, "total_storage_size": LIMIT}


class Refuses(BaseSampler):
    def sample(self, ready_indexes: list[int], batch_size: int, **kwargs: Any) -> tuple[list[int], list[int]]:
        raise OSError("no such disk")


@pytest.fixture(scope="module")
def crowded() -> Iterator[EmbeddedRuntime]:
    """A queue for few rows, with a sampler that raises."""
    conf = {"runtime": "embedded", "controller": {"sampler": Refuses}, "backend": {"SimpleStorage": STORAGE}}
    runtime = EmbeddedRuntime(settings(merged(conf)))
    yield runtime
    runtime.close()


Calls = dict[str, tuple[Callable[[TransferQueueClient], object], type[Exception], type[Exception], str]]


def _cleared(client: TransferQueueClient) -> BatchMeta:
    meta = client.put(batch(1), partition_id="cleared")
    client.clear_samples(meta)
    return meta


def _conflict(client: TransferQueueClient) -> object:
    client.kv_put("a", "conflict", {"x": torch.ones(1)})
    return client.kv_put("b", "conflict", {"x": torch.ones(1, dtype=torch.int64)})


def _unproduced(client: TransferQueueClient) -> object:
    meta = client.get_meta(["x"], 1, "insert", mode="insert", task_name="t")
    return client.get_data(meta)


def _drawn(client: TransferQueueClient) -> object:
    client.put(batch(1), partition_id="drawn")
    return client.get_meta(["x"], 1, "drawn", task_name="t")


CALLS: Calls = {
    "wait ended": (
        lambda client: client.get_meta(["x"], 2, "nowhere", task_name="t", timeout=0),
        TimeoutError, errors.GetMetaTimeout, "no partition 'nowhere'",
    ),
    "wait for keys ended": (
        lambda client: client.kv_wait("nowhere", keys=["late"], timeout=0),
        TimeoutError, errors.GetMetaTimeout, "late",
    ),
    "bad argument": (
        lambda client: client.get_meta(["x"], 0, "p", task_name="t"), ValueError, errors.InvalidArgument, "batch_size",
    ),
    "wrong type": (
        lambda client: client.kv_batch_put("key", "p", tags=[{}]), TypeError, errors.WrongType, "keys",
    ),
    "all keys missing": (
        lambda client: client.kv_batch_get(["nothing"], "nowhere"), ValueError, errors.KeyNotFound, "not found",
    ),
    "dtypes differ": (_conflict, ValueError, errors.InvalidArgument, "float32.*int64"),
    "not produced": (_unproduced, ValueError, errors.TransferQueueError, "x"),
    "cleared": (
        lambda client: client.get_data(_cleared(client)), KeyError, errors.StaleSampleError, "cleared",
    ),
    "put after clear": (
        lambda client: client.put(batch(1), metadata=_cleared(client)), KeyError, errors.StaleSampleError, "cleared",
    ),
    "no key": (
        lambda client: client.kv_retrieve_keys(client.put(batch(1), partition_id="p").global_indexes, "p"),
        RuntimeError, errors.UnknownName, "no key",
    ),
    "unknown sampler": (
        lambda client: client.get_meta(["x"], 1, "p", task_name="t", sampling_config={"sampler": "NoSuch"}),
        ValueError, errors.UnknownName, "NoSuch",
    ),
    "over the capacity": (
        lambda client: client.put(batch(LIMIT + 1), partition_id="p"),
        RuntimeError, errors.CapacityExceeded, "capacity",
    ),
    "cannot be stored": (
        lambda client: client.put({"x": [object()]}, partition_id="p"), RuntimeError, errors.EncodeError, "'x'",
    ),
    "nested": (
        lambda client: client.put(TensorDict({"n": batch(1)}, batch_size=1), partition_id="p"),
        ValueError, errors.TransferQueueError, "'n'",
    ),
    "sampler raises": (_drawn, RuntimeError, errors.SamplerError, "no such disk"),
}  # fmt: skip


def attempt(client: TransferQueueClient, name: str) -> BaseException:
    call, natural, own, text = CALLS[name]
    with pytest.raises(own, match=text) as raised:
        call(client)
    for kind in (RuntimeError, natural):
        assert isinstance(raised.value, kind), (name, type(raised.value).__mro__)
    return raised.value.with_traceback(None)


@pytest.mark.parametrize("name", CALLS)
def test_56_errors_are_what_callers_catch(crowded: EmbeddedRuntime, name: str) -> None:
    with TransferQueueClient("c", crowded.info, connector=crowded) as client:
        try:
            attempt(client, name)
        finally:
            for partition in client.get_partition_list():
                client.clear_partition(partition)


def _attempt_all(info: ZMQServerInfo, transport: str) -> dict[str, bytes]:
    found = {}
    with TransferQueueClient("c", info, transport=transport) as client:
        for name in CALLS:
            found[name] = pickle.dumps(attempt(client, name))
            for partition in client.get_partition_list():
                client.clear_partition(partition)
    return found


@pytest.mark.parametrize("transport", ["auto", "tcp"])
def test_56_the_same_in_another_process(crowded: EmbeddedRuntime, transport: str) -> None:
    """They come back from the servers as themselves, and go on to third processes."""
    (found,) = in_processes(_attempt_all, [(crowded.info, transport)])
    for name, pickled in found.items():
        error = pickle.loads(pickled)
        _, natural, own, _ = CALLS[name]
        assert isinstance(error, own) and isinstance(error, natural) and isinstance(error, RuntimeError)


def test_56_before_init() -> None:
    tq.close()
    for natural in (AssertionError, RuntimeError, errors.NotInitialized):
        with pytest.raises(natural, match="init"):
            tq.get_client()


def test_56_unknown_names_in_the_configuration() -> None:
    for conf, text in (
        ({"backend": {"storage_backend": "NoStore"}}, "NoStore.*SimpleStorage"),
        ({"controller": {"sampler": "NoSampler"}}, "NoSampler"),
    ):
        for natural in (ValueError, LookupError, RuntimeError):
            with pytest.raises(natural, match=text):
                tq.init({"runtime": "embedded", **conf})


def test_56_nobody_is_there(tmp_path: Path) -> None:
    for natural in (ConnectionError, RuntimeError):
        with pytest.raises(natural, match="no endpoint file"):
            tq.init({"address": str(tmp_path / "queue.json")})
