"""The controller is killed while an acknowledgement that nobody waits for is under way."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.contract.relay import Relay
from tests.integration.starting import wait_until
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.endpoint import EndpointFile

SMALL = {"backend": {"SimpleStorage": {"capacity_bytes": 64 << 20, "arena_bytes": 1 << 20}}}


@pytest.fixture
def queue() -> Iterator[Any]:
    """A session with one unit, both servers child processes of the test."""
    yield tq.init({"runtime": "processes", **SMALL})
    tq.close()


@pytest.fixture
def relay(queue: Any) -> Iterator[Relay]:
    with Relay(queue.controller.zmq_info.ports["request"]) as made:
        yield made


def behind(relay: Relay, info: ZMQServerInfo) -> tq.TransferQueueClient:
    """A client whose controller is behind the relay."""
    record = info.to_record()
    record["ports"] = {**record["ports"], "request": relay.port}
    return tq.TransferQueueClient("consumer", ZMQServerInfo.from_record(record), transport="tcp")


@pytest.mark.parametrize("lost", ["the request", "the answer"])
def test_it_is_acknowledged_once(queue: Any, relay: Relay, lost: str) -> None:
    """Whether it was carried out before the end or not: it is sent again under its id."""
    controller = EndpointFile(queue.address).status()["controller"]["pid"]
    producer = tq.get_client()
    producer.put({"x": torch.arange(8)}, partition_id="p")
    with behind(relay, queue.controller.zmq_info) as consumer:
        first, second = (consumer.get_meta(["x"], 2, "p", task_name="t", lease=60) for _ in range(2))
        assert consumer.ack(first, wait=False) == 0
        wait_until(lambda: consumer._core.acks.outstanding == 0)
        if lost == "the request":
            os.kill(controller, signal.SIGSTOP)
        else:
            relay.deaf = True
        assert consumer.ack(second, wait=False) == 0
        if lost == "the answer":
            wait_until(lambda: leases(producer)["acked"] == 4)
        assert consumer._core.acks.outstanding == 1
        os.kill(controller, signal.SIGKILL)
        relay.deaf = False
        wait_until(lambda: consumer._core.acks.outstanding == 0)
        assert consumer.late_acks == 0
        found = leases(producer)
        assert (found["granted"], found["acked"], found["open"]) == (4, 4, 0)
        assert consumer.get_meta(["x"], 4, "p", task_name="t").global_indexes == [4, 5, 6, 7]


def leases(client: Any) -> dict[str, int]:
    """The counts of the task's leases, those of nothing left out."""
    return {"acked": 0, "open": 0} | client.audit("p")["partitions"]["p"]["tasks"]["t"]["leases"]
