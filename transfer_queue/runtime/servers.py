"""One server process each: a controller with its ledger, a storage unit with its arenas."""

from __future__ import annotations

import secrets
from types import TracebackType
from typing import Any

from typing_extensions import Self

from transfer_queue.controller import ControllerService
from transfer_queue.errors import InvalidArgument
from transfer_queue.ledger import Ledger
from transfer_queue.messages import Announce, Announced, FreeBlocks, FreesDone, Int64s, Settle, Settled, UnitInfo
from transfer_queue.metadata import Role, ZMQServerInfo
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.security import new_token
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket

_ANNOUNCE_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 30.0


class ControllerServer:
    """A controller that listens. `info` is all that clients and units need."""

    def __init__(self, ledger: Ledger, *, host: str, session_id: str | None = None) -> None:
        self.folder = ServerFolder("controller")
        self.service = ControllerService(ledger)
        token = new_token()
        try:
            self._server = Server(
                self.service, token, local_path=self.folder.socket_path("request"), tcp_host=host, name="controller"
            )
        except BaseException:
            self.folder.close()
            raise
        self.service.send_frees_by(self._server.push)
        self.info = ZMQServerInfo(
            Role.CONTROLLER,
            "controller",
            host,
            {"request": int(self._server.address.rsplit(":", 1)[1])},
            token=token,
            local_address=self._server.local_address,
            folder=str(self.folder.path),
            nonce=self.folder.nonce,
            session_id=session_id or secrets.token_hex(8),
        )
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def connect(self, client_id: str) -> LocalPeer:
        """A connection for this process: requests run in the caller's thread."""
        return LocalPeer(self.service, client_id, on_wait=self._server.wake)

    def close(self) -> None:
        """Stop listening. The state is gone. May be called twice."""
        self._server.close()
        self.folder.close()


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
        transport: str = "auto",
    ) -> None:
        """Returns when the controller knows the unit. Raises `ConnectionLost` or `NotAuthorized` if it will not."""
        if not isinstance(controller_info, ZMQServerInfo):
            raise InvalidArgument(f"controller_info must be a ZMQServerInfo, not {type(controller_info).__name__}")
        self._unit_id = unit_id
        self._closing: list[Any] = []
        try:
            self._start(controller_info, host, capacity_bytes, arena_bytes, transport)
        except BaseException:
            self.close()
            raise

    def _start(
        self, controller: ZMQServerInfo, host: str, capacity_bytes: int | None, arena_bytes: int, transport: str
    ) -> None:
        folder = self._opened(ServerFolder("unit"))
        self.service = self._opened(
            UnitService(folder.path, capacity_bytes=capacity_bytes, arena_bytes=arena_bytes, settle=self._settle)
        )
        self._server: Server = self._opened(
            Server(self.service, controller.token, local_path=folder.socket_path("request"), tcp_host=host, name="unit")
        )
        place = (controller.local_address, controller.folder, controller.nonce, controller.to_addr("request"))
        self._controller: Peer = self._opened(
            Peer(*place, token=controller.token, client_id=self._unit_id, transport=transport)
        )
        announcement = Announce(
            unit_id=self._unit_id,
            address=self._server.address,
            local_address=self._server.local_address,
            folder=str(folder.path),
            nonce=folder.nonce,
            capacity_bytes=self.service.capacity_bytes,
        )
        self._server.start()
        listener: Listener = self._opened(Listener(self._controller, announcement, self._receive))
        announced = listener.announced(_ANNOUNCE_TIMEOUT_S)
        assert isinstance(announced, Announced)
        self.info = UnitInfo(
            number=announced.number,
            unit_id=self._unit_id,
            address=self._server.address,
            local_address=self._server.local_address,
            folder=str(folder.path),
            nonce=folder.nonce,
        )

    def connect(self, client_id: str) -> LocalPeer:
        """A connection for this process: requests run in the caller's thread."""
        return LocalPeer(self.service, client_id, on_wait=self._server.wake)

    def _opened(self, resource: Any) -> Any:
        self._closing.append(resource)
        return resource

    def _receive(self, message: Announced | FreeBlocks) -> FreesDone | None:
        """Called for everything the controller sends without being asked."""
        if isinstance(message, Announced):
            self.service.number = message.number
            return None
        self.service.submit(message, Ticket("controller", 0, None, message, lambda ticket, answer: None))
        return FreesDone(unit_id=self._unit_id, sequence=message.sequence)

    def _settle(self, blocks: Int64s) -> Int64s:
        settled = self._controller.begin(Settle(blocks=blocks)).result(_SETTLE_TIMEOUT_S)
        assert isinstance(settled, Settled)
        return settled.committed

    def close(self) -> None:
        """Stop listening and remove the arenas. Views that readers hold stay valid. May be called twice."""
        while self._closing:
            self._closing.pop().close()
