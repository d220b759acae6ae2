"""`init`, attaching and `close` under Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import transfer_queue as tq


@pytest.fixture
def session(ray_session: Any) -> Iterator[Any]:
    yield ray_session
    tq.close()


def test_other_processes_attach(session: Any) -> None:
    """A second process that calls `init` finds the running queue, shares its rows, and its `close` harms nobody."""

    @session.remote(num_cpus=0)
    def attach_and_put() -> str:
        conf = tq.init({"runtime": "ray"})
        tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
        tq.close()
        return str(conf.controller.zmq_info.session_id)

    conf = tq.init({"runtime": "ray", "controller": {"num_n_samples": 2}, "extra": {"kept": 1}})
    assert conf.extra.kept == 1
    assert list(conf.backend.SimpleStorage.zmq_info) == ["TransferQueueStorageUnit#0"]
    assert session.get(attach_and_put.remote(), timeout=60) == conf.controller.zmq_info.session_id
    client = tq.get_client()
    assert client.get_meta(["x"], 2, "p", task_name="t", get_n_samples=True).size == 2
    assert tq.init() is conf


def test_close_ends_the_actors(session: Any) -> None:
    """After the owner's `close` the name is free; the next `init` starts empty, and in Ray because Ray runs."""
    first = tq.init({"runtime": "ray"}).controller.zmq_info.session_id
    tq.get_client().put({"x": torch.arange(4)}, partition_id="p")
    tq.close()
    tq.close()
    with pytest.raises(ValueError, match="TransferQueueController"):
        session.get_actor("TransferQueueController", namespace="transfer_queue")
    conf = tq.init()
    assert conf.address is None
    assert session.get_actor("TransferQueueController", namespace=conf.namespace)
    assert conf.controller.zmq_info.session_id != first
    assert tq.get_client().get_partition_list() == []


def test_storage_for_a_controller_made_by_hand(session: Any) -> None:
    """`init(controller=handle)` starts storage units for it; closing leaves the controller alone."""
    controller = tq.TransferQueueController.remote(global_batch_size=4, num_global_batch=1, num_n_samples=1)
    tq.init(controller=controller)
    tq.get_client().put({"x": torch.arange(4)}, global_step=0)
    tq.close()
    assert session.get(controller.list_partitions.remote()) == ["step_0"]
    session.get(controller.shutdown.remote())
