"""Frameworks under Ray: racing starts, actors that are killed, patched or made by hand (checklist 5 to 8, 45 to 47)."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tensordict import TensorDict

import transfer_queue as tq
from transfer_queue.errors import CapacityExceeded


@pytest.fixture
def cluster(ray_session: Any) -> Iterator[Any]:
    tq.close()
    yield ray_session
    tq.close()


def test_05_of_four_racing_processes_one_starts_and_the_others_attach(cluster: Any) -> None:
    @cluster.remote(num_cpus=0)
    class Racer:
        def begin(self) -> tuple[str, bool]:
            conf = tq.init({"runtime": "ray"})
            tq.get_client().put({"x": torch.arange(2)}, partition_id=str(os.getpid()))
            from transfer_queue import session

            return conf.controller.zmq_info.session_id, session._session.owned is not None

        def partitions(self) -> int:
            return len(tq.get_client().get_partition_list())

        def end(self) -> None:
            tq.close()

    racers = [Racer.remote() for _ in range(4)]
    began = cluster.get([racer.begin.remote() for racer in racers], timeout=90)
    assert len({session for session, _ in began}) == 1
    assert [owner for _, owner in began].count(True) == 1
    assert cluster.get([racer.partitions.remote() for racer in racers]) == [4] * 4
    owner = [owner for _, owner in began].index(True)
    cluster.get([racer.end.remote() for number, racer in enumerate(racers) if number != owner])
    assert cluster.get(racers[owner].partitions.remote()) == 4  # those that attached stopped nobody
    cluster.get(racers[owner].end.remote(), timeout=30)
    assert _is_gone(cluster)


def test_08_after_an_outside_kill_the_next_init_starts_afresh(cluster: Any) -> None:
    first = tq.init({"runtime": "ray"}).controller.zmq_info.session_id
    tq.get_client().put({"x": torch.arange(2)}, partition_id="p")
    cluster.kill(cluster.get_actor("TransferQueueController", namespace="transfer_queue"))
    deadline = time.monotonic() + 20
    while not _is_gone(cluster):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert tq.init({"runtime": "ray"}).controller.zmq_info.session_id != first
    assert tq.get_client().get_partition_list() == []


@pytest.mark.filterwarnings("ignore:placement_group.* parameter is deprecated")
def test_45_actors_made_by_hand(cluster: Any) -> None:
    """As verl of January 2026 does: units know no controller until a client introduces them."""
    group = tq.get_placement_group(2, num_cpus_per_actor=1)
    units = {
        number: tq.SimpleStorageUnit.options(placement_group=group, placement_group_bundle_index=number).remote(
            storage_unit_size=100
        )
        for number in range(2)
    }
    controller = tq.TransferQueueController.remote()
    info = tq.process_zmq_server_info(controller)
    units_info = tq.process_zmq_server_info(units)
    conf = OmegaConf.create({"enable": True}, flags={"allow_objects": True})
    conf.controller_info, conf.storage_unit_infos = info, units_info
    clients = []
    for kind in (tq.TransferQueueClient, tq.AsyncTransferQueueClient):
        client = kind("trainer", info)
        client.initialize_storage_manager(manager_type="AsyncSimpleStorageManager", config=conf)
        client.initialize_storage_manager(manager_type="AsyncSimpleStorageManager", config=conf)
        assert client.storage_manager is not None
        clients.append(client)
    one, other = clients
    data = TensorDict({"prompts": torch.arange(8).view(4, 2)}, batch_size=4)
    one.put(data=data, partition_id="train_0")
    meta = other.get_meta(data_fields=["prompts"], batch_size=4, partition_id="train_0", task_name="t")
    assert meta.samples[0].fields["prompts"].shape[0] == 2
    assert torch.equal(other.get_data(meta)["prompts"], data["prompts"])
    assert len(one.storage_infos()) == 2
    other.clear_samples(meta)
    assert one.get_partition_list() in ([], ["train_0"])
    with pytest.raises(ValueError, match="unknown storage 'Nothing'"):
        one.initialize_storage_manager("Nothing", {})
    for client in clients:
        client.close()
    cluster.get([actor.shutdown.remote() for actor in (*units.values(), controller)])
    for actor in (*units.values(), controller):
        cluster.kill(actor)
    cluster.util.remove_placement_group(group)


def test_46_patched_options_are_used_at_the_start(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transfer_queue.storage.simple_storage import SimpleStorageUnit

    from transfer_queue.controller import TransferQueueController

    seen = []
    for actor in (TransferQueueController, SimpleStorageUnit):

        def patched(*args: Any, actor: Any = actor, original: Any = actor.options, **options: Any) -> Any:
            seen.append(actor)
            return original(*args, **options)

        monkeypatch.setattr(actor, "options", patched)
    tq.init({"runtime": "ray"})
    assert seen == [TransferQueueController, SimpleStorageUnit]


def test_47_what_the_controller_actor_answers(cluster: Any) -> None:
    conf = tq.init({"runtime": "ray", "mine": 3})
    tq.kv_batch_put(["a", "b"], "p", TensorDict({"x": torch.arange(2)}, batch_size=2), [{"n": 1}, {}])
    controller = cluster.get_actor("TransferQueueController", namespace="transfer_queue")
    live = cluster.get(controller.get_config.remote())
    assert live.mine == 3
    assert live.controller.zmq_info == conf.controller.zmq_info
    assert cluster.get(controller.list_partitions.remote()) == ["p"]
    found = cluster.get(controller.get_partition_snapshot.remote("p"))
    rows = [found.keys_mapping[key] for key in ("a", "b")]
    assert found.global_indexes == set(rows)
    assert found.custom_meta[rows[0]] == {"n": 1}
    assert found.production_status[rows, found.field_name_mapping["x"]].tolist() == [1, 1]
    assert cluster.get(controller.get_partition_snapshot.remote("q")) is None
    cluster.get(controller.register_sampler.remote(tq.SequentialSampler(), task_name="t"))
    cluster.get(controller.register_sampler.remote("u", tq.SequentialSampler()))
    cluster.get(controller.clear_partition.remote("p"))
    assert tq.kv_list() == {}


def test_47_detaching_lets_the_actors_go_on(cluster: Any) -> None:
    from transfer_queue import interface

    first = tq.init({"runtime": "ray"}).controller.zmq_info.session_id
    assert interface._TQ_CONTROLLER is not None
    tq.kv_put("a", "p", None, {"n": 1})
    interface._TQ_CONTROLLER = None
    assert interface._TQ_CLIENT is None
    assert tq.init().controller.zmq_info.session_id == first
    assert tq.kv_list("p") == {"p": {"a": {"n": 1}}}
    tq.close()
    assert _is_gone(cluster)  # this process still was the one to stop it


def test_a_resource_that_no_node_offers_is_named(cluster: Any) -> None:
    with pytest.raises(CapacityExceeded, match="no node offers the resource 'tpu'"):
        tq.init({"runtime": "ray", "backend": {"SimpleStorage": {"required_node_resource": "tpu"}}})
    assert _is_gone(cluster)


def _is_gone(cluster: Any) -> bool:
    try:
        cluster.get_actor("TransferQueueController", namespace="transfer_queue")
    except ValueError:
        return True
    return False


def test_02_rows_go_to_the_disk_of_the_node(cluster: Any, tmp_path: Path) -> None:
    """Where `ssd_offload` says; a unit that is killed has them again, and nothing is left."""
    storage = {"capacity_bytes": 4 << 20, "arena_bytes": 1 << 20, "num_data_storage_units": 1}
    storage["ssd_offload"] = {"enabled": True, "path": str(tmp_path)}
    x = torch.arange(1 << 20).view(8, -1)
    keys = [str(number) for number in range(8)]
    conf = tq.init({"runtime": "ray", "backend": {"SimpleStorage": storage}})
    tq.kv_batch_put(keys, "p", fields=TensorDict({"x": x}, batch_size=[8]))
    assert list(tmp_path.glob("*/spilled-*"))
    [unit] = conf.backend.SimpleStorage.zmq_info.values()
    os.kill(json.loads(Path(unit.folder, "owner").read_text())["pid"], signal.SIGKILL)
    assert torch.equal(tq.kv_batch_get(keys, "p")["x"], x)
    tq.close()
    assert list(tmp_path.iterdir()) == []
