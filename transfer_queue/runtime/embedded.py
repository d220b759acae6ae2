"""Controller and one storage unit inside this process; other processes of the host attach by the endpoint file."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transfer_queue.client.client import SocketConnector
from transfer_queue.config import Settings
from transfer_queue.errors import ConnectionLost
from transfer_queue.ledger import Ledger
from transfer_queue.messages import UnitInfo
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.servers import ControllerServer, UnitServer
from transfer_queue.wire.peer import AnyPeer

ENDPOINT_FILE = "endpoint.json"


class EmbeddedRuntime:
    """Owns the servers. `address` is the endpoint file, readable by this user only."""

    def __init__(self, settings: Settings) -> None:
        self._pid = os.getpid()
        self._transport = settings.transport
        ledger = Ledger(
            global_batch_size=settings.global_batch_size,
            num_global_batch=settings.num_global_batch,
            num_n_samples=settings.num_n_samples,
            sampler=settings.sampler,
        )
        self._controller = ControllerServer(ledger, host=settings.host)
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
                    )
                )
            self.address = self._write_endpoint()
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

    def _write_endpoint(self) -> str:
        path = Path(self.info.folder) / ENDPOINT_FILE
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(self.info.to_record(), file)
        return str(path)


def read_endpoint(address: str) -> ZMQServerInfo:
    """Read the endpoint file of a running session."""
    try:
        return ZMQServerInfo.from_record(json.loads(Path(address).read_text()))
    except (OSError, ValueError) as error:
        raise ConnectionLost(
            f"cannot attach: no endpoint file at {address!r} ({error}); is the process that started it still running?"
        ) from error
