"""verl of January 2026 and UniRL: clients built from endpoints, a new thread and loop for each call in the workers.

The tests imitate the calls of these projects (names of arguments, processes, data); they do not run them. What UniRL
puts was inferred from its call sites. Actors that are made by hand are in the tests with Ray.
"""

from __future__ import annotations

import asyncio
import pickle
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensordict import NonTensorData, TensorDict

import transfer_queue as tq
from tests.dropin.columns import objects
from tests.dropin.processes import descriptors, in_processes, threads
from transfer_queue import AsyncTransferQueueClient, BatchMeta, TransferQueueClient, ZMQServerInfo

B, T = 8, 5  # rows of a global batch, tokens of a response
CONF = {
    "runtime": "embedded",
    "layout": "dense",
    "backend": {"SimpleStorage": {"num_data_storage_units": 2, "capacity_bytes": 1 << 23, "arena_bytes": 1 << 20}},
}


@pytest.fixture
def live() -> Iterator[Any]:
    tq.close()
    yield tq.init(CONF)
    tq.close()


@pytest.fixture
def config(live: Any) -> Any:
    """What such a trainer hands around: endpoints among keys of its own."""
    config = OmegaConf.create({"enable": True, "num_global_batch": 1}, flags={"allow_objects": True})
    config.controller_info = live.controller.zmq_info
    config.storage_unit_infos = dict(live.backend.SimpleStorage.zmq_info)
    return config


def connected(kind: type[TransferQueueClient], name: str, config: Any) -> TransferQueueClient:
    client = kind(name, config.controller_info)
    client.initialize_storage_manager(manager_type="AsyncSimpleStorageManager", config=config)
    assert client.storage_manager is not None
    return client


def in_a_loop_of_its_own(call: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """What decorators of these projects do with each call: a thread that lives for it, with a loop that does too."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(call())))
    thread.start()
    thread.join(60)
    return found[0]


# ---------------------------------------------------------------- verl


def _worker(config: Any, meta: BatchMeta) -> tuple[BatchMeta, dict[str, Any], tuple[int, int]]:
    """Reads its share, computes, adds a column; `meta` was pickled on the way, and is on the way back."""
    client = connected(AsyncTransferQueueClient, "actor_worker", config)
    in_a_loop_of_its_own(lambda: client.async_get_data(meta))
    before = descriptors(), threads()
    for _ in range(50):
        data = in_a_loop_of_its_own(lambda: client.async_get_data(meta))
    assert data["responses"].view(len(meta), -1).shape == (len(meta), T)
    output = TensorDict({"old_log_probs": -data["responses"].float()}, batch_size=len(meta))
    written = in_a_loop_of_its_own(lambda: client.async_put(data=output, metadata=meta))
    left = descriptors() - before[0], threads() - before[1]
    client.close()
    return written, dict(meta.extra_info), left


def test_a_global_batch_of_verl(config: Any) -> None:
    """Put, draw by the task's name, workers, union, reorder, clear; all columns dense."""
    client = connected(TransferQueueClient, "trainer", config)
    prompts = torch.arange(B * 3).view(B, 3)
    raw = np.array([[{"role": "user", "content": str(row)}] for row in range(B)], dtype=object)
    td = TensorDict({"prompts": prompts, "uid": objects(*(f"uid-{row}" for row in range(B)))}, batch_size=B)
    td["raw_prompt"] = NonTensorData(raw, batch_size=[B])
    put = client.put(data=td, partition_id="train_0")
    put.set_extra_info("global_steps", 1)
    gen = client.get_meta(data_fields=["prompts", "uid"], batch_size=B, partition_id="train_0", task_name="generate")
    assert gen.samples[0].fields["prompts"].shape[0] == 3
    assert gen[np.int64(2)].global_indexes == [gen.global_indexes[2]]
    client.put(data=TensorDict({"responses": torch.arange(B * T).view(B, T)}, batch_size=B), metadata=gen)
    shares = [part.select_fields(["responses", "prompts"]) for part in gen.chunk(2)]
    for share in shares:
        share.set_extra_info("temperature", 0.7)
    answers = in_processes(_worker, [(config, share) for share in shares])
    assert all(info == {"temperature": 0.7} and max(left) <= 4 for _, info, left in answers), answers
    joined = gen.union(BatchMeta.concat([meta for meta, _, _ in answers]))
    assert {"old_log_probs", "prompts", "responses"} <= set(joined.field_names)
    order = list(reversed(range(B)))
    joined.reorder(order)
    data = client.get_data(joined)
    assert data["old_log_probs"].tolist() == [[-float(row * T + t) for t in range(T)] for row in order]
    assert data["uid"].tolist() == [f"uid-{row}" for row in order]
    assert client.get_data(put)["raw_prompt"].tolist()[0] == [{"role": "user", "content": "0"}]
    client.clear_samples(joined)
    assert client.get_meta(["prompts"], B, "train_0", mode="force_fetch", task_name="t").size == 0
    client.close()


def test_attributes_of_older_metas() -> None:
    """An empty meta is made of its samples."""
    meta = BatchMeta(samples=[], extra_info={"step": 1})
    assert (meta.samples, meta.extra_info, len(meta)) == ([], {"step": 1}, 0)
    assert tq.AsyncTransferQueueClient is tq.TransferQueueClient


def test_how_a_client_is_built(config: Any) -> None:
    """From what was pickled; what is no endpoint is refused, options of sockets are ignored."""
    info = pickle.loads(pickle.dumps(config.controller_info))
    assert isinstance(info, ZMQServerInfo) and info.to_dict()["ip"] == info.ip
    with TransferQueueClient("c", info, zmq_context=None, zmq_linger=0) as client:
        assert client.get_partition_list() is not None
        for manager in ("SimpleStorage", "AsyncSimpleStorageManager"):
            client.initialize_storage_manager(manager, {"zmq_info": config.storage_unit_infos, "more": 1})
        client.initialize_storage_manager("SimpleStorage", {"zmq_info": next(iter(config.storage_unit_infos.values()))})
        with pytest.raises(ValueError, match="Nothing"):
            client.initialize_storage_manager("Nothing", config)
    with pytest.raises(ValueError, match="controller_info"):
        TransferQueueClient("c", None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="controller_info"):
        TransferQueueClient("c", {"ip": "127.0.0.1"})  # type: ignore[arg-type]


# ---------------------------------------------------------------- UniRL

PAYLOADS = {
    "0-d": torch.tensor(3.0),
    "1-d": torch.arange(6),
    "image": torch.arange(24, dtype=torch.bfloat16).view(1, 2, 3, 4),
    "batch": torch.arange(6.0).view(1, 6),
    "names": ["a", "", "c"],
    "one": ["a"],
    "dicts": [{"steps": 4}, {}],
}


def padded(value: Any) -> Any:
    """As it is put: tensors with at least two dimensions, a list as the one row's payload."""
    if isinstance(value, torch.Tensor):
        return value.reshape(1, -1) if value.dim() < 2 else value
    return NonTensorData(value, batch_size=[1])


def _put_columns(config: Any, names: list[str]) -> dict[str, bytes]:
    """One handle per column, pickled; each put by itself."""
    client = connected(AsyncTransferQueueClient, "rollout", config)
    handles = {}
    for name in names:
        td = TensorDict({name: padded(PAYLOADS[name])}, batch_size=1)
        put = in_a_loop_of_its_own(lambda td=td: client.async_put(data=td.cpu(), partition_id="train_partition"))
        handles[name] = pickle.dumps(put.select_fields([name]))
    client.close()
    return handles


def _read_column(config: Any, name: str, handle: bytes) -> Any:
    client = connected(AsyncTransferQueueClient, "trainer", config)
    data = in_a_loop_of_its_own(lambda: client.async_get_data(pickle.loads(handle)))
    client.close()
    if not isinstance(PAYLOADS[name], torch.Tensor):
        return data[name]
    return data[name].reshape(PAYLOADS[name].shape)


def test_columns_of_unirl(config: Any) -> None:
    """What one process puts column by column, another reads back in its shape."""
    names = list(PAYLOADS)
    first, second = in_processes(_put_columns, [(config, names[::2]), (config, names[1::2])])
    handles = first | second
    found = in_processes(_read_column, [(config, name, handles[name]) for name in ("0-d", "image", "names")])
    assert found[0].item() == 3.0 and torch.equal(found[1], PAYLOADS["image"]) and found[2] == ["a", "", "c"]
    for name in names:
        back = _read_column(config, name, handles[name])
        assert torch.equal(back, PAYLOADS[name]) if isinstance(back, torch.Tensor) else back == PAYLOADS[name]
    client = connected(AsyncTransferQueueClient, "driver", config)
    client.clear_partition("train_partition")
    assert "train_partition" not in client.get_partition_list()
    client.close()


def test_columns_of_one_row_are_joined(config: Any) -> None:
    """`union` of handles on the same rows; rows of several puts are concatenated."""
    client = connected(AsyncTransferQueueClient, "driver", config)
    rows = []
    for number in range(3):
        td = TensorDict(
            {"latents": torch.full((1, 4), number), "reward": torch.full((1, 1), float(number))}, batch_size=1
        )
        meta = in_a_loop_of_its_own(lambda td=td: client.async_put(data=td, partition_id="train_partition"))
        rows.append(meta.select_fields(["latents"]).union(meta.select_fields(["reward"])))
    data = [in_a_loop_of_its_own(lambda meta=meta: client.async_get_data(meta)) for meta in rows]
    assert torch.cat([row["latents"] for row in data]).tolist() == [[number] * 4 for number in range(3)]
    assert torch.cat([row["reward"].reshape(-1) for row in data]).tolist() == [0.0, 1.0, 2.0]
    whole = client.get_data(BatchMeta.concat(rows))
    assert whole["latents"].view(3, -1).shape == (3, 4)
    client.clear_partition("train_partition")
    client.close()
