"""The published API of controller, samplers and client, used as its documentation shows it, on real actors."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from transfer_queue import (
    DPSampler,
    GRPOSampler,
    SequentialSampler,
    SimpleStorageUnit,
    TransferQueueClient,
    TransferQueueController,
)
from transfer_queue.errors import GetMetaTimeout, SamplerError
from transfer_queue.runtime.unit_server import UnitServer
from transfer_queue.samplers import BaseSampler


@pytest.fixture
def connect(ray_session: Any) -> Iterator[Callable[..., TransferQueueClient]]:
    """Gives a controller made by hand a storage unit, and connects a client to it.

    The unit is in this process, which takes a tenth of the time; an actor where the test says so.
    """
    ending = contextlib.ExitStack()

    def make(controller: Any, client_id: str = "my_client", *, unit_actor: bool = False) -> TransferQueueClient:
        controller_info = ray_session.get(controller.get_zmq_server_info.remote())
        ending.callback(lambda: ray_session.get(controller.shutdown.remote()))
        if unit_actor:
            unit = SimpleStorageUnit.remote(controller_info=controller_info, capacity_bytes=64 << 20)
            ending.callback(lambda: ray_session.get(unit.shutdown.remote()))
        else:
            server = UnitServer(controller_info, unit_id="unit", host="127.0.0.1", capacity_bytes=64 << 20)
            ending.callback(server.close)
        client = TransferQueueClient(client_id=client_id, controller_info=controller_info)
        return ending.enter_context(client)

    with ending:
        yield make


def prompts_and_responses(count: int) -> dict[str, torch.Tensor]:
    return {"prompts": torch.arange(count), "responses": torch.arange(count) + 100}


def test_sequential_sampler(connect: Any) -> None:
    """The default hands samples out in the order in which they were put."""
    controller = TransferQueueController.remote(
        global_batch_size=8,
        num_global_batch=1,
        num_n_samples=1,
        sampler=SequentialSampler(),  # Optional, this is the default
    )
    client = connect(controller)
    client.put(prompts_and_responses(8), global_step=0)
    meta = client.get_meta(data_fields=["prompts"], batch_size=4, global_step=0, task_name="t")
    assert client.get_data(meta)["prompts"].tolist() == [0, 1, 2, 3]


def test_grpo_sampler_and_client_usage(connect: Any, ray_session: Any) -> None:
    """A task with a GRPO sampler gets complete groups only, here as the client section shows it."""
    num_n_samples = 4  # 4 responses per prompt
    controller = TransferQueueController.remote(
        global_batch_size=8,
        num_global_batch=1,
        num_n_samples=num_n_samples,
        sampler=GRPOSampler(num_n_samples=num_n_samples),
    )
    client = connect(controller, unit_actor=True)
    meta = client.put({"prompts": torch.arange(32)}, global_step=0)
    client.put({"responses": torch.zeros(27)}, metadata=meta.select_samples([0, *range(2, 28)]))
    batch_meta = client.get_meta(
        data_fields=["prompts", "responses"],
        batch_size=8,
        global_step=0,
        task_name="grpo_task",  # Uses GRPOSampler
        get_n_samples=True,
    )
    assert client.get_data(batch_meta)["prompts"].tolist() == list(range(4, 12))
    status = ray_session.get(controller.get_data_production_status.remote())
    fields = ray_session.get(controller.get_field_name_mapping.remote())
    assert status.dtype == torch.int8 and status[:32, fields["responses"]].sum() == 27
    consumed = ray_session.get(controller.get_data_consumption_status.remote("grpo_task"))
    assert consumed.nonzero().flatten().tolist() == list(range(4, 12))


def test_dp_sampler_by_sampler_params(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process names its rank; ranks of one group share a selection, and it counts once all have theirs."""
    controller = TransferQueueController.remote(global_batch_size=16, num_global_batch=1, num_n_samples=1)
    client = connect(controller)
    client.put(prompts_and_responses(16), global_step=0)
    global_step = 0
    got = []
    for rank in range(4):
        monkeypatch.setenv("DP_RANK", str(rank))
        monkeypatch.setenv("DP_SIZE", "4")
        dp_rank = int(os.environ.get("DP_RANK", 0))  # noqa: PLW1508  as published
        dp_size = int(os.environ.get("DP_SIZE", 1))  # noqa: PLW1508  as published
        assert not client.check_consumption_status("training_task", 0)
        batch_meta = client.get_meta(
            data_fields=["prompts", "responses"],
            batch_size=4,
            global_step=0,
            task_name="training_task",
            sampler_params={
                "dp_rank": dp_rank,
                "dp_size": dp_size,
                "dp_group_id": f"dp_group_step{global_step}",  # Must be same for all ranks in group
            },
        )
        got.append(client.get_data(batch_meta)["prompts"].tolist())
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
    assert client.check_consumption_status("training_task", 0)


def test_dp_sampler_registered_before(connect: Any, ray_session: Any) -> None:
    """A registered DPSampler fixes rank and size; `sampler_params` may override them."""
    controller = TransferQueueController.remote(global_batch_size=16, num_global_batch=1, num_n_samples=1)
    controller.register_sampler.remote(
        task_name="training_task",
        sampler=DPSampler(dp_rank=0, dp_size=4),
    )
    client = connect(controller)
    client.put(prompts_and_responses(16), global_step=0)
    own = client.get_meta(["prompts"], 4, global_step=0, task_name="training_task")
    other = client.get_meta(["prompts"], 4, global_step=0, task_name="training_task", sampler_params={"dp_rank": 3})
    assert client.get_data(own)["prompts"].tolist() == [0, 1, 2, 3]
    assert client.get_data(other)["prompts"].tolist() == [12, 13, 14, 15]


def test_default_sampler_for_all_tasks(connect: Any) -> None:
    """Pattern 2: the sampler given at initialization serves every task."""
    controller = TransferQueueController.remote(
        global_batch_size=8,
        num_global_batch=1,
        num_n_samples=4,
        sampler=GRPOSampler(num_n_samples=4),  # All tasks use GRPO
    )
    client = connect(controller)
    client.put(prompts_and_responses(7), global_step=0)
    assert client.get_meta(["prompts"], 4, global_step=0, task_name="a").size == 4
    with pytest.raises(GetMetaTimeout, match="0 complete groups of 4"):
        client.get_meta(["prompts"], 4, global_step=0, task_name="a", timeout=0.1)


def test_samplers_of_single_tasks(connect: Any, ray_session: Any) -> None:
    """Pattern 3: tasks use the samplers registered for them, the others the default."""
    ray = ray_session
    controller = TransferQueueController.remote(
        global_batch_size=8,
        num_global_batch=1,
        num_n_samples=4,
    )
    ray.get(
        controller.register_sampler.remote(
            task_name="grpo_task",
            sampler=GRPOSampler(num_n_samples=4),
        )
    )
    ray.get(
        controller.register_sampler.remote(
            task_name="dp_task",
            sampler=DPSampler(dp_rank=0, dp_size=2),
        )
    )
    client = connect(controller)
    client.put(prompts_and_responses(6), global_step=0)
    sizes = {task: client.get_meta(["prompts"], 3, global_step=0, task_name=task).size for task in ("dp_task", "other")}
    assert sizes == {"dp_task": 3, "other": 3}
    assert client.get_meta(["prompts"], 4, global_step=0, task_name="grpo_task").size == 4
    assert ray.get(controller.audit.remote("step_0"))["partitions"]["step_0"]["tasks"]["dp_task"]["reserved"] == 6
    assert "step_0" in ray.get(controller.explain.remote("step_0", "dp_task", ["prompts"]))


def test_callable_sampler(connect: Any) -> None:
    """Pattern 4: a callable makes the sampler inside the controller."""
    controller = TransferQueueController.remote(
        global_batch_size=8,
        num_global_batch=1,
        num_n_samples=4,
        sampler=lambda: GRPOSampler(num_n_samples=4),  # Callable
    )
    client = connect(controller)
    client.put(prompts_and_responses(8), global_step=0)
    assert client.get_meta(["prompts"], 8, global_step=0, task_name="t").size == 8


class MyCustomSampler(BaseSampler):
    """The example of a sampler with its own filter, whose mask lets nothing pass."""

    def sample(self, ready_indices: Any, batch_size: int, **kwargs: Any) -> Any:
        """Select batch_size indices from ready_indices."""
        return ready_indices[:batch_size]

    def filter_ready_indices(
        self,
        all_indices: Any,
        production_status: torch.Tensor,
        consumption_status: torch.Tensor,
        data_fields: list[str],
        field_mapping: dict[str, int],
        **kwargs: Any,
    ) -> Any:
        """Filter indices to find those ready for consumption."""
        ready_mask = torch.zeros(len(all_indices), dtype=torch.bool)
        return [all_indices[i] for i in range(len(all_indices)) if ready_mask[i]]


class EvenRows(MyCustomSampler):
    """Lets the rows with an even first field pass, and may be told to misbehave."""

    def filter_ready_indices(
        self,
        all_indices: Any,
        production_status: torch.Tensor,
        consumption_status: torch.Tensor,
        data_fields: list[str],
        field_mapping: dict[str, int],
        **kwargs: Any,
    ) -> Any:
        produced = production_status[all_indices][:, [field_mapping[name] for name in data_fields]].all(dim=1)
        free = consumption_status[all_indices] == 0
        return [row for row, ok in zip(all_indices, (produced & free).tolist(), strict=True) if ok and row % 2 == 0]

    def sample(self, ready_indices: Any, batch_size: int, *, fail: bool = False, **kwargs: Any) -> Any:
        if fail:
            raise RuntimeError("not today")
        return ready_indices[-batch_size:]


def test_custom_samplers(connect: Any, ray_session: Any) -> None:
    """A filter that lets nothing pass ends in the explained timeout; others choose; one that raises fails alone."""
    controller = TransferQueueController.remote(global_batch_size=8, num_global_batch=1, num_n_samples=1)
    ray_session.get(controller.register_sampler.remote(task_name="nothing", sampler=MyCustomSampler()))
    ray_session.get(controller.register_sampler.remote(task_name="even", sampler=EvenRows()))
    client = connect(controller)
    client.put(prompts_and_responses(8), global_step=0)
    with pytest.raises(GetMetaTimeout, match=r"8 of 4 samples ready.*sampler MyCustomSampler\(\)"):
        client.get_meta(["prompts"], 4, global_step=0, task_name="nothing", timeout=0.2)
    with pytest.raises(SamplerError, match="EvenRows.*raised RuntimeError: not today"):
        client.get_meta(["prompts"], 2, global_step=0, task_name="even", sampler_params={"fail": True})
    drawn = client.get_meta(["prompts"], 2, global_step=0, task_name="even")
    assert client.get_data(drawn)["prompts"].tolist() == [4, 6]


def test_ring_of_steps(connect: Any) -> None:
    """A step whose window is not cleared makes the put of a later one wait, and the error names it."""
    from transfer_queue.errors import CapacityExceeded

    controller = TransferQueueController.remote(global_batch_size=4, num_global_batch=2, num_n_samples=1)
    client = connect(controller)
    for step in (0, 1):
        client.put(prompts_and_responses(4), global_step=step)
    with pytest.raises(CapacityExceeded, match="waits for step 0"):
        client.put(prompts_and_responses(4), global_step=2, timeout=0.1)
    with pytest.raises(CapacityExceeded, match="capacity of 4 samples"):
        client.put(prompts_and_responses(1), global_step=1)
    assert client.clear(global_step=0) == 4
    assert client.put(prompts_and_responses(4), global_step=2).global_indexes == [0, 1, 2, 3]
