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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from transfer_queue import config
from transfer_queue.client.client import Connector, SocketConnector, TransferQueueClient
from transfer_queue.errors import DeadlineExceeded, NotInitialized
from transfer_queue.metadata import ZMQServerInfo

if TYPE_CHECKING:
    from omegaconf import DictConfig

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


_lock = threading.RLock()
_session: Session | None = None


def init(conf: DictConfig | Mapping[str, Any] | None = None, *, controller: Any = None) -> DictConfig:
    """Start a queue, or attach to the one that is running, and return its live configuration.

    conf         what differs from the packaged defaults (`config.yaml`); unknown keys are kept
    controller   handle of a `TransferQueueController` actor made by hand: storage units are started for it

    Where no Ray is initialized and no `address` is given, controller and storage live inside this process and other
    processes of the host attach with `init({"address": conf.address})`. Under Ray they are actors, found by name.
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
    if controller is not None or _runtime(settings) == "ray":
        started = _begin_ray(conf, settings, controller)
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


def _begin_ray(conf: DictConfig, settings: config.Settings, controller: Any) -> Session:
    from transfer_queue.runtime import ray as ray_runtime

    ray_runtime.ensure_cluster()
    found = None if controller is not None else ray_runtime.running(settings.namespace)
    if found is None:
        try:
            runtime = ray_runtime.RayRuntime(conf, settings, controller)
            return _session_of(conf, settings, runtime.info, SocketConnector(runtime.info, settings.transport), runtime)
        except ray_runtime.NameTaken:
            found = ray_runtime.running(settings.namespace)
    if found is None:
        raise DeadlineExceeded(
            f"the session in namespace {settings.namespace!r} came and went while this process attached"
        )
    theirs, info = found
    conf = conf if theirs is None else theirs
    settings = config.settings(conf)
    return _session_of(conf, settings, info, SocketConnector(info, settings.transport), None)


def _attach(conf: DictConfig, settings: config.Settings) -> Session:
    from transfer_queue.runtime.embedded import read_endpoint

    assert settings.address is not None
    info = read_endpoint(settings.address)
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
            connector=connector,
        )
        conf.controller.zmq_info = info
        conf.backend[conf.backend.storage_backend].zmq_info = client.storage_infos(settings.attach_timeout_s)
        return Session(conf, client, owned, os.getpid())
    except BaseException:
        if client is not None:
            client.close()
        if owned is not None:
            owned.close()
        raise
