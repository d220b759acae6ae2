"""Controller and one storage unit inside this process; other processes of the host attach by the endpoint file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer_queue.client.client import SocketConnector
from transfer_queue.config import Settings
from transfer_queue.ledger import Ledger
from transfer_queue.messages import UnitInfo
from transfer_queue.runtime.controller_server import ControllerServer
from transfer_queue.runtime.endpoint import ENDPOINT_FILE, EndpointFile
from transfer_queue.runtime.unit_server import UnitServer
from transfer_queue.wire.peer import AnyPeer


class EmbeddedRuntime:
    """Owns the servers. `address` is the endpoint file, readable by this user only."""

    def __init__(self, settings: Settings, conf: Mapping[str, Any] | None = None) -> None:
        self._pid = os.getpid()
        self._transport = settings.transport
        ledger = Ledger(sampler=settings.sampler, **settings.ledger)
        self._controller = ControllerServer(
            ledger,
            host=settings.host,
            encrypt=settings.encrypt,
            defaults=settings.client,
            metrics_port=settings.metrics,
        )
        self._units: list[UnitServer] = []
        self.info = self._controller.info
        try:
            for number in range(settings.num_units or 1):
                self._units.append(
                    UnitServer(
                        self.info,
                        unit_id=f"unit-{number}",
                        host=settings.host,
                        capacity_bytes=settings.capacity_bytes,
                        arena_bytes=settings.arena_bytes,
                        spill_path=settings.spill_path,
                        spill_bytes=settings.spill_bytes,
                    )
                )
            file = EndpointFile(Path(self.info.folder) / ENDPOINT_FILE)
            file.write(self.info, conf=conf)
            self.address = str(file.path)
        except BaseException:
            self.close()
            raise

    def controller(self, client_id: str) -> AnyPeer:
        """This process calls the controller directly; a forked child has to connect to it."""
        if self._foreign():
            return SocketConnector(self.info, self._transport).controller(client_id)
        return self._controller.connect(client_id)

    def unit(self, client_id: str, info: UnitInfo) -> AnyPeer:
        """This process calls its own units directly, others over a socket."""
        for unit in () if self._foreign() else self._units:
            if unit.info.unit_id == info.unit_id:
                return unit.connect(client_id)
        return SocketConnector(self.info, self._transport).unit(client_id, info)

    def _foreign(self) -> bool:
        return os.getpid() != self._pid or self._transport == "tcp"

    def close(self) -> None:
        """Stop the servers and remove their folders. Only the process that started them does. May be called twice."""
        if os.getpid() == self._pid:
            while self._units:
                self._units.pop().close()
            self._controller.close()
