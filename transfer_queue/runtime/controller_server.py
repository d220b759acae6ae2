"""The server process of a controller, with its ledger. How one takes the place of another: `inherited`."""

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
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from transfer_queue.controller import ControllerService
from transfer_queue.errors import ConnectionLost, TransferQueueError
from transfer_queue.ledger import Ledger
from transfer_queue.messages import ProcessId
from transfer_queue.metadata import Role, ZMQServerInfo
from transfer_queue.runtime.inherited import Inherited, port_of
from transfer_queue.runtime.supervisor import RETURN_S
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.local import LocalPeer
from transfer_queue.wire.security import new_token
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Handler

if TYPE_CHECKING:
    from transfer_queue.runtime.metering import Metering

log = logging.getLogger(__name__)

_METRICS = "metrics.json"


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
            endpoint, again = Inherited.of(self.folder, new_token(), session_id or secrets.token_hex(8), encrypt)
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

    def _start(self, host: str, endpoint: Inherited, metrics_port: int | None) -> None:
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
            {"request": port_of(server)},
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
