"""What a server takes over from the one whose place it takes.

A server with a `key` can be started again: whoever takes the place of a dead one under the same key finds its folder
in shared memory, listens at the same socket file and port, and takes the same token, so that clients come back by
themselves. `supervisor` is the process that would start it again; while that one lives, the folder is kept.
"""

from __future__ import annotations

from typing import NamedTuple

from transfer_queue.errors import ProtocolMismatch
from transfer_queue.messages import PROTOCOL_VERSION
from transfer_queue.wire.curve import CurveKeys
from transfer_queue.wire.folder import ServerFolder
from transfer_queue.wire.server import Server

_RECORD = "server.json"


class Inherited(NamedTuple):
    """What a server has to take over from the one whose place it takes."""

    port: int  # 0: any
    token: bytes
    session_id: str
    curve: CurveKeys | None

    @classmethod
    def of(cls, folder: ServerFolder, token: bytes, session_id: str, encrypt: bool) -> tuple[Inherited, bool]:
        """Return what the folder remembers, else what is new; and whether it was remembered."""
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
        return f"<Inherited: session {self.session_id}, port {self.port}>"

    @property
    def curve_key(self) -> str:
        return "" if self.curve is None else self.curve.public

    def remember(self, folder: ServerFolder, server: Server) -> None:
        folder.write_record(
            _RECORD,
            {
                "protocol": PROTOCOL_VERSION,
                "port": port_of(server),
                "token": self.token.hex(),
                "session_id": self.session_id,
                "curve": self.curve,
            },
        )


def port_of(server: Server) -> int:
    return int(server.address.rsplit(":", 1)[1])
