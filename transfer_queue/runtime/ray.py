"""Controller and storage units as Ray actors.

The actor classes are `TransferQueueController` and `SimpleStorageUnit`. They reserve no CPU unless asked to with
`.options(num_cpus=…)`, so that a queue starts on a machine of any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfer_queue.config import Settings
from transfer_queue.errors import ConnectionLost, DeadlineExceeded
from transfer_queue.ledger import Ledger
from transfer_queue.messages import Clear, Done, GetExplanation, Report, UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.servers import ControllerServer, UnitServer
from transfer_queue.samplers.registry import SamplerLike

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

CONTROLLER_NAME = "TransferQueueController"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0


class NameTaken(Exception):
    """The session that was to be started is there."""


class ControllerActor:
    """The controller of a queue. Clients need what `get_zmq_server_info` returns and nothing else.

    global_batch_size   prompts of a global step; `None`: steps have no fixed window
    num_global_batch    how many steps may be in the queue at once
    num_n_samples       responses per prompt; a step holds global_batch_size × num_n_samples samples
    sampler             of tasks without their own: instance, class, name or zero-argument callable
    conf                configuration of the session, for processes that attach
    """

    def __init__(
        self,
        global_batch_size: int | None = None,
        num_global_batch: int = 1,
        num_n_samples: int = 1,
        sampler: SamplerLike | None = None,
        conf: Any = None,
    ) -> None:
        ledger = Ledger(
            global_batch_size=global_batch_size,
            num_global_batch=num_global_batch,
            num_n_samples=num_n_samples,
            sampler=sampler,
        )
        session_id = ray.get_runtime_context().get_actor_id()
        self._server = ControllerServer(ledger, host=_node_ip(), session_id=session_id)
        self._conf = conf
        if conf is not None:
            conf.controller.zmq_info = self._server.info

    def get_zmq_server_info(self) -> ZMQServerInfo:
        return self._server.info

    def register_sampler(self, task_name: str | None, sampler: SamplerLike) -> str:
        """Give a task (None: every task without its own) a sampler. Returns how it describes itself."""
        return repr(self._server.service.inspect(lambda ledger: ledger.register_sampler(task_name, sampler)))

    def get_data_production_status(self) -> torch.Tensor:
        """[capacity, num_fields] int8: field j of the sample with global index i is there."""
        import torch

        return torch.from_numpy(self._server.service.inspect(lambda ledger: ledger.reports.production_status()))

    def get_data_consumption_status(self, task_name: str) -> torch.Tensor:
        """[capacity] int8: the task consumed the sample with global index i."""
        import torch

        return torch.from_numpy(
            self._server.service.inspect(lambda ledger: ledger.reports.consumption_status(task_name))
        )

    def get_field_name_mapping(self) -> dict[str, int]:
        """Column of each field in the production status."""
        return self._server.service.inspect(lambda ledger: ledger.reports.field_mapping())

    def clear(self, global_step: int) -> int:
        """Remove all samples of a step; returns their number."""
        return self._clear(None, global_step)

    def list_partitions(self) -> list[str]:
        """Names in creation order."""
        return list(self._server.service.inspect(lambda ledger: ledger.reports.partitions()))

    def clear_partition(self, partition_id: str) -> int:
        """Remove a partition; returns the number of samples."""
        return self._clear(partition_id, None)

    def audit(self, partition_id: str | None = None) -> dict[str, Any]:
        """Accounting per partition and task."""
        return self._server.service.inspect(lambda ledger: ledger.reports.audit(partition_id))

    def explain(self, partition_id: str, task_name: str, data_fields: Sequence[str], batch_size: int = 1) -> str:
        """Why such a draw is not served now."""
        request = GetExplanation(
            partition_id=partition_id,
            global_step=None,
            task_name=task_name,
            fields=tuple(data_fields),
            batch_size=batch_size,
        )
        reply = self._server.service.ask(request)
        assert isinstance(reply, Report)
        return str(reply.entries["text"])

    def get_config(self) -> Any:
        """The configuration of the session; None if the actor was not started by `init`."""
        return self._conf

    def shutdown(self) -> None:
        """Stop serving and remove the files of this process."""
        self._server.close()

    def _clear(self, partition_id: str | None, global_step: int | None) -> int:
        reply = self._server.service.ask(
            Clear(partition_id=partition_id, global_step=global_step, indexes=None, generations=None)
        )
        assert isinstance(reply, Done)
        return reply.count


class StorageUnitActor:
    """A storage unit: shared memory of the node it runs on, announced to the controller of `controller_info`.

    capacity_bytes   of all its shared memory; `None`: half of what /dev/shm has free now
    arena_bytes      size of one shared-memory file
    """

    def __init__(
        self,
        controller_info: ZMQServerInfo,
        capacity_bytes: int | None = None,
        arena_bytes: int = 64 << 20,
        unit_id: str | None = None,
        transport: str = "auto",
    ) -> None:
        self._server = UnitServer(
            controller_info,
            unit_id=unit_id or str(ray.get_runtime_context().get_actor_id()),
            host=_node_ip(),
            capacity_bytes=capacity_bytes,
            arena_bytes=arena_bytes,
            transport=transport,
        )

    def get_info(self) -> UnitInfo:
        return self._server.info

    def shutdown(self) -> None:
        """Stop serving and remove the shared memory. Views that readers hold stay valid."""
        self._server.close()


TransferQueueController: Any = ray.remote(num_cpus=0)(ControllerActor)
SimpleStorageUnit: Any = ray.remote(num_cpus=0)(StorageUnitActor)


class RayRuntime:
    """Starts a session's actors, or units only for a controller that exists already."""

    def __init__(self, conf: DictConfig, settings: Settings, controller: Any = None) -> None:
        """Raises `NameTaken` if another process started the session first."""
        self._settings = settings
        self._owned: list[Any] = []
        try:
            self.controller = controller if controller is not None else self._start_controller(conf)
            self.info: ZMQServerInfo = _get(self.controller.get_zmq_server_info.remote(), "the controller actor")
            self._start_units()
        except BaseException:
            self.close()
            raise

    def _start_controller(self, conf: DictConfig) -> Any:
        settings = self._settings
        named = TransferQueueController.options(name=CONTROLLER_NAME, namespace=settings.namespace)
        try:
            actor = named.remote(
                global_batch_size=settings.global_batch_size,
                num_global_batch=settings.num_global_batch,
                num_n_samples=settings.num_n_samples,
                sampler=settings.sampler,
                conf=conf,
            )
        except ValueError as error:
            raise NameTaken(f"namespace {settings.namespace!r} has a controller already") from error
        self._owned.append(actor)
        return actor

    def _start_units(self) -> None:
        """Spread the units over the nodes, each bound to its node: its shared memory is of no use elsewhere."""
        nodes = sorted(node["NodeID"] for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
        units = []
        for number in range(self._settings.num_units or len(nodes)):
            place = NodeAffinitySchedulingStrategy(nodes[number % len(nodes)], soft=False)
            actor = SimpleStorageUnit.options(scheduling_strategy=place).remote(
                controller_info=self.info,
                capacity_bytes=self._settings.capacity_bytes,
                arena_bytes=self._settings.arena_bytes,
                transport=self._settings.transport,
            )
            self._owned.append(actor)
            units.append(actor)
        for unit in units:
            _get(unit.get_info.remote(), "a storage unit actor")

    def close(self) -> None:
        """Stop the actors that this runtime started. May be called twice."""
        actors, self._owned = self._owned, []
        if not ray.is_initialized():
            return
        ray.wait([actor.shutdown.remote() for actor in actors], num_returns=len(actors), timeout=_STOP_TIMEOUT_S)
        for actor in actors:
            ray.kill(actor)


def ensure_cluster() -> None:
    """Start or join a Ray cluster as `ray.init()` does, unless this process has."""
    if not ray.is_initialized():
        ray.init()


def running(namespace: str) -> tuple[Any, ZMQServerInfo] | None:
    """Configuration and endpoint of the session in this namespace, or None if there is none."""
    try:
        controller = ray.get_actor(CONTROLLER_NAME, namespace=namespace)
    except ValueError:
        return None
    what = f"the actor {CONTROLLER_NAME!r} in namespace {namespace!r}"
    return _get(controller.get_config.remote(), what), _get(controller.get_zmq_server_info.remote(), what)


def _get(reference: Any, what: str) -> Any:
    try:
        return ray.get(reference, timeout=_START_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError as error:
        raise DeadlineExceeded(
            f"{what} did not start within {_START_TIMEOUT_S:.0f} s; `ray status` shows what the cluster has and lacks"
        ) from error
    except RayActorError as error:
        raise ConnectionLost(f"{what} died while it started: {error}") from error


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray does not annotate it
