"""The server process of a storage unit, with its arenas. How one takes the place of another: `inherited`."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from transfer_queue.errors import CapacityExceeded, InvalidArgument
from transfer_queue.messages import (
    Announce,
    Announced,
    FreeBlocks,
    FreesDone,
    Int64s,
    ProcessId,
    Settle,
    Settled,
    UnitInfo,
)
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.agreement import Agreement
from transfer_queue.runtime.inherited import Inherited
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket

_ANNOUNCE_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 30.0
_SPILL_KEY = "backend.SimpleStorage.ssd_offload.path"


class UnitServer:
    """A storage unit that listens and has announced itself to the controller of `controller_info`."""

    def __init__(
        self,
        controller_info: ZMQServerInfo,
        *,
        unit_id: str,
        host: str,
        capacity_bytes: int | None = None,
        arena_bytes: int = 64 << 20,
        spill_path: str | None = None,
        spill_bytes: int | None = None,
        transport: str = "auto",
        key: str | None = None,
        supervisor: ProcessId | None = None,
        journal: bool = False,
    ) -> None:
        """Returns when unit and controller agree on what is stored.

        spill_path  a folder on disk for what finds no shared memory; None: such puts wait
        spill_bytes  most that the unit takes there; None: half of what is free there now
        journal     keep what is needed to go on with the arenas of one that died under this key

        Raises `ConnectionLost` or `NotAuthorized` if the controller does not take it, and `InvalidArgument` if there
        can be no folder at `spill_path`.
        """
        if not isinstance(controller_info, ZMQServerInfo):
            raise InvalidArgument(f"controller_info must be a ZMQServerInfo, not {type(controller_info).__name__}")
        self._unit_id = unit_id
        self._closing: list[Any] = []
        self.folder: ServerFolder = self._opened(ServerFolder("unit", key=key, supervisor=supervisor))
        try:
            self.service: UnitService = self._opened(
                UnitService(
                    self.folder.path,
                    capacity_bytes=capacity_bytes,
                    arena_bytes=arena_bytes,
                    spill_folder=None if spill_path is None else _spill_folder(self.folder, Path(spill_path)),
                    spill_bytes=spill_bytes,
                    settle=self._settle,
                    journal=journal,
                )
            )
            self._start(controller_info, host, transport)
        except BaseException:
            if self.folder.adopted:
                self.leave()
            else:
                self.close()
            raise

    def _start(self, controller: ZMQServerInfo, host: str, transport: str) -> None:
        place = self._listen(controller, host)
        self._controller = Peer(
            controller.local_address,
            controller.folder,
            controller.nonce,
            controller.to_addr("request"),
            token=controller.token,
            client_id=self._unit_id,
            transport=transport,
            curve_key=controller.curve_key,
        )
        self._agreement: Agreement = self._opened(Agreement(self.service, self._controller, self._unit_id))
        self._opened(self._controller)
        self._server.start()
        announcement = Announce(capacity_bytes=self.service.capacity_bytes, life=self.service.life, **place)
        listener: Listener = self._opened(Listener(self._controller, announcement, self._receive))
        announced = listener.announced(_ANNOUNCE_TIMEOUT_S)
        assert isinstance(announced, Announced)
        self._agreement.make(announced.number)
        self.info = UnitInfo(number=announced.number, **place)

    def _listen(self, controller: ZMQServerInfo, host: str) -> dict[str, str]:
        """Make the sockets; return what others need to find them."""
        folder = self.folder
        endpoint, _ = Inherited.of(folder, controller.token, controller.session_id, bool(controller.curve_key))
        self._server: Server = self._opened(
            Server(
                self.service,
                controller.token,
                local_path=folder.socket_path("request"),
                tcp_host=host,
                tcp_port=endpoint.port,
                curve=endpoint.curve,
                name="unit",
            )
        )
        if not endpoint.port:
            endpoint.remember(folder, self._server)
        return {
            "unit_id": self._unit_id,
            "address": self._server.address,
            "local_address": self._server.local_address,
            "folder": str(folder.path),
            "nonce": folder.nonce,
            "curve_key": endpoint.curve_key,
        }

    def connect(self, client_id: str) -> LocalPeer:
        """A connection for this process: requests run in the caller's thread."""
        return LocalPeer(self.service, client_id, on_wait=self._server.wake)

    def _opened(self, resource: Any) -> Any:
        self._closing.append(resource)
        return resource

    def _receive(self, message: Announced | FreeBlocks) -> FreesDone | None:
        """Called for everything the controller sends without being asked."""
        if isinstance(message, Announced):
            self._agreement.announced(message)
            return None
        self.service.submit(message, Ticket("controller", 0, None, message, lambda ticket, answer: None))
        return FreesDone(unit_id=self._unit_id, sequence=message.sequence)

    def _settle(self, blocks: Int64s) -> Int64s:
        settled = self._controller.begin(Settle(blocks=blocks)).result(_SETTLE_TIMEOUT_S)
        assert isinstance(settled, Settled)
        return settled.committed

    def leave(self) -> None:
        """Stop listening; the arenas stay for the process that takes the place of this one."""
        self.folder.leave()
        while self._closing:
            resource = self._closing.pop()
            if isinstance(resource, UnitService):
                resource.abandon()
            elif resource is not self.folder:
                resource.close()

    def close(self) -> None:
        """Stop listening and remove the arenas. Views that readers hold stay valid. May be called twice."""
        while self._closing:
            self._closing.pop().close()


def _spill_folder(folder: ServerFolder, root: Path) -> Path:
    try:
        part = folder.part_at(root)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityExceeded(f"no capacity for a folder for rows at {root}: {error}") from error
        raise InvalidArgument(f"{_SPILL_KEY}: there can be no folder for rows at {root}: {error}") from error
    if os.stat(part).st_dev == os.stat(folder.path).st_dev:
        raise InvalidArgument(f"{_SPILL_KEY}: {root} is in shared memory, which rows are to leave: name a disk")
    return part
