"""Where a storage unit waits that was started without a controller, until a client introduces it to one."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection
from typing import Protocol

from transfer_queue.errors import InvalidArgument, TransferQueueError, WrongType
from transfer_queue.messages import Done, Introduce, ProcessId, Reply, Request
from transfer_queue.metadata import Role, ZMQServerInfo
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.security import new_token
from transfer_queue.wire.server import Server
from transfer_queue.wire.ticket import Ticket

_RECORD = "introduced.json"


class Started(Protocol):
    """What runs once the controller is known."""

    def close(self) -> None: ...


class UnitLobby:
    """Listens for `Introduce` at `info`, with a token of its own, and then calls `start(controller)`.

    Under the `key` of one that died it calls `start` at once if it had been introduced.
    """

    def __init__(
        self,
        start: Callable[[ZMQServerInfo], Started],
        *,
        unit_id: str,
        host: str,
        key: str | None = None,
        supervisor: ProcessId | None = None,
    ) -> None:
        self._start = start
        self._controller: ZMQServerInfo | None = None
        self._started: Started | None = None
        self._folder = ServerFolder("lobby", key=key, supervisor=supervisor)
        try:
            record = self._folder.read_record(_RECORD)
            if record is not None:
                self._enter(ZMQServerInfo.from_record(record))
            token = new_token()
            path = self._folder.socket_path(secrets.token_hex(4))  # the one of an earlier life may still be there
            self._server = Server(self, token, local_path=path, tcp_host=host, name="lobby").start()
        except BaseException:
            self._folder.close()
            raise
        port = int(self._server.address.rsplit(":", 1)[1])
        self.info = ZMQServerInfo(
            Role.STORAGE,
            unit_id,
            host,
            {"request": port},
            token=token,
            local_address=self._server.local_address,
            folder=str(self._folder.path),
            nonce=self._folder.nonce,
        )

    def close(self) -> None:
        """Stop listening, and what was started. May be called twice."""
        self._server.close()
        started, self._started = self._started, None
        if started is not None:
            started.close()
        self._folder.close()

    # ------------------------------------------------------------ what the server calls

    def submit(self, request: Request, ticket: Ticket) -> None:
        if not isinstance(request, Introduce):
            error = f"this storage unit has no controller yet and takes no {type(request).__name__}: introduce it first"
            ticket.answer(InvalidArgument(error))
            return
        try:
            self._enter(ZMQServerInfo.from_record(request.controller))
        except TransferQueueError as error:
            ticket.answer(error)
        else:
            ticket.answer(Done())

    def tick(self) -> float | None:
        return None

    def lost(self, ticket: Ticket, reply: Reply | None) -> None:
        """An answer that nobody gets changes nothing: who asks again gets the same."""

    def gone(self, client_id: str) -> None:
        """Clients leave nothing here."""

    def holding(self) -> Collection[str]:
        return ()

    # ------------------------------------------------------------ inside

    def _enter(self, controller: ZMQServerInfo) -> None:
        if controller.role != Role.CONTROLLER:
            raise WrongType(f"a storage unit belongs to a controller, not to {controller!r}")
        if self._controller is None:
            self._started = self._start(controller)
            self._controller = controller
            self._folder.write_record(_RECORD, controller.to_record())
        elif controller.session_id != self._controller.session_id:
            raise InvalidArgument(f"this storage unit belongs to {self._controller!r} already, not to {controller!r}")
