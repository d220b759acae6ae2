"""Every error this library raises on purpose.

    TransferQueueError (RuntimeError)
    ├── InvalidArgument (ValueError)        the call is wrong, whatever the state
    ├── WrongType (TypeError)               an argument of the wrong type
    ├── NotInitialized (AssertionError)     init or attach first
    ├── UnknownName (LookupError, ValueError)  no such field, sampler, backend or key; lists the known ones
    │   └── KeyNotFound (KeyError)          no sample has this key
    ├── DeadlineExceeded (TimeoutError)     a request, attach or start took too long; says of what
    │   └── GetMetaTimeout                  not enough samples became ready in time; says what is missing
    ├── PartitionSealed (ValueError)        new samples for a partition whose last ones were put
    ├── CapacityExceeded                    limits of samples or bytes; says by how much
    ├── InsufficientSamples (ValueError)    a sampler cannot serve from what is ready
    ├── SamplerError                        a sampler raised or returned rows it may not hand out
    ├── StaleSampleError (KeyError)         the handle is older than a clear
    ├── LeaseExpired                        acknowledged or written too late
    ├── BlockLost                           a put whose bytes the storage unit does not have any more
    ├── EncodeError                         a value that cannot be stored; names field, row and type
    ├── DecodeError                         bytes that are not what they should be
    ├── ConnectionLost (ConnectionError)    the peer is gone or this end was closed
    ├── NotAuthorized (PermissionError)     wrong or missing token
    ├── ProtocolMismatch                    versions or frames do not fit
    ├── JournalDamaged (ValueError)         a journal is not what was written; says where and what is still good
    ├── JournalUnavailable (OSError)        another process has the journal, it is closed, or its disk failed
    └── RemoteError                         a bug on the other side, with its type and traceback

Each class is also the built-in exception a caller would naturally catch, and each one crosses the
wire and comes back as itself (`to_wire`, `from_wire`).
"""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Iterable
from typing import Any


class TransferQueueError(RuntimeError):
    """Base of all errors of this library. `details` holds plain values for programs, the message is for people."""

    details: dict[str, Any]

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else ""

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[TransferQueueError], message: str, details: dict[str, Any]) -> TransferQueueError:
    return cls(message, **details)


class InvalidArgument(TransferQueueError, ValueError):
    """The call is wrong, whatever the state."""


class WrongType(TransferQueueError, TypeError):
    """An argument of the wrong type."""


class NotInitialized(TransferQueueError, AssertionError):
    """No session in this process: `transfer_queue.init()` first."""


class UnknownName(TransferQueueError, LookupError, ValueError):
    """A name that nothing answers to. The message lists the known ones and the nearest."""


class KeyNotFound(UnknownName, KeyError):
    """No sample of the partition has this key. `details["keys"]` lists those that are missing."""


class DeadlineExceeded(TransferQueueError, TimeoutError):
    """A request, attach or start took longer than its deadline."""


class GetMetaTimeout(DeadlineExceeded):
    """Not enough samples became ready in time; the message says what is missing."""


class PartitionSealed(TransferQueueError, ValueError):
    """The last samples of the partition were put; it takes no new ones."""


class CapacityExceeded(TransferQueueError):
    """A limit of samples or bytes is in the way; the message says by how much."""


class InsufficientSamples(TransferQueueError, ValueError):
    """A sampler cannot serve the request from the samples that are ready now."""


class SamplerError(TransferQueueError):
    """A sampler raised, or returned rows that it may not hand out."""


class StaleSampleError(TransferQueueError, KeyError):
    """The samples named by a handle were cleared. `details["indexes"]` lists them."""


class LeaseExpired(TransferQueueError):
    """The lease ended before the call; nothing was written."""


class BlockLost(TransferQueueError):
    """The storage unit does not have the bytes of this put any more; nothing was changed: put again."""


class EncodeError(TransferQueueError):
    """A value that cannot be stored or sent; the message names field, row and type."""


class DecodeError(TransferQueueError):
    """Bytes that do not have the form they should have."""


class ConnectionLost(TransferQueueError, ConnectionError):
    """The peer is gone, or this end was closed. `details["request_id"]` names the request whose outcome is open."""


class NotAuthorized(TransferQueueError, PermissionError):
    """The session's token is wrong or missing."""


class ProtocolMismatch(TransferQueueError):
    """The two ends do not speak the same protocol version."""


class JournalDamaged(TransferQueueError, ValueError):
    """The files of a journal are not what was written; nothing was changed.

    `details`: "file", "offset", "records" (how many before it are good) and "sequence" (the number of the last one).
    """


class JournalUnavailable(TransferQueueError, OSError):
    """The journal cannot be used: another process has it open, it is closed, or its disk failed."""


class RemoteError(TransferQueueError):
    """A bug on the other side; the message carries its type and traceback."""


_BY_NAME: dict[str, type[TransferQueueError]] = {
    cls.__name__: cls
    for cls in list(globals().values())
    if isinstance(cls, type) and issubclass(cls, TransferQueueError)
}


def to_wire(error: BaseException) -> tuple[str, str, dict[str, Any]]:
    """Return (class name, message, details); an error that is not ours becomes a `RemoteError` with its traceback."""
    if isinstance(error, TransferQueueError):
        return type(error).__name__, error.message, error.details
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    return "RemoteError", f"{type(error).__name__} on the other side: {error}\n{text}", {}


def from_wire(name: str, message: str, details: dict[str, Any]) -> TransferQueueError:
    """Rebuild the error that `to_wire` described."""
    return _BY_NAME.get(name, RemoteError)(message, **details)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the choices and the nearest one: " (known: a, b; did you mean 'a'?)"."""
    names = sorted(set(known))
    if not names:
        return " (none is known yet)"
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    match = difflib.get_close_matches(name, names, n=1)
    return f" (known: {shown}; did you mean {match[0]!r}?)" if match else f" (known: {shown})"
