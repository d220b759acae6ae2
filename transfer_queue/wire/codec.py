"""Messages as frames, and back.

    frame 0    header: kind "M" · message code · request id (0: one-way) · lowest id the sender still waits for
    frame 1    body: the fields in the order of the dataclass, encoded like any other value (`wire.values`)
    frame 2…   the buffers of a field of type `Frames`; the body holds their number

Both directions are compiled once per message type from its annotations. Decoding trusts nothing: each field has its
declared type afterwards, or a `DecodeError` names message and field. int64 arrays are views of the received bytes
and read-only. Tuples of small descriptions (columns, units) are encoded apart, because the same few come again and
again: their bytes are the key of a cache.
"""

from __future__ import annotations

import functools
import math
import operator
import struct
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from transfer_queue.errors import DecodeError, EncodeError
from transfer_queue.messages import MESSAGE_TYPES
from transfer_queue.wire.nesting import all_encodable, check_entries, encodable
from transfer_queue.wire.values import Packing, Unpacking, pack_int64s, pack_value, unpack_value

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_MESSAGE_BYTES",
    "Header",
    "decode",
    "encode_message",
    "frame_bytes",
    "pack_value",
    "read_header",
    "unpack_value",
]

MAX_FRAME_BYTES = 1 << 28
MAX_FRAMES = 1 << 14
MAX_MESSAGE_BYTES = 1 << 30
MESSAGE = ord("M")

_HEADER = struct.Struct("<BHQQ")
_CODES = {cls: code for code, cls in MESSAGE_TYPES.items()}
_INT64 = np.dtype(np.int64)
_LOWEST, _HIGHEST = -(1 << 63), (1 << 63) - 1
_MOST_SEEN = 256  # combinations of types remembered per message type
_CACHED_BYTES = 4096
_Convert: TypeAlias = Callable[[Any], Any]


class Header(NamedTuple):
    """`floor`: the sender waits for no id below this one any more."""

    code: int
    request_id: int
    floor: int


class _Mismatch(Exception):
    """A field does not have its declared type; the text says what it is instead."""


class _Plan(NamedTuple):
    """How one message type is encoded and decoded."""

    cls: type[Any]
    names: tuple[str, ...]
    values: Callable[[Any], Sequence[Any]]
    encode: tuple[tuple[int, _Convert], ...]  # fields that are not sent as they are
    frames: int | None  # position of the field that travels out of band
    kinds: tuple[frozenset[type] | None, ...]  # what may arrive for each field; None: anything
    seen: set[tuple[type, ...]]  # combinations of types that fit `kinds`
    integers: tuple[int, ...]
    decode: tuple[tuple[int, _Convert], ...]  # fields whose value must be looked into
    slots: tuple[Callable[[Any, Any], None], ...]  # set one field of a new message


# ---------------------------------------------------------------- the two directions


def encode_message(message: Any, request_id: int = 0, floor: int = 0) -> list[Any]:
    """Return the frames of a message. Raises `EncodeError` for values that cannot be sent or frames over 256 MiB."""
    cls = type(message)
    plan = _plan(cls)
    values = list(plan.values(message))
    frames: Sequence[Any] = ()
    if plan.frames is not None:
        frames = values[plan.frames]
        values[plan.frames] = len(frames)
        if len(frames) > MAX_FRAMES or any(frame_bytes(frame) > MAX_FRAME_BYTES for frame in frames):
            limits = f"{MAX_FRAMES} frames of {MAX_FRAME_BYTES} bytes"
            raise EncodeError(f"{cls.__name__} has {len(frames)} frames, and the limit is {limits}: send it in parts")
    for position, convert in plan.encode:
        values[position] = convert(values[position])
    packing = Packing(allow_tensors=False)
    body = packing.join(packing.pack(values))
    total = len(body) + sum(map(frame_bytes, frames))
    if len(body) > MAX_FRAME_BYTES or total > MAX_MESSAGE_BYTES:
        limits = f"{MAX_FRAME_BYTES} and {MAX_MESSAGE_BYTES}"
        raise EncodeError(
            f"{cls.__name__} takes {len(body)} bytes beside its frames and {total} in all; the limits are {limits}: "
            "send fewer rows at once"
        )
    return [_HEADER.pack(MESSAGE, _CODES[cls], request_id, floor), body, *frames]


def read_header(frame: Any) -> Header:
    """Read frame 0 of a message alone, so that a message that cannot be decoded can still be answered."""
    if len(frame) != _HEADER.size or frame[0] != MESSAGE:
        raise DecodeError(f"the header of a message cannot be {bytes(frame[:40])!r} ({len(frame)} bytes)")
    _, code, request_id, floor = _HEADER.unpack(frame)
    return Header(code, request_id, floor)


def decode(frames: Sequence[Any], header: Header | None = None) -> tuple[int, Any]:
    """Return (request id, message). `header`: what `read_header` found in frame 0, if that was read before."""
    header = header or read_header(frames[0])
    cls = MESSAGE_TYPES.get(header.code)
    if cls is None:
        raise DecodeError(f"no message type has the code {header.code}; do both sides run the same version?")
    plan = _plan(cls)
    if len(frames) < 2 or (plan.frames is None and len(frames) > 2):
        raise DecodeError(f"{cls.__name__} came in {len(frames)} frames")
    unpacking = Unpacking(allow_tensors=False)
    values = unpacking.unpack(unpacking.split(frames[1]))
    unpacking.finish()
    if type(values) is list and plan.frames is not None and len(values) == len(plan.names):
        claimed = values[plan.frames]
        if type(claimed) is not int or claimed != len(frames) - 2:
            raise DecodeError(f"{cls.__name__} claims {claimed!r:.40} further frames and has {len(frames) - 2}")
        values[plan.frames] = tuple(frames[2:])
    return header.request_id, _build(plan, values)


def _build(plan: _Plan, values: Any) -> Any:
    """Check the fields, convert them in place and make the message."""
    if type(values) is not list or len(values) != len(plan.names):
        found = f"{len(values)} fields" if type(values) is list else type(values).__name__
        raise DecodeError(f"{_fields(plan)}, the message has {found}")
    kinds = tuple(map(type, values))
    if kinds not in plan.seen:
        _check_kinds(plan, kinds)
    position = 0
    try:
        for position in plan.integers:
            if values[position] is not None and not _LOWEST <= values[position] <= _HIGHEST:
                raise _Mismatch("an int of 64 bits")
        for position, convert in plan.decode:
            values[position] = convert(values[position])
    except _Mismatch as error:
        raise _wrong_field(plan, position, str(error)) from None
    made = object.__new__(plan.cls)
    for set_field, value in zip(plan.slots, values, strict=True):
        set_field(made, value)
    return made


def _check_kinds(plan: _Plan, kinds: tuple[type, ...]) -> None:
    for position, (kind, allowed) in enumerate(zip(kinds, plan.kinds, strict=True)):
        if allowed is not None and kind not in allowed:
            raise _wrong_field(plan, position, f"a {kind.__name__}, but one of: {_names(allowed)}")
    if len(plan.seen) < _MOST_SEEN:
        plan.seen.add(kinds)


def _wrong_field(plan: _Plan, position: int, text: str) -> DecodeError:
    name = plan.names[position]
    return DecodeError(f"{plan.cls.__name__}.{name} is not as declared: {text}", field=name)


def _fields(plan: _Plan) -> str:
    return f"{plan.cls.__name__} has {len(plan.names)} fields ({', '.join(plan.names)})"


def frame_bytes(buffer: Any) -> int:
    """Return the size of a frame in bytes."""
    return buffer.nbytes if isinstance(buffer, memoryview) else len(buffer)


# ---------------------------------------------------------------- plans


_PLANS: dict[type[Any], _Plan] = {}


def _plan(cls: type[Any]) -> _Plan:
    plan = _PLANS.get(cls)
    if plan is None:
        plan = _PLANS[cls] = _compile(cls)
    return plan


def _compile(cls: type[Any]) -> _Plan:
    if cls not in _CODES:
        raise EncodeError(f"{cls.__name__} is not a message type")
    hints = typing.get_type_hints(cls)
    names = tuple(hints)
    numbered = list(enumerate(hints.values()))
    return _Plan(
        cls=cls,
        names=names,
        values=_getter(names),
        encode=tuple((i, convert) for i, hint in numbered if (convert := _encoder(hint)) is not None),
        frames=next((i for i, hint in numbered if _is_frames(hint)), None),
        kinds=tuple(_kinds_of(hint) for hint in hints.values()),
        seen=set(),
        integers=tuple(i for i, hint in numbered if int in _members(hint) and str not in _members(hint)),
        decode=tuple((i, convert) for i, hint in numbered if (convert := _decoder(hint)) is not None),
        slots=tuple(getattr(cls, name).__set__ for name in names),
    )


def _getter(names: tuple[str, ...]) -> Callable[[Any], Sequence[Any]]:
    if len(names) >= 2:
        return typing.cast("Callable[[Any], Sequence[Any]]", operator.attrgetter(*names))
    return lambda message: [getattr(message, name) for name in names]


def _is_frames(hint: Any) -> bool:
    return typing.get_origin(hint) is tuple and typing.get_args(hint) == (Any, ...)


def _is_description(hint: Any) -> bool:
    """Tell a message type that consists of names and numbers only."""
    if hint not in _CODES:
        return False
    plain = {str, int, float, bool, type(None), tuple[int, ...], tuple[str, ...]}
    return all(plain.issuperset(_members(field)) for field in typing.get_type_hints(hint).values())


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint alone."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


# ---------------------------------------------------------------- encoding one field


def _encoder(hint: Any) -> _Convert | None:
    """Return what turns a field into something the packer knows; None if it is sent as it is."""
    for member in _members(hint):
        origin = typing.get_origin(member)
        if member in _CODES:
            return lambda value: None if value is None else _nested_values(value)
        if origin is dict:
            return lambda value: None if value is None else encodable(value)
        if origin is np.ndarray:
            return _encode_int64s
        if origin is tuple and not _is_frames(member):
            if _is_description(typing.get_args(member)[0]):
                return _encode_descriptions
            if any(typing.get_origin(each) is dict for each in _members(typing.get_args(member)[0])):
                return lambda value: None if value is None else all_encodable(value)
            inner = _encoder(typing.get_args(member)[0])
            if inner is None:
                return lambda value: None if value is None else list(value)
            return lambda value: None if value is None else [inner(item) for item in value]
    return None


def _nested_values(message: Any) -> list[Any]:
    plan = _plan(type(message))
    values = list(plan.values(message))
    for position, convert in plan.encode:
        values[position] = convert(values[position])
    return values


@functools.lru_cache(maxsize=1024)
def _encode_descriptions(messages: tuple[Any, ...]) -> bytes:
    return Packing().pack([_nested_values(message) for message in messages])


def _encode_int64s(array: Any) -> Any:
    if array is None:
        return None
    if type(array) is not np.ndarray or array.dtype != _INT64 or array.ndim != 1:
        raise EncodeError(f"expected a one-dimensional int64 array, not {array!r:.100}")
    return pack_int64s(array)


# ---------------------------------------------------------------- decoding one field


def _kinds_of(hint: Any) -> frozenset[type] | None:
    """Return the types with which a field of this annotation leaves the unpacker; None: any."""
    kinds: set[type] = set()
    for member in _members(hint):
        origin = typing.get_origin(member)
        if member is Any:
            return None
        if _is_frames(member):
            kinds.add(tuple)
        elif origin is tuple or member in _CODES:
            kinds.add(bytes if origin is tuple and _is_description(typing.get_args(member)[0]) else list)
        elif member is float:
            kinds |= {float, int}
        else:
            kinds.add(origin or member)
    return frozenset(kinds)


def _decoder(hint: Any) -> _Convert | None:
    """Return what checks and converts a value whose own type fits already; None if there is nothing left to do."""
    members = _members(hint)
    for member in members:
        origin = typing.get_origin(member)
        inner: _Convert | None = None
        if member is float:
            inner = _decode_float
        elif member in _CODES:
            inner = _nested_decoder(member)
        elif origin is np.ndarray:
            inner = _decode_int64s
        elif origin is dict:
            inner = _decode_dict
        elif origin is tuple and not _is_frames(member):
            element = typing.get_args(member)[0]
            inner = _descriptions_decoder(element) if _is_description(element) else _tuple_decoder(element)
        if inner is not None:
            return _optional(inner) if type(None) in members else inner
    return None


def _optional(inner: _Convert) -> _Convert:
    return lambda value: None if value is None else inner(value)


def _nested_decoder(cls: type[Any]) -> _Convert:
    plan = _plan(cls)
    return lambda values: _build(plan, values)


def _decode_float(value: float) -> float:
    try:
        if not math.isnan(value):  # it would break the order of deadlines
            return float(value)
    except OverflowError:
        raise _Mismatch("a number beyond the range of float") from None
    raise _Mismatch("not a number")


def _decode_int64s(array: Any) -> Any:
    if array.dtype != _INT64 or array.ndim != 1:
        raise _Mismatch(f"an array of {array.ndim} dimensions and type {array.dtype}, not an int64 array")
    return array


def _decode_dict(entries: Any) -> Any:
    _check_entries((entries,))
    return entries


def _check_entries(dicts: Iterable[dict[Any, Any]]) -> None:
    try:
        check_entries(dicts)
    except ValueError as error:
        raise _Mismatch(str(error)) from None


def _tuple_decoder(hint: Any) -> _Convert:
    """Decode a list of values of one annotation to a tuple."""
    allowed, inner = _kinds_of(hint), _decoder(hint)
    assert allowed is not None, f"tuple of {hint}"
    if dict in allowed:
        inner = None

    def convert(items: Any) -> tuple[Any, ...]:
        if not allowed.issuperset(map(type, items)):
            raise _Mismatch(f"a tuple with elements other than {_names(allowed)}")
        if dict in allowed:
            _check_entries(filter(None, items))
        return tuple(items) if inner is None else tuple(map(inner, items))

    return convert


def _descriptions_decoder(cls: type[Any]) -> _Convert:
    inner = _tuple_decoder(cls)

    def convert(data: bytes) -> Any:
        items = Unpacking(allow_tensors=False).unpack(data)
        if type(items) is not list:
            raise _Mismatch(f"a {type(items).__name__} instead of a list")
        return inner(items)

    cached = functools.lru_cache(maxsize=1024)(convert)
    return lambda data: cached(data) if len(data) <= _CACHED_BYTES else convert(data)


def _names(kinds: Iterable[type]) -> str:
    return ", ".join(sorted("None" if kind is type(None) else kind.__name__ for kind in kinds))
