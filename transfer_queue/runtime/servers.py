"""One server process each: a controller with its ledger, a storage unit with its arenas.

A server with a `key` can be started again: whoever takes the place of a dead one under the same key finds its folder
in shared memory, listens at the same socket file and port, and takes the same token, so that clients come back by
themselves. `supervisor` is the process that would start it again; while that one lives, the folder is kept.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from typing_extensions import Self

from transfer_queue.controller import ControllerService
from transfer_queue.errors import ConnectionLost, InvalidArgument, ProtocolMismatch, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.messages import (
    PROTOCOL_VERSION,
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
from transfer_queue.metadata import Role, ZMQServerInfo
from transfer_queue.runtime.agreement import Agreement
from transfer_queue.runtime.supervisor import RETURN_S
from transfer_queue.storage.unit import UnitService
from transfer_queue.wire.channel import Peer
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.listener import Listener
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.security import new_token
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Handler, Ticket

if TYPE_CHECKING:
    from transfer_queue.runtime.metering import Metering

log = logging.getLogger(__name__)

_ANNOUNCE_TIMEOUT_S = 30.0
_SETTLE_TIMEOUT_S = 30.0
_RECORD = "server.json"
_METRICS = "metrics.json"


class _Endpoint(NamedTuple):
    """What a server has to take over from the one whose place it takes."""

    port: int  # 0: any
    token: bytes
    session_id: str
    curve: CurveKeys | None

    @classmethod
    def of(cls, folder: ServerFolder, token: bytes, session_id: str, encrypt: bool) -> tuple[_Endpoint, bool]:
        """Return the endpoint that the folder remembers, else a new one; and whether it was remembered."""
        record = folder.read_record(_RECORD)
        if record is None:
            return cls(0, token, session_id, CurveKeys.new() if encrypt else None), False
        if record["protocol"] != PROTOCOL_VERSION:
            raise ProtocolMismatch(
                f"{folder.path} was left by protocol version {record['protocol']}, this is {PROTOCOL_VERSION}: "
                "start a server again with the version of transfer_queue that ran before"
            )
        curve = CurveKeys(*record["curve"]) if record["curve"] else None
        return cls(record["port"], bytes.fromhex(record["token"]), record["session_id"], curve), True

    def __repr__(self) -> str:
        """Without the token, which lets whoever has it pass for a client."""
        return f"<_Endpoint of session {self.session_id}, port {self.port}>"

    @property
    def curve_key(self) -> str:
        return "" if self.curve is None else self.curve.public

    def remember(self, folder: ServerFolder, server: Server) -> None:
        folder.write_record(
            _RECORD,
            {
                "protocol": PROTOCOL_VERSION,
                "port": _port(server),
                "token": self.token.hex(),
                "session_id": self.session_id,
                "curve": self.curve,
            },
        )


class ControllerServer:
    """A controller that listens. `info` is all that clients and units need."""

    def __init__(
        self,
        ledger: Ledger,
        *,
        host: str,
        session_id: str | None = None,
        encrypt: bool = False,
        key: str | None = None,
        supervisor: ProcessId | None = None,
        journal: bool = False,
        journal_path: str | None = None,
        successor: bool = False,
        defaults: Mapping[str, Any] | None = None,
        metrics_port: int | None = None,
    ) -> None:
        """Start with an empty ledger, or, under the key of one that died, fill it from its journal.

        encrypt       TCP with CURVE, of this server and of the units that announce themselves to it
        journal       keep what is needed to start again
        journal_path  folder of the journal, durable before each answer; None: in the server's folder, which outlives
                      any process, but not the machine
        successor     of one that died, whose folder must be here
        defaults      of its clients, see `ZMQServerInfo`
        metrics_port  serve metrics, see `start_metrics`; None: not before that is called

        Raises `ConnectionLost` if a controller is to start again that kept no journal, or kept it elsewhere; and as
        `start_metrics`.
        """
        self._started = time.monotonic()
        self._metering: Metering | None = None
        self.service = ControllerService(ledger, unit_return_s=RETURN_S)
        self._handler: Handler = self.service
        self._defaults = defaults
        self.folder = ServerFolder("controller", key=key, supervisor=supervisor)
        self._server: Server | None = None
        self._journal: Path | None = None
        self._on_disk: Path | None = None
        try:
            if successor and not self.folder.adopted:
                raise ConnectionLost(
                    f"this controller died, and {socket.gethostname()!r}, where it is started again, does not have its "
                    "journal: its samples are lost; start a new session, and bind a controller made by hand to its node"
                )
            endpoint, again = _Endpoint.of(self.folder, new_token(), session_id or secrets.token_hex(8), encrypt)
            if again and not journal:
                raise ConnectionLost(
                    f"the controller of session {endpoint.session_id} died and kept no journal: its samples are lost; "
                    "start a new session, with journal.enabled if it has to survive its controller"
                )
            if journal_path is not None and journal:
                self._journal = self._on_disk = Path(journal_path) / "controller"
                with contextlib.suppress(OSError):  # the journal says why there can be no folder
                    self._on_disk.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.service.keep_in(self._on_disk, sync=True)
            elif journal:
                self._journal = self.folder.path / "journal"
                self.service.keep_in(self._journal)
            self._start(host, endpoint, metrics_port)
        except BaseException:
            self._give_up()
            raise

    def _start(self, host: str, endpoint: _Endpoint, metrics_port: int | None) -> None:
        self._server = server = Server(
            self.service,
            endpoint.token,
            local_path=self.folder.socket_path("request"),
            tcp_host=host,
            tcp_port=endpoint.port,
            curve=endpoint.curve,
            requests=self.service.requests,
            name="controller",
        )
        self.service.send_frees_by(server.push)
        self.info = ZMQServerInfo(
            Role.CONTROLLER,
            "controller",
            host,
            {"request": _port(server)},
            token=endpoint.token,
            local_address=server.local_address,
            folder=str(self.folder.path),
            nonce=self.folder.nonce,
            session_id=endpoint.session_id,
            curve_key=endpoint.curve_key,
            defaults=self._defaults,
        )
        if not endpoint.port:
            endpoint.remember(self.folder, server)
        self._go_on_with_metrics(metrics_port)
        server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def connect(self, client_id: str) -> LocalPeer:
        """A connection for this process: requests run in the caller's thread."""
        assert self._server is not None
        return LocalPeer(self._handler, client_id, on_wait=self._server.wake)

    def start_metrics(self, port: int = 0) -> str:
        """Serve Prometheus metrics from now on, also after a restart; return "host:port". Twice: nothing to do.

        `port` 0 takes a free one. Raises `ConnectionLost` if it is taken, `InvalidArgument` if a package is missing.
        """
        if self._metering is None:
            from transfer_queue.runtime.metering import Metering

            assert self._server is not None
            place = (self.info.ip, port, self.info.token)
            self._metering = Metering(self.service, self._server, *place, started=self._started, journal=self._journal)
            self._handler = self._metering.meter
            self.info.ports["metrics"] = self._metering.port
            self.folder.write_record(_METRICS, {"port": self._metering.port})
        return self.info.to_addr("metrics").removeprefix("tcp://")

    def _go_on_with_metrics(self, port: int | None) -> None:
        """Serve metrics if that was asked for, or if the one did whose place this one takes: where it did."""
        known = self.folder.read_record(_METRICS)
        if known is None:
            if port is not None:
                self.start_metrics(port)
            return
        try:
            self.start_metrics(known["port"])
        except TransferQueueError as error:  # no reason not to serve the queue
            log.error("metrics are not served any more: %s", error)

    def leave(self) -> None:
        """Stop listening; the state stays for the process that takes the place of this one."""
        self.folder.leave()
        self._stop()

    def close(self) -> None:
        """Stop listening. The state is gone, with the journal. May be called twice."""
        self._stop()
        self.folder.close()
        if self._on_disk is not None:
            shutil.rmtree(self._on_disk, ignore_errors=True)

    def _give_up(self) -> None:
        """A start failed: what an earlier server left is kept, for one that fares better."""
        self._stop()
        if self.folder.adopted:
            self.folder.leave()
        else:
            self.folder.close()

    def _stop(self) -> None:
        if self._metering is not None:
            self._metering.close()
        if self._server is not None:
            self._server.close()
        self.service.close()


def _port(server: Server) -> int:
    return int(server.address.rsplit(":", 1)[1])


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
        key: str | None = None,
        supervisor: ProcessId | None = None,
        journal: bool = False,
    ) -> None:
        """Returns when unit and controller agree on what is stored.

        journal   keep what is needed to go on with the arenas of one that died under this key

        Raises `ConnectionLost` or `NotAuthorized` if the controller does not take it.
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
        endpoint, _ = _Endpoint.of(folder, controller.token, controller.session_id, bool(controller.curve_key))
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
