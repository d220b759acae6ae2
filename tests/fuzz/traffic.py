"""Frames to send: well-formed ones of every message type with random values, and what becomes of them.

Everything comes from one `random.Random`, so that a seed and a count name the same frames each time.
"""

from __future__ import annotations

import struct
import types
import typing
from random import Random
from typing import Any

import numpy as np

from transfer_queue.errors import EncodeError
from transfer_queue.messages import MESSAGE_TYPES
from transfer_queue.wire.codec import encode_message

Frames = list[bytes]

REQUESTS = [cls for code, cls in sorted(MESSAGE_TYPES.items()) if 10 <= code < 60]
SENT = [cls for code, cls in sorted(MESSAGE_TYPES.items()) if 10 <= code < 100]

_INTS = (0, 1, -1, 2, 3, 7, 64, 255, 65536, 2**31 - 1, 2**31, 2**40, 2**48 + 65537, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, 0.01, 1.0, -1.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    "p",
    "q",
    "t",
    "x",
    "y",
    "",
    "é",
    "\udc80",
    "a" * 300,
    "step_1",
    "SequentialSampler",
    "float32",
    "dense",
    "../x",
)
_OTHERS = (None, True, -7, 2.5, "text", b"bytes", (1, (2,)), [1, [2, [3]]], {"a": {"b": 1}}, {1, 2}, 2**70, 1 + 2j)


def canary_pickle(path: str) -> bytes:
    """Return a pickle that makes the file `path` when it is loaded, as smuggled code would."""
    return b"cos\nopen\n(S" + repr(path).encode() + b"\nI66\nI384\ntR."


class Traffic:
    """Makes messages and breaks them."""

    def __init__(self, random: Random, canary: str) -> None:
        self.random = random
        self._pickle = canary_pickle(canary)
        self._hints = {cls: typing.get_type_hints(cls) for cls in MESSAGE_TYPES.values()}
        self._recorded: list[Frames] = []

    # ------------------------------------------------------------ well-formed

    def message(self, cls: type[Any]) -> Any:
        """Return a message with a random value in every field."""
        return cls(**{name: self._value(hint) for name, hint in self._hints[cls].items()})

    def encoded(self, request_id: int) -> Frames:
        """Return the frames of a message of any type; numbers of rows stay small enough to be served."""
        while True:
            cls = self.random.choice(SENT)
            try:
                message = self.message(cls)
                frames = encode_message(message, request_id, self.random.choice((0, 1, request_id)))
            except EncodeError:
                continue
            return [bytes(frame) for frame in frames]

    def _value(self, hint: Any) -> Any:
        random = self.random
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            return self._value(random.choice(arguments))
        if origin is np.ndarray:
            return self._array()
        if origin is tuple and arguments[0] is Any:
            return tuple(random.randbytes(random.randrange(40)) for _ in range(random.randrange(3)))
        if origin is tuple:
            return tuple(self._value(arguments[0]) for _ in range(random.randrange(4)))
        if origin is dict:
            return {random.choice(_TEXTS): self._plain() for _ in range(random.randrange(3))}
        if hint in self._hints:
            return self.message(hint)
        simple: dict[Any, Any] = {
            int: lambda: random.choice(_INTS) if random.random() < 0.5 else random.randrange(5),
            float: lambda: random.choice(_FLOATS[:-1]) if random.random() < 0.2 else random.random() / 10,
            str: lambda: random.choice(_TEXTS),
            bool: lambda: random.random() < 0.5,
            type(None): lambda: None,
        }
        return simple[hint]()

    def _array(self) -> Any:
        random, length = self.random, self.random.choice((0, 1, 2, 3, 300))
        first = random.choice(_INTS) if random.random() < 0.3 else random.randrange(50)
        with np.errstate(over="ignore"):
            return np.int64(first) + np.arange(length) * np.int64(random.choice((0, 1, 1, 1, -1, 2**40)))

    def _plain(self) -> Any:
        return self._pickle if self.random.random() < 0.1 else self.random.choice(_OTHERS)

    # ------------------------------------------------------------ broken

    def broken(self, request_id: int) -> Frames:
        """Return frames that may be anything: traffic as it is or changed in some way, or random bytes."""
        random = self.random
        if random.random() < 0.2:
            return self.encoded(request_id)
        if random.random() < 0.1:
            return [random.randbytes(random.choice((0, 1, 19, 40, 300))) for _ in range(random.choice((1, 1, 2, 3, 9)))]
        if len(self._recorded) < 500 or random.random() < 0.1:
            self._recorded.append(self.encoded(request_id))
        frames = list(random.choice(self._recorded))
        if random.random() < 0.8:
            frames[0] = frames[0][:3] + struct.pack("<Q", request_id) + frames[0][11:]
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            random.choice(_MUTATIONS)(self, frames)
        if len(self._recorded) > 2000:
            del self._recorded[: len(self._recorded) // 2]
        return frames or [b""]

    def _flip(self, frames: Frames) -> None:
        at = self.random.randrange(len(frames))
        if frames[at]:
            data = bytearray(frames[at])
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            frames[at] = bytes(data)

    def _overwrite(self, frames: Frames) -> None:
        """Put in a byte that starts something, or a length that lies."""
        at = self.random.randrange(len(frames))
        data = bytearray(frames[at])
        begin = self.random.randrange(len(data) + 1)
        lie = self.random.choice(
            (b"\xdd\xff\xff\xff\xff", b"\xc6\x7f\xff\xff\xff", b"\xc9\0\0\1\0\x0c", b"\xc1", b"\x91" * 9)
        )
        data[begin : begin + len(lie)] = lie
        frames[at] = bytes(data)

    def _cut(self, frames: Frames) -> None:
        at = self.random.randrange(len(frames))
        frames[at] = frames[at][: self.random.randrange(len(frames[at]) + 1)]

    def _splice(self, frames: Frames) -> None:
        at, other = self.random.randrange(len(frames)), self.random.choice(self.random.choice(self._recorded))
        begin = self.random.randrange(len(frames[at]) + 1)
        frames[at] = frames[at][:begin] + other[self.random.randrange(len(other) + 1) :]

    def _smuggle(self, frames: Frames) -> None:
        """Put in a pickle where an extension type of MessagePack may stand."""
        at = self.random.randrange(len(frames))
        begin = self.random.randrange(len(frames[at]) + 1)
        extension = b"\xc7" + bytes((len(self._pickle) & 255, 11)) + self._pickle
        frames[at] = frames[at][:begin] + extension + frames[at][begin:]

    def _range(self, frames: Frames) -> None:
        """Put in a range of many elements."""
        first, step, count = (self.random.choice(_INTS) for _ in range(3))
        at = self.random.randrange(len(frames))
        begin = self.random.randrange(len(frames[at]) + 1)
        frames[at] = frames[at][:begin] + b"\xc7\x18\x0c" + struct.pack("<qqq", first, step, count) + frames[at][begin:]

    def _deep(self, frames: Frames) -> None:
        at = self.random.randrange(len(frames))
        begin = self.random.randrange(len(frames[at]) + 1)
        frames[at] = frames[at][:begin] + b"\x91" * self.random.choice((30, 400, 2000)) + frames[at][begin:]

    def _code(self, frames: Frames) -> None:
        code = self.random.choice((self.random.randrange(1 << 16), *MESSAGE_TYPES))
        frames[0] = frames[0][:1] + struct.pack("<H", code) + frames[0][3:]

    def _kind(self, frames: Frames) -> None:
        frames[0] = bytes((self.random.choice(b"HCVPWR?MKAI"),)) + frames[0][1:]

    def _reorder(self, frames: Frames) -> None:
        self.random.shuffle(frames)

    def _duplicate(self, frames: Frames) -> None:
        frames.insert(self.random.randrange(len(frames) + 1), self.random.choice(frames))

    def _drop(self, frames: Frames) -> None:
        del frames[self.random.randrange(len(frames))]
        if not frames:
            frames.append(b"")


_MUTATIONS = (
    *(Traffic._flip, Traffic._flip, Traffic._flip, Traffic._overwrite, Traffic._overwrite, Traffic._cut),
    *(Traffic._splice, Traffic._smuggle, Traffic._range, Traffic._deep, Traffic._code, Traffic._kind),
    *(Traffic._reorder, Traffic._duplicate, Traffic._drop),
)


def as_stream(frames: Frames, random: Random) -> bytes:
    """Return the bytes of a message on a Unix socket, sometimes with lengths that lie."""
    counts = [len(frames), *map(len, frames)]
    if random.random() < 0.02:
        counts[random.randrange(len(counts))] = random.choice((0, 1, 1 << 16, 1 << 20, 1 << 28, (1 << 32) - 1))
    return struct.pack(f"<{len(counts)}I", *counts) + b"".join(frames)


def as_zmtp(frames: Frames, random: Random) -> bytes:
    """Return the bytes of a message on a connection of ZeroMQ, sometimes with lengths or flags that lie."""
    data = bytearray()
    for number, frame in enumerate(frames):
        flags, size = (number < len(frames) - 1) | 2, len(frame)
        if random.random() < 0.02:
            flags, size = random.randrange(256), random.choice((0, 1 << 20, 1 << 28, 1 << 40, (1 << 64) - 1))
        data += struct.pack("!BQ", flags, size) + frame
    return bytes(data)
