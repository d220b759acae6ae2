"""How to reach a server, and what proves that one may."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

from transfer_queue.errors import InvalidArgument, UnknownName, WrongType, nearest


class Role(str, Enum):
    """What a process is in the queue. Members are plain strings."""

    CONTROLLER = "TransferQueueController"
    STORAGE = "TransferQueueStorage"
    CLIENT = "TransferQueueClient"

    __str__ = str.__str__


class ZMQServerInfo:
    """The address of a server: all that a client needs to connect and to be let in.

    ports          {name: port} of the TCP sockets at `ip`
    token          the session's secret; whoever has it may read and write the queue, so it is not shown by `repr`
    local_address  unix://path, for clients that can read the file `nonce` in `folder` and find `nonce` in it
    session_id     one life of the queue; a restarted one has another
    curve_key      public key of the server, where its TCP sockets are encrypted; "": they are not
    defaults       what clients of the queue do unless told otherwise, by the names of `TransferQueueClient`'s arguments
    """

    def __init__(
        self,
        role: str,
        id: str,
        ip: str,
        ports: Mapping[str, int],
        *,
        token: bytes = b"",
        local_address: str = "",
        folder: str = "",
        nonce: str = "",
        session_id: str = "",
        curve_key: str = "",
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.role = _text("role", role.value if isinstance(role, Enum) else role)
        self.id = _text("id", id)
        self.ip = _text("ip", ip)
        self.ports = _as_ports(ports)
        if not isinstance(token, bytes):
            raise WrongType(f"token must be bytes, not {type(token).__name__}")
        self.token = token
        self.local_address = _text("local_address", local_address)
        self.folder = _text("folder", folder)
        self.nonce = _text("nonce", nonce)
        self.session_id = _text("session_id", session_id)
        self.curve_key = _text("curve_key", curve_key)
        self.defaults = dict(defaults or {})

    def to_addr(self, name: str) -> str:
        """Return "tcp://ip:port" of the socket of this name."""
        if name not in self.ports:
            raise UnknownName(f"{self.role} {self.id!r} has no socket {name!r}{nearest(str(name), self.ports)}")
        host = f"[{self.ip}]" if ":" in self.ip else self.ip
        return f"tcp://{host}:{self.ports[name]}"

    @property
    def metrics_endpoint(self) -> str | None:
        """ "host:port" where Prometheus metrics are served; None: nowhere."""
        return self.to_addr("metrics").removeprefix("tcp://") if "metrics" in self.ports else None

    def to_dict(self) -> dict[str, Any]:
        """What may be shown: role, id, ip and ports, without the token."""
        return {"role": self.role, "id": self.id, "ip": self.ip, "ports": dict(self.ports)}

    def to_record(self) -> dict[str, Any]:
        """All of it as JSON has it, *with the token*: for files that only their owner can read."""
        return {
            **self.to_dict(),
            "token": self.token.hex(),
            "local_address": self.local_address,
            "folder": self.folder,
            "nonce": self.nonce,
            "session_id": self.session_id,
            "curve_key": self.curve_key,
            "defaults": dict(self.defaults),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ZMQServerInfo:
        """Rebuild what `to_record` described."""
        try:
            return cls(**{**record, "token": bytes.fromhex(record["token"])})
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidArgument(f"this is no record of a server ({error}): {sorted(record)}") from error

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ZMQServerInfo):
            return NotImplemented
        return self.to_record() == other.to_record()

    def __hash__(self) -> int:
        return hash((self.role, self.id, self.ip, self.session_id))

    def __repr__(self) -> str:
        places = ", ".join(f"{name} {self.to_addr(name)}" for name in self.ports)
        local = f", {self.local_address}" if self.local_address else ""
        return f"<ZMQServerInfo {self.role} {self.id!r}: {places or 'no sockets'}{local}>"


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise WrongType(f"{name} must be str, not {type(value).__name__} {value!r}")
    return str(value)


def _as_ports(ports: Any) -> dict[str, int]:
    if not isinstance(ports, Mapping):
        raise WrongType(f"ports must be a dict {{name: port}}, not {type(ports).__name__} {ports!r}")
    for name, port in ports.items():
        if not isinstance(port, int) or not 0 < port < 65536:
            raise InvalidArgument(f"port {name!r} must be an int in [1, 65535], not {port!r}")
    return {_text("name of a port", name): int(port) for name, port in ports.items()}
