"""Controller and storage units as child processes of this one, which keeps them alive."""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transfer_queue.config import Settings
from transfer_queue.errors import CapacityExceeded
from transfer_queue.metadata import ZMQServerInfo
from transfer_queue.runtime.endpoint import ENDPOINT_FILE, EndpointFile
from transfer_queue.runtime.supervisor import START_TIMEOUT_S, Child, Restarts
from transfer_queue.samplers.description import describe
from transfer_queue.wire.folder import ServerFolder, folder_path, remove_folder
from transfer_queue.wire.holders import process_id, to_record

log = logging.getLogger("transfer_queue")

_STATUS_FILE = "status.json"


class ProcessesRuntime:
    """Owns the processes. `address` is the endpoint file, `children` are the controller and then the units."""

    def __init__(self, settings: Settings, conf: Mapping[str, Any] | None = None) -> None:
        self._pid = os.getpid()
        self._key = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._sampler = describe(settings.sampler)
        self._supervisor = to_record(process_id())
        self.children: list[Child] = []
        self._folder = ServerFolder("session")
        self._file = EndpointFile(settings.address or self._folder.path / ENDPOINT_FILE)
        self.address = str(self._file.path)
        try:
            self.info = self._start_controller(settings)
            self._start_units(settings)
            self._file.write(self.info, str(self._folder.path / _STATUS_FILE), conf)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<ProcessesRuntime {self.address}: {self.children}>"

    def status(self) -> dict[str, Any]:
        """How each process is: {name: {pid, state, restarts}}."""
        return {
            child.name: {"pid": child.pid, "state": child.state, "restarts": child.restarts.total}
            for child in self.children
        }

    def close(self) -> None:
        """End the processes and remove their folders. Only the process that started them does. May be called twice."""
        if os.getpid() != self._pid:
            return
        if hasattr(self, "info"):
            self._file.remove(self.info)
        children, self.children = self.children, []
        for child in reversed(children):  # the units say good-bye to a controller that listens
            child.end()
        for child in children:
            child.join()
            remove_folder(self._folder_of(child.name))  # of one that was killed
        self._folder.close()

    def _start_controller(self, settings: Settings) -> ZMQServerInfo:
        order = {
            "role": "controller",
            "sampler": self._sampler,
            "import_path": sys.path,
            "ledger": settings.ledger,
            "server": {
                "host": settings.host,
                "encrypt": settings.encrypt,
                "defaults": settings.client,
                "metrics_port": settings.metrics,
                "key": self._key_of("controller"),
                "journal": settings.journal_enabled,
                "journal_path": settings.journal_path,
            },
        }
        restarts = Restarts() if settings.journal_enabled else Restarts(0)
        return ZMQServerInfo.from_record(self._start("controller", order, restarts).ready())

    def _start_units(self, settings: Settings) -> None:
        units = []
        for number in range(settings.num_units or 1):
            name = f"unit-{number}"
            order = {
                "role": "unit",
                "controller": self.info.to_record(),
                "server": {
                    "unit_id": name,
                    "host": settings.host,
                    "key": self._key_of(name),
                    "capacity_bytes": settings.capacity_bytes,
                    "arena_bytes": settings.arena_bytes,
                    "spill_path": settings.spill_path,
                    "spill_bytes": settings.spill_bytes,
                    "transport": settings.transport,
                    "journal": settings.journal_enabled,
                },
            }
            units.append(self._start(name, order, Restarts()))
        for unit in units:
            unit.ready()

    def _start(self, name: str, order: dict[str, Any], restarts: Restarts) -> Child:
        order = {**order, "supervisor": self._supervisor}
        child = Child(name, order, self._note, restarts=restarts, start_timeout_s=START_TIMEOUT_S)
        self.children.append(child)
        return child

    def _note(self) -> None:
        """Write down how the processes are, for others to read."""
        with self._lock:
            try:
                self._folder.write_record(_STATUS_FILE, self.status())
            except CapacityExceeded as error:  # full memory is no reason not to start a process again
                log.warning("the status of the session is out of date: %s", error)

    def _key_of(self, name: str) -> str:
        return f"{self._key}/{name}"

    def _folder_of(self, name: str) -> Path:
        return folder_path("controller" if name == "controller" else "unit", self._key_of(name))
