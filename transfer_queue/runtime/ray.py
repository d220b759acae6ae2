"""Controller and storage units as Ray actors.

The actor classes are `TransferQueueController` and `SimpleStorageUnit`. They reserve no CPU unless asked to with
`.options(num_cpus=…)`, so that a queue starts on a machine of any size. Ray starts them again when they die; they then
find what they need in shared memory, so they have to stay on their node, and `init` binds them to it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfer_queue.config import Settings
from transfer_queue.errors import ConnectionLost, DeadlineExceeded
from transfer_queue.ledger import Ledger
from transfer_queue.messages import Clear, Done, GetExplanation, ProcessId, Report, UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.servers import ControllerServer, UnitServer
from transfer_queue.samplers.registry import SamplerLike
from transfer_queue.wire.descriptors import raise_descriptor_limit
from transfer_queue.wire.folder import remove_left, waiting_for_successors
from transfer_queue.wire.holders import host_id, identify, process_id

if TYPE_CHECKING:
    import torch
    from omegaconf import DictConfig

CONTROLLER_NAME = "TransferQueueController"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 0.1


class NameTaken(ConnectionLost):
    """The session that was to be started is there, started by another process."""


class ControllerActor:
    """The controller of a queue. Clients need what `get_zmq_server_info` returns and nothing else.

    global_batch_size   prompts of a global step; `None`: steps have no fixed window
    num_global_batch    how many steps may be in the queue at once
    num_n_samples       responses per prompt; a step holds global_batch_size × num_n_samples samples
    sampler             of tasks without their own: instance, class, name or zero-argument callable
    max_deliveries      how often a sample may be given back under leases; then it is quarantined
    max_staleness       by how many versions the policy that generated a sample may lag behind when it is handed out
    limits              how much is let in, by the names of `limits` in the configuration
    conf                configuration of the session, for processes that attach
    journal             keep what is needed to start again after a kill; without it, give the actor `max_restarts=0`
    journal_path        folder of the journal; None: in /dev/shm
    encrypt             TCP with CURVE
    starter             the process whose death ends the actor, if it is known and no other than Ray starts it again
    """

    def __init__(
        self,
        global_batch_size: int | None = None,
        num_global_batch: int = 1,
        num_n_samples: int = 1,
        sampler: SamplerLike | None = None,
        max_deliveries: int | None = None,
        max_staleness: int | None = None,
        limits: Mapping[str, int | None] | None = None,
        conf: Any = None,
        journal: bool = True,
        journal_path: str | None = None,
        encrypt: bool = False,
        starter: ProcessId | None = None,
    ) -> None:
        ledger = Ledger(
            global_batch_size=global_batch_size,
            num_global_batch=num_global_batch,
            num_n_samples=num_n_samples,
            sampler=sampler,
            max_deliveries=max_deliveries,
            max_staleness=max_staleness,
            limits=limits,
        )
        _remove_finished()
        raise_descriptor_limit()
        context = ray.get_runtime_context()
        actor_id = str(context.get_actor_id())
        self._server = ControllerServer(
            ledger,
            host=_node_ip(),
            session_id=actor_id,
            key=actor_id,
            supervisor=_supervisor(starter),
            journal=journal,
            journal_path=journal_path,
            encrypt=encrypt,
            successor=context.was_current_actor_reconstructed,
        )
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
    journal          keep what is needed to go on with the shared memory after a kill
    starter          as for the controller
    """

    def __init__(
        self,
        controller_info: ZMQServerInfo,
        capacity_bytes: int | None = None,
        arena_bytes: int = 64 << 20,
        unit_id: str | None = None,
        transport: str = "auto",
        journal: bool = True,
        starter: ProcessId | None = None,
    ) -> None:
        _remove_finished()
        actor_id = str(ray.get_runtime_context().get_actor_id())
        raise_descriptor_limit()
        self._server = UnitServer(
            controller_info,
            unit_id=unit_id or actor_id,
            key=actor_id,
            supervisor=_supervisor(starter),
            host=_node_ip(),
            capacity_bytes=capacity_bytes,
            arena_bytes=arena_bytes,
            transport=transport,
            journal=journal,
        )

    def get_info(self) -> UnitInfo:
        return self._server.info

    def shutdown(self) -> None:
        """Stop serving and remove the shared memory. Views that readers hold stay valid."""
        self._server.close()


TransferQueueController: Any = ray.remote(num_cpus=0, max_restarts=-1)(ControllerActor)
SimpleStorageUnit: Any = ray.remote(num_cpus=0, max_restarts=-1)(StorageUnitActor)


class RayRuntime:
    """Starts a session's actors, or units only for a controller that exists already."""

    def __init__(self, conf: DictConfig, settings: Settings, controller: Any = None) -> None:
        """Raises `NameTaken` if another process started the session first."""
        self._settings = settings
        self._owned: list[Any] = []
        self._folders: list[str] = []
        try:
            self.controller = controller if controller is not None else self._start_controller(conf)
            self.info: ZMQServerInfo = _get(self.controller.get_zmq_server_info.remote, "the controller actor")
            if controller is None:
                self._folders.append(self.info.folder)
            self._start_units()
        except BaseException:
            self.close()
            raise

    def _start_controller(self, conf: DictConfig) -> Any:
        settings = self._settings
        named = TransferQueueController.options(
            name=CONTROLLER_NAME,
            namespace=settings.namespace,
            scheduling_strategy=_bound_to(ray.get_runtime_context().get_node_id()),
            max_restarts=-1 if settings.journal_enabled else 0,
        )
        try:
            actor = named.remote(
                sampler=settings.sampler,
                **settings.ledger,
                conf=conf,
                journal=settings.journal_enabled,
                journal_path=settings.journal_path,
                encrypt=settings.encrypt,
                starter=process_id(),
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
            place = _bound_to(nodes[number % len(nodes)])
            actor = SimpleStorageUnit.options(scheduling_strategy=place, max_restarts=-1).remote(
                controller_info=self.info,
                capacity_bytes=self._settings.capacity_bytes,
                arena_bytes=self._settings.arena_bytes,
                transport=self._settings.transport,
                journal=self._settings.journal_enabled,
                starter=process_id(),
            )
            self._owned.append(actor)
            units.append(actor)
        for unit in units:
            self._folders.append(_get(unit.get_info.remote, "a storage unit actor").folder)

    def close(self) -> None:
        """Stop the actors that this runtime started. May be called twice."""
        actors, self._owned = self._owned, []
        folders, self._folders = self._folders, []
        if ray.is_initialized():
            stopping = [actor.shutdown.remote() for actor in actors]
            ray.wait(stopping, num_returns=len(actors), timeout=_STOP_TIMEOUT_S)
            for actor in actors:
                ray.kill(actor, no_restart=True)
        for folder in folders:  # of an actor that was dead just then, or being started again
            remove_left(Path(folder), _STOP_TIMEOUT_S)


def ensure_cluster() -> None:
    """Start or join a Ray cluster as `ray.init()` does, unless this process has."""
    if not ray.is_initialized():
        ray.init()


def running(namespace: str, timeout_s: float) -> tuple[Any, ZMQServerInfo] | None:
    """Configuration and endpoint of the session in this namespace, or None if there is none.

    Raises `ConnectionLost` if it ends meanwhile, `DeadlineExceeded` if it does not answer.
    """
    try:
        controller = ray.get_actor(CONTROLLER_NAME, namespace=namespace)
    except ValueError:
        return None
    what = f"the actor {CONTROLLER_NAME!r} in namespace {namespace!r}"
    return _get(controller.get_config.remote, what, timeout_s), _get(
        controller.get_zmq_server_info.remote, what, timeout_s
    )


def _get(ask: Callable[[], Any], what: str, timeout_s: float = _START_TIMEOUT_S) -> Any:
    """Ask an actor, again if it is just being started again."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ray.get(ask(), timeout=max(0.0, deadline - time.monotonic()))
        except ActorUnavailableError:
            time.sleep(_LOOK_AGAIN_S)
        except ray.exceptions.GetTimeoutError as error:
            raise DeadlineExceeded(
                f"{what} is there and did not answer within {timeout_s:g} s; "
                "`ray status` shows what the cluster has and lacks"
            ) from error
        except RayActorError as error:
            raise ConnectionLost(f"{what} died while it started: {error}") from error


def _bound_to(node_id: str) -> NodeAffinitySchedulingStrategy:
    """On this node and no other, also when it is started again: its shared memory is of no use elsewhere."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)


def _supervisor(starter: ProcessId | None) -> ProcessId | None:
    """Return the process whose death means that this actor is not started again, as far as this host can see it.

    Ray ends an actor with the process that made it. Where that is not known, it is the raylet, which is the parent.
    """
    if starter is not None and starter.host == host_id():
        return starter
    return identify(os.getppid())


def _remove_finished() -> None:
    """Remove what actors left that Ray will not start again: killed for good, or gone with a job that was.

    While the raylet lives, their folders tell nothing of that, and their shared memory would stay taken.
    """
    waiting = waiting_for_successors()
    if not waiting:
        return
    try:  # the public `ray.util.state` needs a dashboard, which few install
        from ray._private.state import actors
    except ImportError:
        return
    for actor_id, path in waiting.items():
        known = actors(actor_id)
        if known and known["State"] == "DEAD":
            remove_left(path, 0.0)


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray does not annotate it
