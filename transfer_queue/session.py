"""The session of this process: start or attach, one client, close.

The default session is the only state that this module keeps. A forked child does not inherit it.
"""

from __future__ import annotations

import atexit
import copy
import functools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transfer_queue import config, environment
from transfer_queue.client.client import Connector, SocketConnector, TransferQueueClient
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, NotInitialized
from transfer_queue.metadata import ZMQServerInfo

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from transfer_queue.runtime.ray import RayRuntime

log = logging.getLogger("transfer_queue")


class Owned(Protocol):
    """What a process that started a queue has to stop."""

    def close(self) -> None: ...


@dataclass
class Session:
    """A queue as one process sees it: its configuration, its client, and what this process started of it.

    is_there   of a queue that others can end for good, under Ray: whether it still is there
    """

    conf: DictConfig
    client: TransferQueueClient
    owned: Owned | None = None
    is_there: Callable[[], bool] | None = None
    pid: int = field(default_factory=os.getpid)

    def close(self) -> None:
        self.client.close()
        if self.owned is not None:
            self.owned.close()


_LOOK_AGAIN_S = 0.1

_lock = threading.RLock()
_session: Session | None = None
_left: Session | None = None  # whose actors go on, and which this process may still have to stop


def init(conf: DictConfig | Mapping[str, Any] | None = None, *, controller: Any = None) -> DictConfig:
    """Start a queue, or attach to the one that is running, and return its live configuration.

    conf         what differs from the packaged defaults (`config.yaml`); unknown keys are kept. What `init` returned
                 elsewhere attaches to that queue
    controller   handle of a `TransferQueueController` actor made by hand: storage units are started for it

    Where no Ray is initialized and no `address` is given, controller and storage live inside this process and other
    processes of the host attach with `init({"address": conf.address})`. Under Ray they are actors, found by name.
    With `runtime: processes` they are child processes of this one, started again when they die. A forked child attaches
    to the queue of its parent.

    Called again, returns the live configuration; a warning names what is asked for and not in force. Raises
    `DeadlineExceeded` if a running queue does not answer within `attach_timeout_s`.
    """
    global _session  # noqa: PLW0603  the one session of this process
    with _lock:
        current = _current()
        if current is not None and current.is_there is not None and not current.is_there():
            log.warning("the queue of this process was ended from outside; looking for another, or starting one")
            current.close()
            current = _session = None
        started = current is None
        if current is None:
            current = _session = _begin(conf, controller)
            atexit.register(close)
        if not started or current.owned is None:  # else it is as was asked, but for what the environment says
            _warn_of_differences(conf, current.conf)
        return current.conf


def close() -> None:
    """Stop what this process started and detach from the rest. Without a session, or called twice: nothing to do."""
    global _session, _left
    with _lock:
        (current, _session), (left, _left) = (_current(), None), (_left, None)
    atexit.unregister(close)
    for ended in (current, left):
        if ended is not None and ended.pid == os.getpid():
            ended.close()


def detach() -> None:
    """Forget the queue of this process; the next `init` looks for one. What ends with its starter anyway is stopped."""
    global _session, _left  # noqa: PLW0603  as above
    with _lock:
        current, _session = _current(), None
        if current is None:
            return
        if current.owned is not None and current.is_there is not None:
            current.client.close()
            _left = current
        else:
            current.close()


def get_client() -> TransferQueueClient:
    """The client of this process, the same object on every call. Raises `NotInitialized` before `init`."""
    current = _current()
    if current is None:
        raise NotInitialized("transfer_queue is not initialized in this process: call transfer_queue.init() first")
    return current.client


def current_client() -> TransferQueueClient | None:
    """The client of this process, if there is one."""
    current = _current()
    return None if current is None else current.client


def current_controller() -> Any:
    """The actor that is the controller of this process's queue; None without a queue, and where there are no actors."""
    current = _current()
    if current is None or current.is_there is None or not current.is_there():
        return None
    from transfer_queue.runtime import ray as ray_runtime

    return ray_runtime.find(current.conf.namespace)


def save_checkpoint(
    checkpoint_dir: str | Path, *, include_storage: bool = True, metadata: dict[str, Any] | None = None
) -> None:
    """Write a checkpoint of the queue, see `TransferQueueClient.save_checkpoint`.

    `include_storage=False` is of stores that keep their data by themselves; this one is in memory and is saved anyway.
    """
    if not include_storage:
        log.warning("include_storage=False has no effect: rows are in memory, a checkpoint without them is of no use")
    found_client().save_checkpoint(checkpoint_dir, metadata=metadata)


def load_checkpoint(checkpoint_dir: str | Path) -> None:
    """Replace the state of the queue by that of a checkpoint, see `TransferQueueClient.load_checkpoint`."""
    found_client().load_checkpoint(checkpoint_dir)


def get_metrics_endpoint() -> str | None:
    """Where the queue serves Prometheus metrics, as "host:port"; None: nowhere. Attaches as `found_client` does."""
    endpoint = found_client().controller_info.metrics_endpoint
    controller = current_controller() if endpoint is None else None
    if controller is None:
        return endpoint
    from transfer_queue.runtime import ray as ray_runtime

    return ray_runtime.info_of(controller).metrics_endpoint  # they may be served since this process attached


def found_client() -> TransferQueueClient:
    """The client of this process. Without one, attaches to a queue that is there: that of the process it was forked
    from, that of `TQ_ADDRESS`, or that of the Ray cluster it is connected to. Raises `NotInitialized` if none is."""
    if _current() is None:
        with _lock:
            if _current() is None and _can_attach():
                init()
    return get_client()


def _after_fork() -> None:
    """A thread that is not in the child may have held the lock."""
    global _lock  # noqa: PLW0603  as above
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _current() -> Session | None:
    return _session if _session is not None and _session.pid == os.getpid() else None


def _can_attach() -> bool:
    if _session is not None:  # of the process that this one was forked from
        return True
    settings = config.settings(config.merged(None))
    if _runtime(settings) != "ray":
        return settings.address is not None
    from transfer_queue.runtime import ray as ray_runtime

    return ray_runtime.exists(settings.namespace)


def _warn_of_differences(conf: DictConfig | Mapping[str, Any] | None, live: DictConfig) -> None:
    different = config.differences(conf, live)
    if different:
        log.warning(
            "transfer_queue is running with another configuration, which stays in force: %s",
            "; ".join(f"{key} is {there!r}, not {asked!r}" for key, asked, there in different),
        )


# ---------------------------------------------------------------- starting and attaching


def _begin(conf: DictConfig | Mapping[str, Any] | None, controller: Any) -> Session:
    if _session is not None:  # of the process that this one was forked from: nothing of it can be used but its address
        return _attached(copy.deepcopy(_session.conf))
    merged = config.merged(conf)
    settings = config.settings(merged)
    environment.set_logging_level()
    runtime = _runtime(settings)
    if controller is not None or runtime == "ray":
        return _begin_ray(merged, settings, controller)
    if merged.controller.zmq_info is not None:
        return _attached(merged)
    if runtime == "processes":
        return _begin_processes(merged, settings)
    if settings.address is not None:
        return _found_by_address(merged, settings.address)
    return _begin_embedded(merged, settings)


def _runtime(settings: config.Settings) -> str:
    """ "auto" is Ray where it is imported and initialized already; this never imports it."""
    if settings.runtime != "auto":
        return settings.runtime
    ray = sys.modules.get("ray")
    return "ray" if settings.address is None and ray is not None and ray.is_initialized() else "embedded"


def _begin_embedded(conf: DictConfig, settings: config.Settings) -> Session:
    from transfer_queue.runtime.embedded import EmbeddedRuntime

    runtime = EmbeddedRuntime(settings, config.as_json(conf))
    conf.address = runtime.address
    return _session_of(conf, settings, runtime.info, runtime, runtime)


def _begin_processes(conf: DictConfig, settings: config.Settings) -> Session:
    """Start the processes; with an `address`, only if no session is there: of several that try, one starts."""
    from transfer_queue.runtime.endpoint import EndpointFile

    if settings.address is None:
        return _started_processes(conf, settings)
    file = EndpointFile(settings.address)
    with file.starting(settings.attach_timeout_s):
        if file.find() is None:
            return _started_processes(conf, settings)
    return _found_by_address(conf, settings.address)


def _started_processes(conf: DictConfig, settings: config.Settings) -> Session:
    from transfer_queue.runtime.processes import ProcessesRuntime

    runtime = ProcessesRuntime(settings, config.as_json(conf))
    conf.address = runtime.address
    return _session_of(conf, settings, runtime.info, SocketConnector(runtime.info, settings.transport), runtime)


def _begin_ray(conf: DictConfig, settings: config.Settings, controller: Any) -> Session:
    from transfer_queue.runtime import ray as ray_runtime

    ray_runtime.ensure_cluster()
    if controller is not None:
        return _started_in_ray(conf, settings, ray_runtime.RayRuntime(conf, settings, controller))
    deadline = time.monotonic() + settings.attach_timeout_s
    while (found := _found_in_ray(settings, deadline)) is None:
        if conf.controller.zmq_info is not None:
            return _attached(conf)
        try:
            started = _started_in_ray(conf, settings, ray_runtime.RayRuntime(conf, settings))
        except ray_runtime.NameTaken:  # another process is ahead: there is something to attach to
            if time.monotonic() >= deadline:
                raise
        else:
            started.is_there = functools.partial(ray_runtime.exists, settings.namespace)
            return started
    return _found_by_name(conf, settings.namespace, *found)


def _found_in_ray(settings: config.Settings, deadline: float) -> tuple[Any, ZMQServerInfo] | None:
    """Return the session that runs; one that dies before it answers was only half started, so look again."""
    from transfer_queue.runtime import ray as ray_runtime

    while True:
        try:
            return ray_runtime.running(settings.namespace, settings.attach_timeout_s)
        except ConnectionLost:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOOK_AGAIN_S)


def _found_by_name(conf: DictConfig, namespace: str, theirs: Any, info: ZMQServerInfo) -> Session:
    from transfer_queue.runtime import ray as ray_runtime

    global _left
    conf = conf if theirs is None else theirs
    conf.controller.zmq_info = info
    found = _attached(conf)
    found.is_there = functools.partial(ray_runtime.exists, namespace)
    if _left is not None and _left.client.controller_info.session_id == info.session_id:
        found.owned, _left = _left.owned, None
    return found


def _started_in_ray(conf: DictConfig, settings: config.Settings, runtime: RayRuntime) -> Session:
    return _session_of(conf, settings, runtime.info, SocketConnector(runtime.info, settings.transport), runtime)


def _found_by_address(conf: DictConfig, address: str) -> Session:
    from transfer_queue.runtime.endpoint import EndpointFile

    file = EndpointFile(address)
    info, theirs = file.read(), file.conf()
    if theirs is not None:
        conf = config.merged(theirs)
    conf.controller.zmq_info, conf.address = info, str(file.path)
    return _attached(conf)


def _attached(conf: DictConfig) -> Session:
    """Attach to the queue whose configuration this is."""
    info, settings = conf.controller.zmq_info, config.settings(conf)
    return _session_of(conf, settings, info, SocketConnector(info, settings.transport), None)


def _session_of(
    conf: DictConfig, settings: config.Settings, info: ZMQServerInfo, connector: Connector, owned: Owned | None
) -> Session:
    """Connect the client and fill in what only a running queue knows; stop what was started if that fails."""
    client = None
    try:
        client = TransferQueueClient(
            f"{socket.gethostname()}-{os.getpid()}",
            info,
            transport=settings.transport,
            connector=connector,
            **settings.client,
        )
        conf.controller.zmq_info, conf.metrics.endpoint = info, info.metrics_endpoint
        conf.backend[conf.backend.storage_backend].zmq_info = client.storage_infos(settings.attach_timeout_s)
        return Session(conf, client, owned)
    except BaseException as error:
        if client is not None:
            client.close()
        if owned is not None:
            owned.close()
        if isinstance(error, ConnectionLost):
            raise DeadlineExceeded(
                f"attach: found the session of {info!r} and waited {settings.attach_timeout_s:g} s for it to "
                f"answer: {error.message}"
            ) from error
        raise
