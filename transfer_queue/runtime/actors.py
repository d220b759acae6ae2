"""The controller and the storage units as Ray actors: `TransferQueueController` and `SimpleStorageUnit`.

They reserve no CPU unless asked to with `.options(num_cpus=…)`, so that a queue starts on a machine of any size. Ray
starts them again when they die; they then find what they need in shared memory, so they have to stay on their node, and
`init` binds them to it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray

from transfer_queue.environment import set_logging_level
from transfer_queue.errors import InvalidArgument, NotInitialized, WrongType
from transfer_queue.ledger import Ledger
from transfer_queue.messages import Clear, Done, GetExplanation, Locate, ProcessId, Report, UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.metadata.snapshot import PartitionSnapshot
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.lobby import UnitLobby
from transfer_queue.runtime.unit_server import UnitServer
from transfer_queue.samplers.registry import SamplerLike
from transfer_queue.wire.descriptors import raise_descriptor_limit
from transfer_queue.wire.folder import remove_left, waiting_for_successors
from transfer_queue.wire.holders import host_id, identify

if TYPE_CHECKING:
    import torch

_KEY = "ray/"  # with the id of an actor: the key of its folder


class ControllerActor:
    """The controller of a queue. Clients need what `get_zmq_server_info` returns and nothing else.

    polling_mode        of clients that do not say: a `get_meta` that cannot be served returns an empty meta at once

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
    defaults            further ones of its clients, see `ZMQServerInfo`
    metrics_port        serve Prometheus metrics, see `start_metrics`
    starter             the process whose death ends the actor, if it is known and no other than Ray starts it again
    logging_level       of its logger "transfer_queue"; None: TQ_LOGGING_LEVEL where the actor runs
    """

    def __init__(
        self,
        global_batch_size: int | None = None,
        num_global_batch: int = 1,
        num_n_samples: int = 1,
        sampler: SamplerLike | None = None,
        polling_mode: bool = False,
        max_deliveries: int | None = None,
        max_staleness: int | None = None,
        limits: Mapping[str, int | None] | None = None,
        conf: Any = None,
        journal: bool = True,
        journal_path: str | None = None,
        encrypt: bool = False,
        defaults: Mapping[str, Any] | None = None,
        metrics_port: int | None = None,
        starter: ProcessId | None = None,
        logging_level: int | None = None,
    ) -> None:
        set_logging_level(logging_level)
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
            key=_KEY + actor_id,
            supervisor=_supervisor(starter),
            journal=journal,
            journal_path=journal_path,
            encrypt=encrypt,
            successor=context.was_current_actor_reconstructed,
            defaults={"polling_mode": polling_mode, **(defaults or {})},
            metrics_port=metrics_port,
        )
        self._conf = conf
        if conf is not None:
            conf.controller.zmq_info = self._server.info
            conf.metrics.endpoint = self._server.info.metrics_endpoint

    def get_zmq_server_info(self) -> ZMQServerInfo:
        return self._server.info

    def register_sampler(self, *args: Any, **kwargs: Any) -> str:
        """Give a task (None: every task without its own) a sampler. Returns how it describes itself.

        `(task_name, sampler)` or `(sampler, task_name=None)`: of two texts the first is the task.
        """
        task_name, sampler = _task_and_sampler(*args, **kwargs)
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
        """The configuration of the session; None if the actor was not started by `init` and none was stored."""
        return self._conf

    def store_config(self, conf: Any) -> None:
        """Keep a configuration for processes that attach."""
        self._conf = conf

    def get_partition_snapshot(self, partition_id: str) -> PartitionSnapshot | None:
        """Keys, tags and production status of all rows; None for an unknown partition."""
        return self._server.service.inspect(lambda ledger: _snapshot(ledger, partition_id))

    def start_metrics(self, port: int = 0) -> str:
        """Serve Prometheus metrics from now on, unless they are; return "host:port". Port 0 takes a free one."""
        endpoint = self._server.start_metrics(port)
        if self._conf is not None:
            self._conf.metrics.endpoint = endpoint
        return endpoint

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

    controller_info  None: it waits for `initialize_storage_manager` of a client to introduce it to one
    storage_unit_size  rows that the unit is expected to hold; bytes are what bounds it, so it is not looked at
    capacity_bytes   of all its shared memory; `None`: half of what /dev/shm has free now
    arena_bytes      size of one shared-memory file
    spill_path       folder on the node's disk for what finds no shared memory; `None`: such puts wait
    spill_bytes      most that it takes there; `None`: half of what is free there now
    journal          keep what is needed to go on with the shared memory after a kill
    starter          as for the controller
    logging_level    as for the controller
    """

    def __init__(
        self,
        controller_info: ZMQServerInfo | None = None,
        storage_unit_size: int | None = None,
        *,
        capacity_bytes: int | None = None,
        arena_bytes: int = 64 << 20,
        spill_path: str | None = None,
        spill_bytes: int | None = None,
        unit_id: str | None = None,
        transport: str = "auto",
        journal: bool = True,
        starter: ProcessId | None = None,
        logging_level: int | None = None,
    ) -> None:
        set_logging_level(logging_level)
        _remove_finished()
        actor_id = str(ray.get_runtime_context().get_actor_id())
        raise_descriptor_limit()
        self._server: UnitServer | None = None
        self._lobby: UnitLobby | None = None
        host, supervisor = _node_ip(), _supervisor(starter)

        def start(controller: ZMQServerInfo) -> UnitServer:
            self._server = UnitServer(
                controller,
                unit_id=unit_id or actor_id,
                key=_KEY + actor_id,
                supervisor=supervisor,
                host=host,
                capacity_bytes=capacity_bytes,
                arena_bytes=arena_bytes,
                spill_path=spill_path,
                spill_bytes=spill_bytes,
                transport=transport,
                journal=journal,
            )
            return self._server

        if controller_info is not None:
            start(controller_info)
        else:
            self._lobby = UnitLobby(
                start, unit_id=unit_id or actor_id, host=host, key=_KEY + actor_id, supervisor=supervisor
            )

    def get_info(self) -> UnitInfo:
        """How clients of the session reach it. Raises `NotInitialized` if it waits for its controller."""
        if self._server is None:
            raise NotInitialized("this storage unit has no controller yet: call initialize_storage_manager of a client")
        return self._server.info

    def get_zmq_server_info(self) -> ZMQServerInfo:
        """What `initialize_storage_manager` of a client needs, of a unit that was started without a controller."""
        if self._lobby is None:
            raise InvalidArgument(
                "this storage unit was given its controller when it was started; clients find it there"
            )
        return self._lobby.info

    def shutdown(self) -> None:
        """Stop serving and remove the shared memory. Views that readers hold stay valid."""
        for running in (self._lobby, self._server):
            if running is not None:
                running.close()


TransferQueueController: Any = ray.remote(num_cpus=0, max_restarts=-1)(ControllerActor)
SimpleStorageUnit: Any = ray.remote(num_cpus=0, max_restarts=-1)(StorageUnitActor)


def _task_and_sampler(*args: Any, **kwargs: Any) -> tuple[str | None, SamplerLike]:
    """The two orders in which `register_sampler` is called."""
    unknown = sorted(set(kwargs) - {"task_name", "sampler"})
    if unknown or len(args) + len(kwargs) > 2:
        raise WrongType(f"register_sampler takes task_name and sampler, not {args!r} {kwargs!r}")
    if len(args) == 2:
        first, second = args
        native = first is None or (isinstance(first, str) and second is not None)
        return (first, second) if native else (second, first)
    if args and "sampler" in kwargs:
        return args[0], kwargs["sampler"]
    sampler = args[0] if args else kwargs.get("sampler")
    if sampler is None:
        raise InvalidArgument("register_sampler needs a sampler")
    return kwargs.get("task_name"), sampler


def _snapshot(ledger: Ledger, partition_id: str) -> PartitionSnapshot | None:
    import torch

    if partition_id not in ledger.reports.partitions():
        return None
    rows = ledger.locate(
        Locate(
            partition_id=partition_id,
            global_step=None,
            indexes=None,
            generations=None,
            keys=None,
            fields=(),
            allow_missing=True,
        )
    )
    indexes = rows.indexes.tolist()
    return PartitionSnapshot(
        keys_mapping={key: row for key, row in zip(rows.keys or (), indexes, strict=False) if key is not None},
        global_indexes=set(indexes),
        custom_meta={row: dict(tag) for row, tag in zip(indexes, rows.tags or (), strict=False) if tag},
        field_name_mapping=ledger.reports.field_mapping(),
        production_status=torch.from_numpy(ledger.reports.production_status()),
    )


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
    for key, path in waiting:
        known = actors(key.removeprefix(_KEY)) if key.startswith(_KEY) else None
        if known and known["State"] == "DEAD":
            remove_left(path, 0.0)


def _node_ip() -> str:
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray does not annotate it
