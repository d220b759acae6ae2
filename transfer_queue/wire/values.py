"""Python values as bytes, without pickle: rows of object columns, tags, parameters and message bodies.

A value is MessagePack with extension types for what MessagePack cannot tell apart or does not know: tuples, sets,
integers beyond 64 bits, complex numbers, NumPy scalars and arrays, torch tensors. The bytes of arrays and tensors
are not nested in the MessagePack body but follow it as *segments*, one per array in the order of the body, so that
they are copied once on either side:

    body                                                      no array inside
    0xc1 · body length · count · segment lengths · body · segments      otherwise (all lengths 64 bit, little-endian)

0xc1 is the one byte that never starts a MessagePack value. Each segment is used exactly once, so a short message
cannot claim much memory: whatever is decoded is bounded by a small multiple of the bytes that arrived.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from typing import Any, TypeAlias

import msgpack
import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import DecodeError, EncodeError
from transfer_queue.wire import arrays

Buffer: TypeAlias = bytes | bytearray | memoryview

MAX_DEPTH = 32  # of tuples, sets and object arrays; lists and dicts may nest some hundred deep between two of these

TUPLE, SET, FROZENSET, BIG_INT, COMPLEX, INT64S, SCALAR, ARRAY, OBJECT_ARRAY, TENSOR, PICKLE, RANGE = range(1, 13)

_MARK = 0xC1
_INT64 = np.dtype("<i8")
_HEAD = struct.Struct("<BQQ")
_COMPLEX = struct.Struct("<dd")
_TRUSTED_CLAIM = 1 << 17
_RANGE = struct.Struct("<qqq")  # first value, step, count
_LEAST_RANGE = 256
MAX_RANGE = 1 << 22
_MOST_IN_RANGES = 1 << 25  # elements, of all ranges of a message
_UNPICKLING_ERRORS = (
    *(pickle.UnpicklingError, EOFError, AttributeError, ImportError),
    *(LookupError, TypeError, ValueError, RecursionError),
)
_Restore: TypeAlias = Callable[["Unpacking", bytes], Any]


def pack_value(obj: Any, allow_pickle: bool = False) -> bytes:
    """Encode a value. Exact types come back, except that bytearray and memoryview return as bytes.

    An unsupported type is an `EncodeError`, or is pickled if `allow_pickle`.
    """
    packing = Packing(allow_pickle=allow_pickle)
    return packing.join(packing.pack(obj))


def unpack_value(buffer: Buffer, allow_pickle: bool = False) -> Any:
    """Decode a value. Arrays and tensors own their memory and are writable; anything malformed is a `DecodeError`.

    A pickled part is refused, and nothing in it runs, unless `allow_pickle`.
    """
    unpacking = Unpacking(allow_pickle=allow_pickle)
    value = unpacking.unpack(unpacking.split(buffer))
    unpacking.finish()
    return value


class Packing:
    """One value on its way to bytes: `pack` the body, then `join` it with the segments it met."""

    __slots__ = ("allow_pickle", "allow_tensors", "depth", "segments")

    def __init__(self, *, allow_pickle: bool = False, allow_tensors: bool = True) -> None:
        self.allow_pickle = allow_pickle
        self.allow_tensors = allow_tensors
        self.depth = 0
        self.segments: list[Any] = []

    def pack(self, obj: Any) -> bytes:
        packer = msgpack.Packer(default=self._extend, strict_types=True, unicode_errors="surrogatepass")
        try:
            packed: bytes = packer.pack(obj)
        except (ValueError, OverflowError, TypeError) as error:
            raise EncodeError(f"cannot encode a {_type_name(obj)}: {error}; convert it before storing it") from error
        return packed

    def join(self, body: bytes) -> bytes:
        if not self.segments:
            return body
        sizes = struct.pack(f"<{len(self.segments)}Q", *(len(segment) for segment in self.segments))
        return b"".join((_HEAD.pack(_MARK, len(body), len(self.segments)), sizes, body, *self.segments))

    def _extend(self, obj: Any) -> msgpack.ExtType:
        kind = type(obj)
        if kind is tuple:
            return self._nested(TUPLE, list(obj))
        if kind is int:
            return msgpack.ExtType(BIG_INT, obj.to_bytes(obj.bit_length() // 8 + 1, "little", signed=True))
        if kind is complex:
            return msgpack.ExtType(COMPLEX, _COMPLEX.pack(obj.real, obj.imag))
        if kind is set or kind is frozenset:
            return self._nested(SET if kind is set else FROZENSET, list(obj))
        if isinstance(obj, np.generic):
            return msgpack.ExtType(SCALAR, self.pack(arrays.scalar_parts(obj)))
        if kind is np.ndarray or kind is np.memmap:
            return self._array(obj)
        if arrays.is_tensor(obj):
            return self._tensor(obj)
        if self.allow_pickle:
            return msgpack.ExtType(PICKLE, _pickled(obj))
        raise EncodeError(
            f"cannot encode a {_type_name(obj)}: use dict, list, tuple, str, bytes, numbers, NumPy arrays or tensors, "
            "or set allow_pickle on both sides",
            type=_type_name(obj),
        )

    def _nested(self, code: int, items: list[Any]) -> msgpack.ExtType:
        if self.depth >= MAX_DEPTH:
            raise EncodeError(f"cannot encode tuples, sets or object arrays nested deeper than {MAX_DEPTH}")
        self.depth += 1
        packed = self.pack(items)
        self.depth -= 1
        return msgpack.ExtType(code, packed)

    def _array(self, array: np.ndarray[Any, Any]) -> msgpack.ExtType:
        if array.dtype.kind in "OT":
            return self._nested(OBJECT_ARRAY, [arrays.object_kind(array), list(array.shape), array.ravel().tolist()])
        descr, shape, segment = arrays.array_parts(array)
        self.segments.append(segment)
        return msgpack.ExtType(ARRAY, self.pack([descr, shape]))

    def _tensor(self, tensor: Any) -> msgpack.ExtType:
        if not self.allow_tensors:
            raise EncodeError("cannot send a tensor in tags or parameters: use .item(), .tolist() or .numpy()")
        dtype, shape, segment = arrays.tensor_parts(tensor)
        self.segments.append(segment)
        return msgpack.ExtType(TENSOR, self.pack([dtype, shape]))


class Unpacking:
    """One value on its way back: `split` off the segments, `unpack` the body, then `finish`."""

    __slots__ = ("allow_pickle", "allow_tensors", "depth", "in_ranges", "next_segment", "segments")

    def __init__(self, *, allow_pickle: bool = False, allow_tensors: bool = True) -> None:
        self.allow_pickle = allow_pickle
        self.allow_tensors = allow_tensors
        self.depth = 0
        self.segments: list[memoryview] = []
        self.next_segment = 0
        self.in_ranges = 0

    def split(self, buffer: Buffer) -> bytes:
        """Return the body; keep views of the segments."""
        if len(buffer) == 0 or buffer[0] != _MARK:
            return bytes(buffer)
        view = memoryview(buffer)
        if len(view) < _HEAD.size:
            raise DecodeError(f"a value of {len(view)} bytes ends within its head")
        _, body_size, count = _HEAD.unpack_from(view)
        start = _HEAD.size + 8 * count
        if start + body_size > len(view):
            claim = f"{count} segments and a body of {body_size} bytes"
            raise DecodeError(f"a value claims {claim}, but has {len(view)} bytes")
        sizes = struct.unpack_from(f"<{count}Q", view, _HEAD.size)
        if start + body_size + sum(sizes) != len(view):
            raise DecodeError(f"a value claims {start + body_size + sum(sizes)} bytes, but has {len(view)}")
        end = start + body_size
        for size in sizes:
            self.segments.append(view[end : end + size])
            end += size
        return bytes(view[start : start + body_size])

    def unpack(self, body: bytes) -> Any:
        _check_claims(body)
        try:
            return msgpack.unpackb(body, ext_hook=self._restore, strict_map_key=False, unicode_errors="surrogatepass")
        except (ValueError, TypeError, OverflowError, RecursionError, struct.error) as error:
            raise DecodeError(f"{len(body)} bytes are not an encoded value: {error}") from error

    def finish(self) -> None:
        if self.next_segment != len(self.segments):
            raise DecodeError(f"a value uses {self.next_segment} of its {len(self.segments)} segments")

    def take_segment(self) -> memoryview:
        if self.next_segment >= len(self.segments):
            raise DecodeError(f"a value has {len(self.segments)} segments, but more arrays")
        self.next_segment += 1
        return self.segments[self.next_segment - 1]

    def items(self, data: bytes, count: int | None = None) -> list[Any]:
        """Decode a nested list, of `count` elements if given."""
        if self.depth >= MAX_DEPTH:
            raise DecodeError(f"tuples, sets or object arrays are nested deeper than {MAX_DEPTH}")
        self.depth += 1
        items = self.unpack(data)
        self.depth -= 1
        if type(items) is not list or (count is not None and len(items) != count):
            raise DecodeError(f"expected a list of {'any number of' if count is None else count} elements")
        return items

    def _restore(self, code: int, data: bytes) -> Any:
        if code == INT64S:  # most of what messages hold
            return restore_int64s(data)
        restore = _RESTORE.get(code)
        if restore is None:
            raise DecodeError(f"unknown extension type {code}")
        return restore(self, data)

    def restore_tensor(self, data: bytes) -> Any:
        if not self.allow_tensors:
            raise DecodeError("a tensor is not allowed here")
        dtype, shape = self.items(data, 2)
        return arrays.tensor_from_parts(dtype, shape, self.take_segment())

    def restore_range(self, data: bytes) -> arrays.Array:
        """Return a read-only int64 array. All ranges of a message together are bounded: each takes few bytes."""
        first, step, count = _RANGE.unpack(data)
        self.in_ranges += count
        if not 2 <= count <= MAX_RANGE or self.in_ranges > _MOST_IN_RANGES:
            raise DecodeError(f"a range cannot have {count} elements, nor a message {self.in_ranges} in ranges")
        if not -(1 << 63) <= first + (count - 1) * step < 1 << 63:
            raise DecodeError(f"a range of {count} elements from {first} by {step} exceeds 64 bits")
        found = first + step * np.arange(count, dtype=np.int64) if step else np.full(count, first, np.int64)
        found.flags.writeable = False
        return found

    def restore_pickle(self, data: bytes) -> Any:
        if not self.allow_pickle:
            raise DecodeError("the value was pickled; set allow_pickle on this side too if you trust its writer")
        try:
            return pickle.loads(data)
        except _UNPICKLING_ERRORS as error:
            raise DecodeError(f"cannot unpickle a value of {len(data)} bytes: {error}") from error


def pack_int64s(array: NDArray[np.int64]) -> msgpack.ExtType:
    """Encode a flat int64 array; a long one of equal steps (rows put together, rows of one block) as a range."""
    count = len(array)
    if _LEAST_RANGE <= count <= MAX_RANGE:
        first, step = int(array[0]), int(array[1]) - int(array[0])
        if int(array[-1]) == first + (count - 1) * step and bool((array[1:] - array[:-1] == step).all()):
            return _extension(RANGE, _RANGE.pack(first, step, count))
    return _extension(INT64S, array.tobytes())


def _extension(code: int, data: bytes) -> msgpack.ExtType:
    return tuple.__new__(msgpack.ExtType, (code, data))  # without the checks of its constructor


def restore_int64s(data: bytes) -> arrays.Array:
    """Return a read-only view of `data`."""
    if len(data) % 8:
        raise DecodeError(f"an int64 array cannot have {len(data)} bytes")
    return np.frombuffer(data, _INT64)


_RESTORE: dict[int, _Restore] = {
    TUPLE: lambda u, data: tuple(u.items(data)),
    SET: lambda u, data: set(u.items(data)),
    FROZENSET: lambda u, data: frozenset(u.items(data)),
    BIG_INT: lambda u, data: int.from_bytes(data, "little", signed=True),
    COMPLEX: lambda u, data: complex(*_COMPLEX.unpack(data)),
    SCALAR: lambda u, data: arrays.scalar_from_parts(*u.items(data, 2)),
    ARRAY: lambda u, data: arrays.array_from_parts(u.take_segment(), *u.items(data, 2)),
    OBJECT_ARRAY: lambda u, data: arrays.object_array_from_parts(*u.items(data, 3)),
    TENSOR: Unpacking.restore_tensor,
    PICKLE: Unpacking.restore_pickle,
    RANGE: Unpacking.restore_range,
}


def _check_claims(body: bytes) -> None:
    """Refuse array headers that claim more elements than there are bytes, before lists of that size are made."""
    claimed = body.count(b"\xdd") * len(body) + body.count(b"\xdc") * min(len(body), 0xFFFF)
    if claimed <= _TRUSTED_CLAIM:
        return
    scanner = msgpack.Unpacker(read_size=len(body), max_buffer_size=len(body))
    scanner.feed(body)
    try:
        scanner.skip()
    except (ValueError, msgpack.OutOfData) as error:
        raise DecodeError(f"{len(body)} bytes are not an encoded value: {error or 'they end too early'}") from error


def _pickled(obj: Any) -> bytes:
    try:
        return pickle.dumps(obj, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError) as error:
        raise EncodeError(f"cannot pickle a {_type_name(obj)}: {error}", type=_type_name(obj)) from error


def _type_name(obj: Any) -> str:
    kind = type(obj)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
