"""The session of this process: start or attach, one client, close.

The default session is the only state that this module keeps. A forked child does not inherit it.
"""

from __future__ import annotations

import atexit
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transfer_queue import config
from transfer_queue.client.client import Connector, SocketConnector, TransferQueueClient
from transfer_queue.errors import ConnectionLost, DeadlineExceeded, NotInitialized
from transfer_queue.metadata import ZMQServerInfo

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from transfer_queue.runtime.processes import ProcessesRuntime
    from transfer_queue.runtime.ray import RayRuntime

log = logging.getLogger("transfer_queue")


class Owned(Protocol):
    """What a process that started a session has to stop."""

    def close(self) -> None: ...


@dataclass
class Session:
    """A queue as one process sees it: its configuration, its client, and what this process started of it."""

    conf: DictConfig
    client: TransferQueueClient
    owned: Owned | None
    pid: int

    def close(self) -> None:
        self.client.close()
        if self.owned is not None:
            self.owned.close()


_LOOK_AGAIN_S = 0.1

_lock = threading.RLock()
_session: Session | None = None


def init(conf: DictConfig | Mapping[str, Any] | None = None, *, controller: Any = None) -> DictConfig:
    """Start a queue, or attach to the one that is running, and return its live configuration.

    conf         what differs from the packaged defaults (`config.yaml`); unknown keys are kept
    controller   handle of a `TransferQueueController` actor made by hand: storage units are started for it

    Where no Ray is initialized and no `address` is given, controller and storage live inside this process and other
    processes of the host attach with `init({"address": conf.address})`. Under Ray they are actors, found by name.
    With `runtime: processes` they are child processes of this one, started again when they die.
    Called again, returns the live configuration. Raises `DeadlineExceeded` if a running queue does not answer within
    `attach_timeout_s`.
    """
    with _lock:
        current = _current()
        if current is None:
            current = _begin(config.merged(conf), controller)
        elif conf is not None or controller is not None:
            log.warning("transfer_queue is initialized in this process already; the configuration given now is ignored")
        return current.conf


def close() -> None:
    """Stop what this process started and detach from the rest. Without a session, or called twice: nothing to do."""
    global _session
    with _lock:
        current, _session = _current(), None
    atexit.unregister(close)
    if current is not None:
        current.close()


def get_client() -> TransferQueueClient:
    """The client of this process, the same object on every call. Raises `NotInitialized` before `init`."""
    current = _current()
    if current is None:
        raise NotInitialized("transfer_queue is not initialized in this process: call transfer_queue.init() first")
    return current.client


def _current() -> Session | None:
    return _session if _session is not None and _session.pid == os.getpid() else None


def _begin(conf: DictConfig, controller: Any) -> Session:
    global _session  # noqa: PLW0603  as above
    settings = config.settings(conf)
    runtime = _runtime(settings)
    if controller is not None or runtime == "ray":
        started = _begin_ray(conf, settings, controller)
    elif runtime == "processes":
        started = _begin_processes(conf, settings)
    elif settings.address is not None:
        started = _attach(conf, settings)
    else:
        started = _begin_embedded(conf, settings)
    _session = started
    atexit.register(close)
    return started


def _runtime(settings: config.Settings) -> str:
    """ "auto" is Ray where it is imported and initialized already; this never imports it."""
    if settings.runtime != "auto":
        return settings.runtime
    ray = sys.modules.get("ray")
    return "ray" if settings.address is None and ray is not None and ray.is_initialized() else "embedded"


def _begin_embedded(conf: DictConfig, settings: config.Settings) -> Session:
    from transfer_queue.runtime.embedded import EmbeddedRuntime

    runtime = EmbeddedRuntime(settings)
    conf.address = runtime.address
    return _session_of(conf, settings, runtime.info, runtime, runtime)


def _begin_processes(conf: DictConfig, settings: config.Settings) -> Session:
    """Start the processes; with an `address`, only if no session is there: of several that try, one starts."""
    from transfer_queue.runtime.endpoint import EndpointFile
    from transfer_queue.runtime.processes import ProcessesRuntime

    if settings.address is None:
        return _session_of_processes(conf, settings, ProcessesRuntime(settings))
    file = EndpointFile(settings.address)
    with file.starting(settings.attach_timeout_s):
        if file.find() is None:
            return _session_of_processes(conf, settings, ProcessesRuntime(settings))
    return _attach(conf, settings)


def _session_of_processes(conf: DictConfig, settings: config.Settings, runtime: ProcessesRuntime) -> Session:
    conf.address = runtime.address
    return _session_of(conf, settings, runtime.info, SocketConnector(runtime.info, settings.transport), runtime)


def _begin_ray(conf: DictConfig, settings: config.Settings, controller: Any) -> Session:
    from transfer_queue.runtime import ray as ray_runtime

    ray_runtime.ensure_cluster()
    if controller is not None:
        return _session_of_ray(conf, settings, ray_runtime.RayRuntime(conf, settings, controller))
    deadline = time.monotonic() + settings.attach_timeout_s
    while (found := _found_in_ray(settings, deadline)) is None:
        try:
            return _session_of_ray(conf, settings, ray_runtime.RayRuntime(conf, settings))
        except ray_runtime.NameTaken:  # another process is ahead: there is something to attach to
            if time.monotonic() >= deadline:
                raise
    theirs, info = found
    conf = conf if theirs is None else theirs
    settings = config.settings(conf)
    return _session_of(conf, settings, info, SocketConnector(info, settings.transport), None)


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


def _session_of_ray(conf: DictConfig, settings: config.Settings, runtime: RayRuntime) -> Session:
    return _session_of(conf, settings, runtime.info, SocketConnector(runtime.info, settings.transport), runtime)


def _attach(conf: DictConfig, settings: config.Settings) -> Session:
    from transfer_queue.runtime.endpoint import EndpointFile

    assert settings.address is not None
    info = EndpointFile(settings.address).read()
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
            layout=settings.layout,
            allow_pickle=settings.allow_pickle,
            checksums=settings.checksums,
            connector=connector,
        )
        conf.controller.zmq_info = info
        conf.backend[conf.backend.storage_backend].zmq_info = client.storage_infos(settings.attach_timeout_s)
        return Session(conf, client, owned, os.getpid())
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
