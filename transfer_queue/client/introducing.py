"""Making storage units that were started by hand known to the controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from transfer_queue.client.arguments import DEFAULT_TIMEOUT_S
from transfer_queue.client.steps import Call, Operation
from transfer_queue.config import BACKENDS
from transfer_queue.errors import UnknownName, WrongType, nearest
from transfer_queue.messages import Introduce
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.wire.peer import AnyPeer

_MANAGERS = (*BACKENDS, "AsyncSimpleStorageManager")


@dataclass(frozen=True)
class StorageManager:
    """Which storage a client was told of. Clients find the units at the controller; this is for those who ask."""

    manager_type: str
    storage_unit_infos: dict[str, ZMQServerInfo]


def introduce(
    controller: ZMQServerInfo,
    connect: Callable[[ZMQServerInfo], AnyPeer],
    manager_type: str,
    config: Mapping[str, Any],
) -> Operation[StorageManager]:
    """Introduce the units of `config["zmq_info"]` (or `["storage_unit_infos"]`) to the controller, where they are new.

    They are one `ZMQServerInfo` or a dict of them; other entries of `config` are not looked at. Units of a session that
    `init` started are known already.
    """
    if manager_type not in _MANAGERS:
        raise UnknownName(f"manager_type: unknown storage {manager_type!r}{nearest(str(manager_type), _MANAGERS)}")
    infos = _infos(config)
    introduction = Introduce(controller=controller.to_record())
    peers = [connect(info) for info in infos.values() if info.token]
    try:
        yield [Call(peer, introduction, DEFAULT_TIMEOUT_S) for peer in peers]
    finally:
        for peer in peers:
            peer.close()
    return StorageManager(manager_type, infos)


def _infos(config: Mapping[str, Any]) -> dict[str, ZMQServerInfo]:
    if not isinstance(config, Mapping):
        raise WrongType(f"config must be a mapping, not {type(config).__name__}")
    given = config.get("zmq_info") or config.get("storage_unit_infos") or {}
    infos = dict(given) if isinstance(given, Mapping) else {"0": given}
    for name, info in infos.items():
        if not isinstance(info, ZMQServerInfo):
            raise WrongType(f"storage unit {name!r} must be a ZMQServerInfo, not {type(info).__name__}")
    return {str(name): info for name, info in infos.items()}
