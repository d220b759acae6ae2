"""A session whose servers are Ray actors: starting and finding it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from transfer_queue.config import Settings
from transfer_queue.environment import logging_level
from transfer_queue.errors import CapacityExceeded, ConnectionLost, DeadlineExceeded
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime import actors
from transfer_queue.wire.folder import remove_left
from transfer_queue.wire.holders import process_id

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONTROLLER_NAME = "TransferQueueController"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 10.0
_LOOK_AGAIN_S = 0.1


class NameTaken(ConnectionLost):
    """The session that was to be started is there, started by another process."""


class RayRuntime:
    """Starts a session's actors, or units only for a controller that exists already."""

    def __init__(self, conf: DictConfig, settings: Settings, controller: Any = None) -> None:
        """Raises `NameTaken` if another process started the session first."""
        self._settings = settings
        self._owned: list[Any] = []
        self._folders: list[str] = []
        try:
            self.controller = controller if controller is not None else self._start_controller(conf)
            self.info = info_of(self.controller)
            if controller is None:
                self._folders.append(self.info.folder)
            self._start_units()
        except BaseException:
            self.close()
            raise

    def _start_controller(self, conf: DictConfig) -> Any:
        settings = self._settings
        named = actors.TransferQueueController.options(
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
                defaults=settings.client,
                metrics_port=settings.metrics,
                starter=process_id(),
                logging_level=logging_level("TQ_LOGGING_LEVEL"),
            )
        except ValueError as error:
            raise NameTaken(f"namespace {settings.namespace!r} has a controller already") from error
        self._owned.append(actor)
        return actor

    def _start_units(self) -> None:
        """Spread the units over the nodes, each bound to its node: its shared memory is of no use elsewhere."""
        nodes = self._storage_nodes()
        units = []
        for number in range(self._settings.num_units or len(nodes)):
            place = _bound_to(nodes[number % len(nodes)])
            actor = actors.SimpleStorageUnit.options(scheduling_strategy=place, max_restarts=-1).remote(
                controller_info=self.info,
                capacity_bytes=self._settings.capacity_bytes,
                arena_bytes=self._settings.arena_bytes,
                spill_path=self._settings.spill_path,
                spill_bytes=self._settings.spill_bytes,
                transport=self._settings.transport,
                journal=self._settings.journal_enabled,
                starter=process_id(),
                logging_level=logging_level("TQ_LOGGING_LEVEL"),
            )
            self._owned.append(actor)
            units.append(actor)
        for unit in units:
            self._folders.append(_get(unit.get_info.remote, "a storage unit actor").folder)

    def _storage_nodes(self) -> list[str]:
        """Nodes that may have a unit. Raises `CapacityExceeded` if none has the resource that is asked for."""
        needed = self._settings.required_node_resource
        nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        fit = sorted(node["NodeID"] for node in nodes if needed is None or node["Resources"].get(needed, 0) > 0)
        if not fit:
            offered = sorted({name for node in nodes for name in node["Resources"]})
            raise CapacityExceeded(
                f"no node offers the resource {needed!r} of backend.SimpleStorage.required_node_resource; there is no "
                f"capacity for rows. The nodes offer {', '.join(offered)}"
            )
        return fit

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


def find(namespace: str) -> Any:
    """The controller of this namespace, in the cluster that this process is connected to; None if there is none."""
    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(CONTROLLER_NAME, namespace=namespace)
    except ValueError:
        return None


def exists(namespace: str) -> bool:
    """Whether `find` finds something."""
    return find(namespace) is not None


def info_of(controller: Any) -> ZMQServerInfo:
    """What the actor tells clients. Raises `ConnectionLost` or `DeadlineExceeded` if it does not."""
    info: ZMQServerInfo = _get(controller.get_zmq_server_info.remote, "the controller actor")
    return info


def running(namespace: str, timeout_s: float) -> tuple[Any, ZMQServerInfo] | None:
    """Configuration and endpoint of the session in this namespace, or None if there is none.

    Raises `ConnectionLost` if it ends meanwhile, `DeadlineExceeded` if it does not answer.
    """
    controller = find(namespace)
    if controller is None:
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
