"""The errors: what they are caught as, what they carry, and that they cross processes as themselves."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from transfer_queue import errors
from transfer_queue.errors import RemoteError, TransferQueueError, from_wire, nearest, to_wire
from transfer_queue.messages import ErrorReply
from transfer_queue.wire.codec import decode, encode_message

CLASSES = sorted(
    (cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, TransferQueueError)),
    key=lambda cls: cls.__name__,
)
BUILTINS = {
    "TransferQueueError": RuntimeError,
    "InvalidArgument": ValueError,
    "WrongType": TypeError,
    "NotInitialized": AssertionError,
    "UnknownName": (LookupError, ValueError),
    "KeyNotFound": (KeyError, ValueError),
    "DeadlineExceeded": TimeoutError,
    "GetMetaTimeout": TimeoutError,
    "PartitionSealed": ValueError,
    "CapacityExceeded": RuntimeError,
    "InsufficientSamples": ValueError,
    "SamplerError": RuntimeError,
    "StaleSampleError": KeyError,
    "LeaseExpired": RuntimeError,
    "BlockLost": RuntimeError,
    "EncodeError": RuntimeError,
    "DecodeError": RuntimeError,
    "ConnectionLost": ConnectionError,
    "NotAuthorized": PermissionError,
    "ProtocolMismatch": RuntimeError,
    "JournalDamaged": ValueError,
    "JournalUnavailable": OSError,
    "RemoteError": RuntimeError,
}


def across_the_wire(error: BaseException) -> TransferQueueError:
    name, message, details = to_wire(error)
    reply = decode(encode_message(ErrorReply(name=name, message=message, details=details), 1))[1]
    return from_wire(reply.name, reply.message, reply.details)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_crosses_the_wire_as_itself(cls: type[TransferQueueError]) -> None:
    """Class, message and details arrive unchanged."""
    error = across_the_wire(cls("8 of 9 gone, 'é'", indexes=[1, 2], who=("a", None), message="x", self=1))
    assert type(error) is cls
    assert str(error) == "8 of 9 gone, 'é'"
    assert error.details == {"indexes": [1, 2], "who": ("a", None), "message": "x", "self": 1}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_is_what_a_caller_would_catch(cls: type[TransferQueueError]) -> None:
    """Each class is also the built-in exception of its kind."""
    expected: Any = BUILTINS[cls.__name__]
    for builtin in expected if isinstance(expected, tuple) else (expected,):
        with pytest.raises(builtin):
            raise cls("text")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_can_be_pickled(cls: type[TransferQueueError]) -> None:
    """Ray and multiprocessing bring errors back as themselves."""
    back = pickle.loads(pickle.dumps(cls("text", number=3)))
    assert type(back) is cls
    assert (str(back), back.details) == ("text", {"number": 3})


def test_a_foreign_error_arrives_with_type_and_traceback() -> None:
    """A bug on the other side is a `RemoteError` that says where it happened."""
    try:
        [].pop()
    except IndexError as bug:
        error = across_the_wire(bug)
    assert type(error) is RemoteError
    assert "IndexError" in str(error)
    assert "pop from empty list" in str(error)
    assert "test_errors.py" in str(error)


def test_an_unknown_class_arrives_as_remote_error() -> None:
    """A newer version's error keeps its message."""
    error = from_wire("ErrorOfTomorrow", "text", {})
    assert type(error) is RemoteError
    assert str(error) == "text"


def test_a_missed_name_shows_the_choices_and_the_nearest() -> None:
    """The end of the sentence lists what is known."""
    assert nearest("promt", ["prompt", "reward"]) == " (known: prompt, reward; did you mean 'prompt'?)"
    assert nearest("zzz", ["prompt"]) == " (known: prompt)"
    assert nearest("x", []) == " (none is known yet)"
