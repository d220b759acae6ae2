"""Who may speak: a mutual proof of the session's token, once per connection, for Unix sockets and TCP alike.

    client                                          server
    HELLO    magic · version · nonce · client id →
                                                  ← CHALLENGE  both nonces · proof over them        (or MISMATCH)
    PROOF    proof over both nonces              →
                                                  ← WELCOME    client's nonce                       (or REFUSED)

The client's nonce names the attempt: answers to an earlier HELLO of the same connection are dropped.
Proofs are HMAC-SHA256 under the token with a label per direction, so neither side's proof can be played back to the
other. The server assigns identities to connections, so none can be claimed. Whatever else an identity sends that the
server does not know (never welcomed, forgotten, or the server is a new one) is answered by WHO and not looked at;
the client then starts over with HELLO, and sends again what it still waits for. Over TCP an empty frame means WHO as
well: each new connection begins with one, so that a client notices at once that ZeroMQ connected it to a new server.

Once welcomed: MESSAGE (see `wire.codec`), PROBE from a client that has heard nothing for a while (answered by
ALIVE), and PING from a server to a client that waits.

Both classes are pure: frames in, frames out.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
import struct
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from transfer_queue.errors import DecodeError, NotAuthorized, ProtocolMismatch
from transfer_queue.messages import PROTOCOL_VERSION
from transfer_queue.wire.presence import Presence

TOKEN_BYTES = 32
MAX_CLIENT_ID_BYTES = 256

_MAGIC = b"TQue"
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"<B4sH{_NONCE_BYTES}s")
_CHALLENGE = struct.Struct(f"<B{_NONCE_BYTES}s{_NONCE_BYTES}s{_PROOF_BYTES}s")
_VERDICT = struct.Struct(f"<B{_NONCE_BYTES}s")
_PROOF = struct.Struct(f"<B{_PROOF_BYTES}s")
_MISMATCH = struct.Struct("<BH")
_SERVER_LABEL = b"transfer_queue server proof\0"
_CLIENT_LABEL = b"transfer_queue client proof\0"

K = TypeVar("K")
V = TypeVar("V")


class Kind(enum.IntEnum):
    """First byte of the first frame."""

    HELLO = ord("H")
    CHALLENGE = ord("C")
    MISMATCH = ord("V")
    PROOF = ord("P")
    WELCOME = ord("W")
    REFUSED = ord("R")
    WHO = ord("?")
    MESSAGE = ord("M")
    PROBE = ord("K")
    ALIVE = ord("A")
    PING = ord("I")


def new_token() -> bytes:
    """Return the secret of a new session."""
    return secrets.token_bytes(TOKEN_BYTES)


def signal(kind: Kind) -> bytes:
    """Return the frame of a kind that carries nothing else."""
    return bytes((kind,))


class Introduction:
    """The client's side of one connection."""

    def __init__(self, token: bytes, client_id: str) -> None:
        self._token = token
        self._client_id = client_id.encode()
        self._nonce = b""
        self._server_proved = False
        self._greeting = False
        self.welcomed = False

    def hello(self) -> bytes:
        """Start, or start over."""
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._server_proved = self.welcomed = False
        self._greeting = True
        return _HELLO.pack(Kind.HELLO, _MAGIC, PROTOCOL_VERSION, self._nonce) + self._client_id

    def lost(self) -> None:
        """The connection is gone: whoever is there next does not know us."""
        self._greeting = self._server_proved = self.welcomed = False

    def receive(self, frame: bytes) -> bytes | None:
        """Take a frame of the introduction and return the one to send, if any.

        A server that does not prove the token gets a proof all the same, which tells it nothing, so that it can
        count the attempt; then, or when it refuses, `NotAuthorized` is raised. Raises `ProtocolMismatch` too.
        """
        match frame[0] if len(frame) else Kind.WHO:
            case Kind.WHO:
                return None if self._greeting else self.hello()
            case Kind.CHALLENGE:
                return self._prove(frame)
            case Kind.WELCOME | Kind.REFUSED:
                self._conclude(frame)
            case Kind.MISMATCH:
                theirs = _unpack(_MISMATCH, frame)[1]
                raise ProtocolMismatch(
                    f"the server speaks protocol version {theirs}, this client {PROTOCOL_VERSION}: "
                    "install the same version of transfer_queue on both sides",
                    server=theirs,
                    client=PROTOCOL_VERSION,
                )
        return None

    def _prove(self, frame: bytes) -> bytes | None:
        _, attempt, nonce, proof = _unpack(_CHALLENGE, frame)
        if attempt != self._nonce:
            return None
        self._greeting = False
        expected = _sign(self._token, _SERVER_LABEL, self._nonce, nonce, self._client_id)
        self._server_proved = hmac.compare_digest(proof, expected)
        return _PROOF.pack(Kind.PROOF, _sign(self._token, _CLIENT_LABEL, self._nonce, nonce, self._client_id))

    def _conclude(self, frame: bytes) -> None:
        kind, attempt = _unpack(_VERDICT, frame)
        if attempt != self._nonce:
            return
        if kind != Kind.WELCOME or not self._server_proved:
            raise NotAuthorized(
                f"the token of client {self._client_id.decode()!r} is not that of the session it connected to: "
                "take both, address and token, from the same endpoint information"
            )
        self.welcomed = True


class Bounded(Generic[K, V]):
    """A table that forgets what was not used for longest."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._entries: OrderedDict[K, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        value = self._entries.get(key)
        if value is not None:
            self._entries.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> tuple[K, V] | None:
        """Add an entry; return the one that had to make room for it."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        return self._entries.popitem(last=False) if len(self._entries) > self._capacity else None

    def pop(self, key: K) -> V | None:
        return self._entries.pop(key, None)

    def items(self) -> list[tuple[K, V]]:
        """Return all entries, the one that was not used for longest first."""
        return list(self._entries.items())

    def oldest(self) -> tuple[K, V] | None:
        """Return the entry that was not used for longest."""
        return next(iter(self._entries.items()), None)


class _Stranger(NamedTuple):
    client_id: str
    attempt: bytes
    proof: bytes  # the one that opens


class Gate:
    """The server's side of all connections: which identity is which client, and who failed."""

    def __init__(self, token: bytes, *, known: int = 1 << 16, strangers: int = 1 << 10) -> None:
        self._token = token
        self._clients: Bounded[Hashable, str] = Bounded(known)
        self._strangers: Bounded[Hashable, _Stranger] = Bounded(strangers)
        self.presence = Presence()
        self.auth_failures = 0

    def client_of(self, identity: Hashable) -> str | None:
        """Return the client id if this identity has proved the token."""
        return self._clients.get(identity)

    def receive(self, identity: Hashable, frames: Sequence[bytes]) -> bytes:
        """Return the answer to the first frame of an identity that is not welcome yet, or starts over."""
        frame = frames[0]
        kind = frame[0] if len(frames) == 1 and frame else None
        if kind == Kind.HELLO:
            return self._challenge(identity, frame)
        stranger = self._strangers.pop(identity) if kind == Kind.PROOF else None
        if stranger is None:
            return signal(Kind.WHO)
        if not hmac.compare_digest(frame[1:], stranger.proof):
            self.auth_failures += 1
            return _VERDICT.pack(Kind.REFUSED, stranger.attempt)
        evicted = self._clients.put(identity, stranger.client_id)
        if evicted is not None:
            self.presence.overlook(evicted[1], evicted[0])
        self.presence.come(stranger.client_id, identity)
        return _VERDICT.pack(Kind.WELCOME, stranger.attempt)

    def forget(self, identity: Hashable, pid: int = 0) -> None:
        """The connection ended, or starts over. `pid`: of the process behind it, where that is known."""
        client_id = self._clients.pop(identity)
        if client_id is not None:
            self.presence.leave(client_id, identity, pid)
        self._strangers.pop(identity)

    def _challenge(self, identity: Hashable, frame: bytes) -> bytes:
        self.forget(identity)
        if len(frame) < _HELLO.size:
            return signal(Kind.WHO)
        _, magic, version, attempt = _HELLO.unpack_from(frame)
        if magic != _MAGIC or version != PROTOCOL_VERSION:
            return _MISMATCH.pack(Kind.MISMATCH, PROTOCOL_VERSION)
        client_id = frame[_HELLO.size :]
        if len(client_id) > MAX_CLIENT_ID_BYTES or not _is_text(client_id):
            return _VERDICT.pack(Kind.REFUSED, attempt)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        right = _sign(self._token, _CLIENT_LABEL, attempt, nonce, client_id)
        self._strangers.put(identity, _Stranger(client_id.decode(), attempt, right))
        proof = _sign(self._token, _SERVER_LABEL, attempt, nonce, client_id)
        return _CHALLENGE.pack(Kind.CHALLENGE, attempt, nonce, proof)


def _sign(token: bytes, label: bytes, client_nonce: bytes, server_nonce: bytes, client_id: bytes) -> bytes:
    return hmac.digest(token, label + client_nonce + server_nonce + client_id, hashlib.sha256)


def _unpack(form: struct.Struct, frame: bytes) -> tuple[Any, ...]:
    if len(frame) != form.size:
        raise DecodeError(f"a frame of kind {frame[:1]!r} has {len(frame)} bytes, not {form.size}")
    return form.unpack(frame)


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
