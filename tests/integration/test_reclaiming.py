"""Bytes at storage units that nobody wants any more, and that nobody could give back: real processes, killed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.integration.starting import TIMEOUT_S, line_of, wait_until
from transfer_queue.client import storing
from transfer_queue.messages import GetUnitStats, ListUnits
from transfer_queue.runtime.endpoint import EndpointFile
from transfer_queue.storage.block import image_parts
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.holders import identify
from transfer_queue.wire.presence import GRACE_S

MIB = 1 << 20
SMALL = {"backend": {"SimpleStorage": {"capacity_bytes": 64 * MIB, "arena_bytes": MIB}}}


class Watched:
    """A session with one unit, and a connection that asks for the unit's figures."""

    def __init__(self) -> None:
        self.address = tq.init({"runtime": "processes", **SMALL}).address
        self.info = EndpointFile(self.address).read()
        controller = Peer.at(self.info.local_address, token=self.info.token, client_id="watcher")
        with contextlib.closing(controller):
            listed: Any = controller.begin(ListUnits(timeout_s=TIMEOUT_S)).result(TIMEOUT_S)
            [self.unit] = listed.units
        self.peer = Peer.at(self.unit.local_address, token=self.info.token, client_id="watcher")

    def figures(self) -> tuple[int, int, int]:
        """Open spans, pins, and bytes that are not free."""
        reply: Any = self.peer.begin(GetUnitStats()).result(TIMEOUT_S)
        stats = reply.entries
        return stats["spans"], stats["pins"], stats["bytes_arenas"] - stats["bytes_free"]

    def kill(self) -> None:
        pid = EndpointFile(self.address).status()["unit-0"]["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: identify(pid) is None and _threads_of(pid) <= 1)  # with the last one its sockets close

    def close(self) -> None:
        self.peer.close()
        tq.close()


def _threads_of(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except FileNotFoundError:
        return 0


@pytest.fixture
def queue() -> Iterator[Watched]:
    with contextlib.closing(Watched()) as made:
        yield made


@pytest.mark.parametrize("closing", [False, True])
def test_what_a_client_gives_up_while_its_unit_is_down_comes_back(queue: Watched, closing: bool) -> None:
    """Pins of views and the span of small puts: the unit is killed, the client lets go of them and stays silent."""
    client = tq.TransferQueueClient("c", queue.info)
    try:
        meta = client.put({"x": torch.zeros(16, 64, 256)}, partition_id="p")
        client.put({"x": torch.zeros(1, 4)}, partition_id="q")
        views = [client.get_data(meta, copy=False)["x"] for _ in range(3)]
        tq.get_client().clear_partition("p")
        assert queue.figures()[:2] == (1, 3) and queue.figures()[2] > MIB
        queue.kill()
        views.clear()
        if closing:
            client.close()
        wait_until(lambda: queue.figures()[:2] == (0 if closing else 1, 0))
        tq.get_client().clear_partition("q")
        wait_until(lambda: not closing or queue.figures() == (0, 0, 0))
        if not closing:
            client.put({"x": torch.zeros(1, 4)}, partition_id="q")  # into the span that it had all the time
            assert queue.figures()[:2] == (1, 0)
    finally:
        client.close()


def test_a_forked_child_ends_nothing_of_its_parent(queue: Watched) -> None:
    """It drops the views that it inherits, and one of its own: that one's pin ends, the parent's stays."""
    client = tq.TransferQueueClient("c", queue.info)
    try:
        meta = client.put({"x": torch.ones(16, 64, 256)}, partition_id="p")
        views = [client.get_data(meta, copy=False)["x"]]
        pins = queue.figures()[1]
        pid = os.fork()
        if pid == 0:
            try:
                own = client.get_data(meta, copy=False)["x"]
                del own
                views.clear()
                client.close()  # waits until what is due is told
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
        wait_until(lambda: queue.figures()[1] <= pins)
        assert queue.figures()[1] == pins == 1
        client.clear_partition("p")
        client.put({"x": torch.full((16, 64, 256), 7.0)}, partition_id="q")
        assert bool((views[0] == 1).all())
    finally:
        client.close()


def test_the_span_of_a_killed_producer_on_another_host_comes_free(queue: Watched, forked: Any) -> None:
    """It speaks TCP only, so that nobody can look at its process: the server finds that its connection is gone."""
    code = """
        import signal, sys, torch
        import transfer_queue as tq
        from transfer_queue.client import storing
        from transfer_queue.runtime.endpoint import EndpointFile

        def stuck(*arguments):
            print("holding", flush=True)
            signal.pause()

        storing.image_parts = stuck
        with tq.TransferQueueClient("far", EndpointFile(sys.argv[1]).read(), transport="tcp") as client:
            client.put({"x": torch.zeros(1 << 20)}, partition_id="p")
        """
    before = queue.figures()
    with forked(code, queue.address) as producer:
        assert line_of(producer) == "holding"
        assert queue.figures()[0] == before[0] + 1 and queue.figures()[2] >= 4 * MIB
        producer.kill()
        started = time.monotonic()
        wait_until(lambda: queue.figures() == before)
        assert time.monotonic() - started < GRACE_S + 4.0  # two looks of the server, and one of the unit


def test_who_was_taken_for_dead_stores_again_by_itself(queue: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client elsewhere says nothing for so long after the death of its unit that its span is taken back: its put
    succeeds all the same, and leaves nothing behind.
    """
    calls: list[Any] = []

    def slow(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            queue.kill()
            wait_until(lambda: queue.figures()[0] == 0)
        return image_parts(*arguments)

    monkeypatch.setattr(storing, "image_parts", slow)
    values = torch.randn(64, 1024)
    with tq.TransferQueueClient("far", queue.info, transport="tcp") as client:
        meta = client.put({"x": values}, partition_id="p")
        assert len(calls) == 2
        assert torch.equal(client.get_data(meta)["x"], values)
        client.clear_partition("p")
        wait_until(lambda: queue.figures() == (0, 0, 0))
