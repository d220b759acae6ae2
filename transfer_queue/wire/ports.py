"""Addresses to listen at and addresses to connect to."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from transfer_queue.errors import ConnectionLost, InvalidArgument
from transfer_queue.wire.folder import same_host

MAX_PATH_BYTES = 100

_UNIX = "unix://"
_LOWEST_PORT = 10240
_HIGHEST_PORT = 65535
_PORT_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_DEFAULT_RANGE = (32768, 60999)


def choose_address(local_address: str, folder: str, nonce: str, address: str, transport: str = "auto") -> str:
    """Return the address to connect to: `local_address` if this process can read the server's nonce in `folder`.

    So a folder that is shared by several hosts, or of the same name on another one, is not taken for the server's.
    `transport` "tcp" asks for `address` in any case. Raises `ConnectionLost` if no address is left.
    """
    if transport not in {"auto", "tcp"}:
        raise InvalidArgument(f"transport is 'auto' or 'tcp', not {transport!r}")
    if transport == "auto" and local_address and same_host(folder, nonce):
        return local_address
    if not address:
        raise ConnectionLost(
            f"the server listens only at {local_address or 'no address'}, which this process cannot reach "
            f"(transport {transport!r}, folder {folder!r}): run on its host, or start it with a tcp address"
        )
    return address


def unix_address(path: str) -> str:
    """Return the address of a socket file. Raises `InvalidArgument` for a path beyond what the system allows."""
    size = len(os.fsencode(path))
    if size > MAX_PATH_BYTES:
        raise InvalidArgument(
            f"the socket path {path!r} has {size} bytes, and at most {MAX_PATH_BYTES} are possible: "
            "choose a shorter folder"
        )
    return f"{_UNIX}{path}"


def is_unix_address(address: str) -> bool:
    return address.startswith(_UNIX)


def unix_path(address: str) -> str:
    return address.removeprefix(_UNIX)


def tcp_address(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def random_ports(count: int = 100) -> Iterator[int]:
    """Yield ports that the system does not give to outgoing connections, so that they can be kept over a restart."""
    low, high = _ephemeral_range()
    choices = range(_LOWEST_PORT, low) if low - _LOWEST_PORT >= count else range(high + 1, _HIGHEST_PORT + 1)
    if len(choices) < count:
        choices = range(_LOWEST_PORT, _HIGHEST_PORT + 1)
    for _ in range(count):
        yield secrets.choice(choices)


def _ephemeral_range() -> tuple[int, int]:
    try:
        low, high = _PORT_RANGE_FILE.read_text().split()
    except (OSError, ValueError):
        return _DEFAULT_RANGE
    return int(low), int(high)
