"""Messages as frames and back: typed, bounded decoding of every message type."""

from __future__ import annotations

import contextlib
import dataclasses
import tracemalloc
import types
import typing
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.errors import DecodeError, EncodeError
from transfer_queue.messages import (
    MESSAGE_TYPES,
    ColumnSpec,
    Done,
    Drawn,
    GetAudit,
    ListPartitions,
    Location,
    Report,
    SetTags,
    Write,
)
from transfer_queue.wire.codec import decode, encode_message, read_header
from transfer_queue.wire.values import BIG_INT, INT64S, SET

ALL = sorted(MESSAGE_TYPES.values(), key=lambda cls: cls.__name__)
FIELDS = [(cls, field.name) for cls in ALL for field in dataclasses.fields(cls)]

int64 = st.integers(-(2**63), 2**63 - 1)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Return what a field of this annotation may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([values_of(argument) for argument in arguments])
    if origin is np.ndarray:
        return st.lists(int64, max_size=5).map(lambda numbers: np.array(numbers, np.int64))
    if origin is tuple:
        inner = st.binary(max_size=20) if arguments[0] is Any else values_of(arguments[0])
        return st.lists(inner, max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(st.text(), plain, max_size=3)
    if hint in MESSAGE_TYPES.values():
        return messages_of(hint)
    simple = {int: int64, float: st.floats(allow_nan=False), str: st.text(), bytes: st.binary(), bool: st.booleans()}
    return st.none() if hint is type(None) else simple[hint]


def messages_of(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls)
    return st.builds(cls, **{name: values_of(hint) for name, hint in hints.items()})


def sample(cls: type[Any]) -> Any:
    """Return one message with something in every field."""
    return cls(**{name: one_of(hint) for name, hint in typing.get_type_hints(cls).items()})


def one_of(hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return one_of(arguments[0])
    if origin is np.ndarray:
        return np.arange(2)
    if origin is tuple:
        return (b"bytes",) if arguments[0] is Any else (one_of(arguments[0]),)
    if origin is dict:
        return {"key": (1, [2.5, None])}
    if hint in MESSAGE_TYPES.values():
        return sample(hint)
    return {int: 7, float: 1.5, str: "text", bytes: b"bytes", bool: True}[hint]


def same(left: Any, right: Any) -> bool:
    if dataclasses.is_dataclass(left):
        return type(left) is type(right) and all(
            same(getattr(left, field.name), getattr(right, field.name)) for field in dataclasses.fields(left)
        )
    if isinstance(left, np.ndarray):
        return isinstance(right, np.ndarray) and left.dtype == right.dtype and left.tolist() == right.tolist()
    if isinstance(left, tuple | list):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return (
            isinstance(right, dict) and list(left) == list(right) and all(same(left[key], right[key]) for key in left)
        )
    return type(left) is type(right) and bool(left == right)


@given(st.sampled_from(ALL).flatmap(messages_of), st.integers(0, 2**64 - 1))
def test_every_message_comes_back_identical(message: Any, request_id: int) -> None:
    """All fields keep value and type: tuples, arrays, nested messages, free dicts and buffers."""
    back_id, back = decode(encode_message(message, request_id))
    assert back_id == request_id
    assert same(back, message)


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_a_missing_field_is_named(cls: type[Any], name: str) -> None:
    """A message with one field less is refused with its name and its fields."""
    header, body, *frames = encode_message(sample(cls))
    values = msgpack.unpackb(body)
    del values[[field.name for field in dataclasses.fields(cls)].index(name)]
    with pytest.raises(DecodeError, match=rf"{cls.__name__}.*{name}"):
        decode([header, msgpack.packb(values), *frames])


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda part: getattr(part, "__name__", part))
def test_a_field_of_wrong_type_is_named(cls: type[Any], name: str) -> None:
    """A set fits no field; the error names message and field."""
    position = [field.name for field in dataclasses.fields(cls)].index(name)
    header, body, *frames = encode_message(sample(cls))
    values = msgpack.unpackb(body)
    values[position] = msgpack.ExtType(SET, msgpack.packb([1]))
    with pytest.raises(DecodeError, match=rf"{cls.__name__}.*{name}|{cls.__name__} claims"):
        decode([header, msgpack.packb(values), *frames])


@given(st.sampled_from(ALL), st.data())
def test_damaged_messages_give_a_message_or_a_decode_error(cls: type[Any], data: st.DataObject) -> None:
    """Random changes in any frame never lead to another kind of failure."""
    frames = [bytearray(frame) for frame in encode_message(sample(cls), 5)]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = data.draw(st.sampled_from(frames))
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    damaged = [bytes(frame) for frame in frames[: data.draw(st.integers(1, len(frames)))]]
    with contextlib.suppress(DecodeError):
        decode(damaged)


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=3))
def test_random_frames_give_a_decode_error(frames: list[bytes]) -> None:
    """Frames that nobody encoded are refused."""
    with pytest.raises(DecodeError):
        decode(frames)


def test_number_types_are_exact_where_it_matters() -> None:
    """Neither bool nor float is an int, and ints have 64 bits."""
    header, _ = encode_message(Done(count=1))
    for value in (True, 1.0, 2**63, msgpack.ExtType(BIG_INT, b"\0" * 8 + b"\1")):
        with pytest.raises(DecodeError, match=r"Done\.count"):
            decode([header, msgpack.packb([value])])


def test_seconds_may_be_given_as_int() -> None:
    """`timeout_s=60` arrives as 60.0."""
    cls = next(cls for cls in ALL if cls.__name__ == "ListUnits")
    back = decode(encode_message(cls(timeout_s=60)))[1]
    assert type(back.timeout_s) is float
    assert back.timeout_s == 60.0


@pytest.mark.parametrize("wrong", [np.arange(3, dtype=np.int32), np.zeros((2, 2), np.int64), [1, 2]], ids=repr)
def test_only_flat_int64_arrays_are_sent(wrong: Any) -> None:
    """An array of another type or shape is refused by the sender."""
    with pytest.raises(EncodeError, match="int64"):
        encode_message(SetTags(indexes=wrong, generations=np.arange(3), tags=({},)))


def test_int64_arrays_travel_as_raw_buffers() -> None:
    """64 ids cost 8 bytes each, whatever their size, and arrive read-only or owned."""
    small, large = np.arange(64), np.arange(64) + 2**62
    frames = [encode_message(Location(fields=(), blocks=ids, slots=ids)) for ids in (small, large)]
    assert len(frames[0][1]) == len(frames[1][1]) < 2 * 8 * 64 + 20
    blocks = decode(frames[1])[1].blocks
    assert blocks.tolist() == large.tolist()
    assert not blocks.flags.writeable or blocks.flags.owndata


@pytest.mark.parametrize("size", [1, 7, 9])
def test_int64_arrays_have_whole_elements(size: int) -> None:
    """A buffer whose length is no multiple of 8 is refused."""
    header, _ = encode_message(Location(fields=(), blocks=np.arange(1), slots=np.arange(1)))
    array = msgpack.ExtType(INT64S, b"\0" * size)
    with pytest.raises(DecodeError, match="int64"):
        decode([header, msgpack.packb([[], array, array])])


def test_buffers_travel_out_of_band_and_uncopied() -> None:
    """The frames of a `Write` are the very buffers, and their number is checked."""
    payload = bytearray(100)
    frames = encode_message(Write(span=1, offset=0, frames=(payload, memoryview(payload))))
    assert frames[2] is payload
    with pytest.raises(DecodeError, match="frames"):
        decode(frames[:-1])
    with pytest.raises(DecodeError, match="frames"):
        decode([*frames, b""])
    with pytest.raises(DecodeError, match="frames"):
        decode([*encode_message(ListPartitions()), b""])


def test_tensors_stay_out_of_messages() -> None:
    """The controller never loads torch, so a tensor in a tag is refused by the sender, with what to do."""
    with pytest.raises(EncodeError, match="item"):
        encode_message(SetTags(indexes=np.arange(1), generations=np.arange(1), tags=({"x": torch.tensor(1)},)))


def test_numpy_values_may_be_tags_and_parameters() -> None:
    """Arrays and scalars inside free dicts come back with their types."""
    entries = {"array": np.arange(3, dtype=np.int16), "scalar": np.float32(2), "nested": ({1: "x"},)}
    back = decode(encode_message(Report(entries=entries)))[1].entries
    assert back["array"].dtype == np.int16
    assert type(back["scalar"]) is np.float32
    assert back["nested"] == ({1: "x"},)


@pytest.mark.parametrize("entries", [{1: 2}, {b"x": 1}, {None: 1}], ids=repr)
def test_free_dicts_have_string_keys(entries: Any) -> None:
    """A dict field with other keys is refused by the receiver."""
    header, _ = encode_message(Report(entries={}))
    with pytest.raises(DecodeError, match=r"Report\.entries"):
        decode([header, msgpack.packb([entries])])


def test_column_descriptions_are_shared_between_messages() -> None:
    """The same columns, decoded again, are the same objects: thousands of puts describe a handful of layouts."""

    def drawn() -> Drawn:
        columns = (ColumnSpec(name="x", layout="dense", dtype="float32", shape=(3,)),)
        arguments: dict[str, Any] = dict.fromkeys(field.name for field in dataclasses.fields(Drawn))
        arguments |= {"partition_id": "p", "fields": ("x",), "locations": (), "extra_info": {}, "columns": columns}
        message = Drawn(**arguments | {"indexes": np.arange(1), "generations": np.arange(1)})
        decoded = decode(encode_message(message))[1]
        assert isinstance(decoded, Drawn)
        return decoded

    assert drawn().columns is drawn().columns


def test_a_header_can_be_read_alone() -> None:
    """The request id is known even if the body makes no sense, so that the sender can be answered."""
    header, _ = encode_message(GetAudit(partition_id=None), 77, 70)
    assert read_header(header).request_id == 77
    assert read_header(header).floor == 70


def test_an_unknown_message_code_is_named() -> None:
    """A code that no type has suggests another version."""
    header, body = encode_message(ListPartitions())
    with pytest.raises(DecodeError, match="999"):
        decode([header[:1] + (999).to_bytes(2, "little") + header[3:], body])


def test_only_messages_are_encoded() -> None:
    """Any other object is refused by the name of its type."""
    with pytest.raises(EncodeError, match="dict"):
        encode_message({})


# ---------------------------------------------------------------- values that could not be sent on


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"x": value}, lambda value: [1, (value,)]])
def test_what_is_too_deep_or_foreign_is_refused_by_both_sides(wrap: Any) -> None:
    """A receiver takes nothing that it could not send to the next one, so one bad tag spoils no later answer."""
    header, _ = encode_message(Report(entries={}))
    with pytest.raises(EncodeError):
        encode_message(Report(entries={"a": wrap(nested(600))}))
    with pytest.raises(DecodeError, match=r"Report\.entries.*(nested deeper|not an encoded)|not an encoded"):
        decode([header, b"\x91\x81\xa1a" + b"\x91" * 900 + b"\x01"])
    stamp = msgpack.packb([{"a": [{"b": msgpack.Timestamp(1, 2)}]}])
    with pytest.raises(DecodeError, match=r"Report\.entries.*timestamp"):
        decode([header, stamp])
    entries = {"a": wrap(nested(200))}
    assert same(decode(encode_message(Report(entries=entries)))[1].entries, entries)


def test_object_arrays_hide_nothing() -> None:
    """What lies within one is looked at as well."""
    array = np.empty(1, object)
    array[0] = nested(400)
    value: Any = [array]
    for _ in range(200):
        value = [value]
    with pytest.raises(EncodeError, match="nested deeper"):
        encode_message(Report(entries={"a": value}))


def test_a_tag_that_is_no_dict_is_refused() -> None:
    tags = (types.MappingProxyType({"a": 1}),)
    with pytest.raises(EncodeError, match="mappingproxy"):
        encode_message(SetTags(indexes=np.arange(1), generations=np.arange(1), tags=tags))  # type: ignore[arg-type]


def test_a_time_that_is_no_number_is_refused() -> None:
    """It would have no place among deadlines; infinity has one."""
    cls = next(cls for cls in ALL if cls.__name__ == "ListUnits")
    with pytest.raises(DecodeError, match=r"ListUnits\.timeout_s.*not a number"):
        decode(encode_message(cls(timeout_s=float("nan"))))
    assert decode(encode_message(cls(timeout_s=float("inf"))))[1].timeout_s == float("inf")


@pytest.mark.parametrize("claim", [np.arange(3), [1], "1", 1.0, True], ids=repr)
def test_the_number_of_frames_is_an_int(claim: Any) -> None:
    """Whatever else stands there is a `DecodeError` and nothing else."""
    header, body, *frames = encode_message(Write(span=1, offset=0, frames=(b"x",)))
    values = msgpack.unpackb(body)
    values[2] = msgpack.ExtType(INT64S, claim.tobytes()) if isinstance(claim, np.ndarray) else claim
    with pytest.raises(DecodeError, match="frames"):
        decode([header, msgpack.packb(values), *frames])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\x91\xdd\xff\xff\xff\xff", "exceeds"),
        (b"\x91\xdf\xff\xff\xff\xff", "exceeds"),
        (b"\x91\xc6\xff\xff\xff\xff", "incomplete"),
        (b"\xdd\x00\x10\x00\x00" * 200_000, "not an encoded"),
        (b"\x91\xa2\xff\xfe", "not an encoded"),
        (b"\x91\xc7\x18\x0c" + b"\xff" * 7 + b"\x3f" + b"\0" * 15 + b"\x40", "range"),
        (b"\x91\xc7\x18\x0c" + b"\0" * 16 + b"\xff" * 8, "range"),
        (b"\x91\xc7\x08\x63" + b"\0" * 8, "unknown extension"),
        (b"\xc1" + b"\xff" * 40, "claims"),
    ],
    ids=["array", "map", "bytes", "arrays", "no text", "range", "negative range", "extension", "segments"],
)
def test_sizes_that_lie_are_found_before_anything_is_made(body: bytes, said: str) -> None:
    """A short message cannot claim much memory."""
    header, _ = encode_message(Report(entries={}))
    tracemalloc.start()
    with pytest.raises(DecodeError, match=said):
        decode([header, body])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_the_client_refuses_first_what_is_too_large() -> None:
    """With what to do, before anything is sent."""
    with pytest.raises(EncodeError, match="in parts"):
        encode_message(Write(span=1, offset=0, frames=(memoryview(bytearray(1)),) * ((1 << 14) + 1)))
    with pytest.raises(EncodeError, match="in parts"):
        encode_message(Write(span=1, offset=0, frames=(memoryview(np.zeros((1 << 28) + 1, np.uint8)),)))
    with pytest.raises(EncodeError, match="fewer rows"):
        encode_message(Report(entries={"x": np.zeros(1 << 28, np.uint8)}))
