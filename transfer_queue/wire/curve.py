"""Encryption of TCP by ZeroMQ's CURVE: a key pair of the server, whose public half its clients have to know.

Clients make key pairs of their own for each connection; what lets them in is the public key of the server, and then the
token. Without CURVE the token is never sent either, but everything else can be read on the way.
"""

from __future__ import annotations

from typing import NamedTuple

import zmq

from transfer_queue.errors import InvalidArgument

KEY_CHARACTERS = 40  # Z85


class CurveKeys(NamedTuple):
    """The key pair of a server. The secret half lets whoever has it pass for the server, so `repr` does not show it."""

    public: str
    secret: str

    @classmethod
    def new(cls) -> CurveKeys:
        """Return the keys of a new server. Raises `InvalidArgument` where ZeroMQ cannot encrypt."""
        return cls(*_key_pair())

    def __repr__(self) -> str:
        return f"<CurveKeys {self.public}>"


def check_key(key: str) -> None:
    """Raise `InvalidArgument` for what is no public key; "" means no encryption."""
    if key and (len(key) != KEY_CHARACTERS or not key.isascii()):
        raise InvalidArgument(f"a key of a server has {KEY_CHARACTERS} ASCII characters, not {len(key)}")


def serve_encrypted(socket: zmq.Socket[bytes], keys: CurveKeys) -> None:
    """Let a new socket accept encrypted connections alone."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, keys.secret)


def connect_encrypted(socket: zmq.Socket[bytes], server_key: str) -> None:
    """Let a new socket connect to the server of this public key alone."""
    public, secret = _key_pair()
    socket.setsockopt_string(zmq.CURVE_SERVERKEY, server_key)
    socket.setsockopt_string(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt_string(zmq.CURVE_SECRETKEY, secret)


def _key_pair() -> tuple[str, str]:
    if not zmq.has("curve"):
        raise InvalidArgument(
            "this ZeroMQ cannot encrypt: `pip install --force-reinstall pyzmq` installs one that can, or set "
            "security.encrypt to false"
        )
    public, secret = zmq.curve_keypair()
    return public.decode(), secret.decode()
