"""Actors that are killed come back where they were; starts that end halfway."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.integration.starting import impatient, wait_until
from transfer_queue.errors import ConnectionLost, DeadlineExceeded
from transfer_queue.messages import ProcessId
from transfer_queue.runtime.ray import running
from transfer_queue.wire.folder import ServerFolder, remove_abandoned
from transfer_queue.wire.holders import host_id, identify, process_id


@pytest.fixture
def session(ray_session: Any) -> Iterator[Any]:
    yield ray_session
    tq.close()


def owner_of(info: Any) -> int:
    """Process id of the server that owns a folder."""
    return int(json.loads((Path(info.folder) / "owner").read_text())["pid"])


def test_a_killed_controller_is_started_again(session: Any) -> None:
    """SIGKILL: same actor, address and session; clients go on, and other sessions' janitors spare its folder."""
    conf = tq.init({"runtime": "ray", "controller": {"num_n_samples": 2}})
    info = conf.controller.zmq_info
    client = tq.get_client()
    meta = client.put({"x": torch.arange(4)}, partition_id="p")
    assert client.get_meta(["x"], 2, "p", task_name="t", get_n_samples=True).size == 2
    before = owner_of(info)
    os.kill(before, signal.SIGKILL)
    remove_abandoned()
    client.put({"x": torch.arange(4)}, partition_id="p")
    assert client.get_data(client.get_meta(["x"], 6, "p", task_name="t"))["x"].tolist() == [2, 3, 0, 1, 2, 3]
    assert client.get_data(meta)["x"].tolist() == [0, 1, 2, 3]
    assert owner_of(info) != before
    actor = session.get_actor("TransferQueueController", namespace="transfer_queue")
    assert session.get(actor.get_zmq_server_info.remote()) == info


def test_closing_while_an_actor_is_started_again_leaves_nothing(session: Any) -> None:
    """The folder of a dead server goes with the session."""
    info = tq.init({"runtime": "ray"}).controller.zmq_info
    os.kill(owner_of(info), signal.SIGKILL)
    tq.close()
    assert not Path(info.folder).exists()


def test_a_controller_without_journal_stays_dead(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never into an empty ledger: calls end by their deadlines, and the next `init` starts afresh."""
    with impatient(monkeypatch):
        info = tq.init({"runtime": "ray", "journal": {"enabled": False}}).controller.zmq_info
    os.kill(owner_of(info), signal.SIGKILL)
    with pytest.raises(ConnectionLost, match="is the server alive"):
        tq.get_client().get_meta(["x"], 1, "p", task_name="t", timeout=0.1)
    tq.close()
    assert tq.init({"runtime": "ray"}).controller.zmq_info.session_id != info.session_id


def test_actors_made_by_hand_are_started_again(session: Any) -> None:
    """The class says so; nothing has to be asked for."""
    controller = tq.TransferQueueController.remote()
    info = session.get(controller.get_zmq_server_info.remote())
    unit = tq.SimpleStorageUnit.remote(controller_info=info, capacity_bytes=64 << 20)
    place = session.get(unit.get_info.remote())
    with tq.TransferQueueClient("c", info) as client:
        client.put({"x": torch.arange(4)}, partition_id="p")
        os.kill(owner_of(place), signal.SIGKILL)
        os.kill(owner_of(info), signal.SIGKILL)
        client.put({"x": torch.arange(2)}, partition_id="p")
        assert client.get_data(client.get_meta(["x"], 6, "p", task_name="t"))["x"].tolist() == [0, 1, 2, 3, 0, 1]
    for actor in (unit, controller):
        wait_until(lambda actor=actor: _answers(session, actor))
        session.get(actor.shutdown.remote())
        session.kill(actor)


def _answers(session: Any, actor: Any) -> bool:
    """Ray answers calls of an actor when its constructor has returned, which is after the server answers."""
    try:
        session.get(actor.__ray_ready__.remote())
    except session.exceptions.ActorUnavailableError:
        return False
    return True


class Starter:
    """A process that starts when told to."""

    def die_halfway(self, **conf: Any) -> None:
        from transfer_queue.runtime.ray import RayRuntime

        setattr(RayRuntime, "_start_units", lambda runtime: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B010
        tq.init({"runtime": "ray", **conf})


def test_a_starter_killed_halfway_is_in_nobodys_way(session: Any) -> None:
    """Between controller and units, SIGKILL: Ray ends what it made, and the next `init` starts."""
    remote = session.remote(num_cpus=0)(Starter)
    starter = remote.remote()
    dying = starter.die_halfway.remote(namespace="halfway")
    with pytest.raises(session.exceptions.RayActorError):
        session.get(dying, timeout=50)
    conf = tq.init({"runtime": "ray", "namespace": "halfway", "attach_timeout_s": 30})
    assert len(conf.backend.SimpleStorage.zmq_info) == 1
    tq.close()
    remove_abandoned()


def test_what_killed_actors_left_on_disk_goes_at_the_next_start(session: Any, tmp_path: Path) -> None:
    controller = tq.TransferQueueController.remote()
    info = session.get(controller.get_zmq_server_info.remote())
    unit = tq.SimpleStorageUnit.remote(controller_info=info, capacity_bytes=4 << 20, spill_path=str(tmp_path))
    place = session.get(unit.get_info.remote())
    assert [path.name for path in tmp_path.iterdir()] == [Path(place.folder).name]
    session.kill(unit, no_restart=True)
    wait_until(lambda: identify(owner_of(place)) is None)
    unit = tq.SimpleStorageUnit.remote(controller_info=info, capacity_bytes=4 << 20)
    session.get(unit.get_info.remote())
    assert list(tmp_path.iterdir()) == []
    for actor in (unit, controller):
        session.get(actor.shutdown.remote())


def test_what_killed_actors_left_goes_at_the_next_start(session: Any) -> None:
    """An actor killed for good runs no code of ours, and the raylet lives on; the next actor removes its folder."""
    controller = tq.TransferQueueController.remote()
    info = session.get(controller.get_zmq_server_info.remote())
    session.kill(controller, no_restart=True)
    wait_until(lambda: identify(owner_of(info)) is None)
    remove_abandoned()
    assert Path(info.folder).exists(), "its raylet lives"
    controller = tq.TransferQueueController.remote()
    session.get(controller.get_zmq_server_info.remote())
    assert not Path(info.folder).exists()
    session.get(controller.shutdown.remote())


def test_attaching_to_a_controller_that_does_not_answer_is_bounded(session: Any) -> None:
    """The error names the actor and the time; it says that the actor is there."""
    info = tq.init({"runtime": "ray", "namespace": "silent"}).controller.zmq_info
    os.kill(owner_of(info), signal.SIGSTOP)
    try:
        with pytest.raises(DeadlineExceeded, match="in namespace 'silent' is there and did not answer within 0.5 s"):
            running("silent", 0.5)
    finally:
        os.kill(owner_of(info), signal.SIGCONT)
    tq.close()


def test_what_other_runtimes_left_does_not_keep_actors_from_starting(session: Any) -> None:
    """A server of child processes was just killed, and its supervisor is going to start it again."""
    dead = ProcessId(host=host_id(), pid=1, start_time=-1.0)
    left = ServerFolder("unit", key="abc/unit-0", owner=dead, supervisor=process_id())
    left.leave()
    try:
        tq.init({"runtime": "ray"})
        assert left.path.exists()
    finally:
        left.close()
