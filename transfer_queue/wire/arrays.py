"""NumPy arrays and torch tensors as (type, shape, bytes), and back.

torch is imported only when a tensor has to be rebuilt; a tensor to encode proves that it is loaded already.
"""

from __future__ import annotations

import functools
import math
import re
import sys
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from transfer_queue.errors import DecodeError, EncodeError

Array: TypeAlias = NDArray[Any]

_MAX_ARRAY_BYTES = 1 << 62
_SIMPLE_DTYPE = re.compile(r"[<>|=][biufcSUVmM]\d{1,10}(\[[\w/]{1,24}\])?")
_TORCH_DTYPE = re.compile(r"[a-z][a-z0-9_]{1,40}")


# ---------------------------------------------------------------- NumPy


def array_parts(array: Array) -> tuple[Any, list[int], memoryview]:
    """Return (dtype description, shape, bytes in C order); the bytes are a view where the array is contiguous."""
    contiguous = np.ascontiguousarray(array)
    return _describe(array.dtype), list(array.shape), _raw_bytes(contiguous)


def array_from_parts(segment: memoryview, descr: Any, shape: Any) -> Array:
    """Return a writable array that owns its memory."""
    dtype, dims = _dtype_of(descr), _dims_of(shape)
    if math.prod(dims) * dtype.itemsize != len(segment):
        raise DecodeError(f"an array of shape {dims} and type {dtype} cannot have {len(segment)} bytes")
    try:
        array = np.empty(dims, dtype)
    except ValueError as error:
        raise DecodeError(f"no array can have the shape {dims}: {error}") from error
    if len(segment):
        _raw_bytes(array)[:] = segment
    return array


def scalar_parts(scalar: np.generic) -> list[Any]:
    """Return [dtype description, bytes]; NumPy's own str and bytes have no fixed size and give [kind, value]."""
    if isinstance(scalar, np.str_):
        return ["U", str(scalar)]
    if isinstance(scalar, np.bytes_):
        return ["S", bytes(scalar)]
    return [_describe(scalar.dtype), scalar.tobytes()]


def scalar_from_parts(descr: Any, data: Any) -> np.generic:
    if descr == "U" and type(data) is str:
        return np.str_(data)
    if type(data) is not bytes:
        raise DecodeError(f"a NumPy scalar cannot be made from a {type(data).__name__}")
    if descr == "S":
        return np.bytes_(data)
    dtype = _dtype_of(descr)
    if len(data) != dtype.itemsize:
        raise DecodeError(f"a NumPy scalar of type {dtype} cannot have {len(data)} bytes")
    scalar: np.generic = np.frombuffer(bytearray(data), dtype)[0]
    return scalar


def object_kind(array: Array) -> str:
    """Return "O" for an array of Python objects, "T" for one of strings of any length."""
    if array.dtype.kind == "T" and array.dtype != np.dtypes.StringDType():
        raise EncodeError(f"cannot encode an array of {array.dtype!r}: only the plain StringDType can be stored")
    return array.dtype.kind


def object_array_from_parts(kind: Any, shape: Any, items: Any) -> Array:
    dims = _dims_of(shape)
    if type(items) is not list or math.prod(dims) != len(items):
        raise DecodeError(f"an object array of shape {dims} does not have the elements for it")
    if kind == "O":
        flat = np.empty(len(items), object)
    elif kind == "T" and hasattr(np.dtypes, "StringDType") and set(map(type, items)) <= {str}:
        flat = np.empty(len(items), np.dtypes.StringDType())
    else:
        raise DecodeError(f"no object array of kind {kind!r} can hold these elements")
    for position, item in enumerate(items):
        flat[position] = item
    try:
        return flat.reshape(dims).copy() if flat.ndim != len(dims) else flat
    except ValueError as error:
        raise DecodeError(f"no array can have the shape {dims}: {error}") from error


def _raw_bytes(array: Array) -> memoryview:
    """Return a view of the bytes of a C-contiguous array, also of types that have no buffer protocol."""
    if array.size == 0:
        return memoryview(b"")
    return array.reshape(-1).view(np.uint8).data


def _describe(dtype: np.dtype[Any]) -> Any:
    if dtype.hasobject or dtype.itemsize == 0 or dtype.isbuiltin == 2:
        raise EncodeError(f"cannot encode a NumPy value of type {dtype}: convert it to a type of NumPy itself")
    descr = np.lib.format.dtype_to_descr(dtype)
    return descr


def _dtype_of(descr: Any) -> np.dtype[Any]:
    if type(descr) is str:
        return _simple_dtype(descr)
    try:
        dtype = np.lib.format.descr_to_dtype(descr)
    except (TypeError, ValueError, IndexError, SyntaxError, OverflowError, MemoryError, RecursionError) as error:
        raise DecodeError(f"not the description of a NumPy type: {error}") from error
    if dtype.hasobject or dtype.itemsize == 0 or dtype.isbuiltin == 2:
        raise DecodeError(f"a NumPy value of type {dtype} cannot be encoded")
    return dtype


@functools.lru_cache(maxsize=256)
def _simple_dtype(text: str) -> np.dtype[Any]:
    if not _SIMPLE_DTYPE.fullmatch(text):
        raise DecodeError(f"{text!r} does not describe a NumPy type")
    try:
        dtype = np.dtype(text)
    except (TypeError, ValueError, OverflowError) as error:
        raise DecodeError(f"{text!r} does not describe a NumPy type") from error
    if dtype.itemsize == 0:
        raise DecodeError(f"a NumPy value of type {text!r} has no bytes")
    return dtype


def _dims_of(shape: Any) -> tuple[int, ...]:
    if type(shape) is not list or len(shape) > 64 or not set(map(type, shape)) <= {int}:
        raise DecodeError("the shape of an array is not a list of at most 64 integers")
    if any(dim < 0 or dim > _MAX_ARRAY_BYTES for dim in shape):
        raise DecodeError(f"no array can have the shape {tuple(shape)}")
    return tuple(shape)


# ---------------------------------------------------------------- torch


def is_tensor(obj: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(obj, torch.Tensor)


def tensor_parts(tensor: Any) -> tuple[str, list[int], memoryview]:
    """Return (dtype name, shape, bytes in C order) of a dense tensor; gradient and device are left behind."""
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.device.type == "meta":
        kind = f"{tensor.dtype} tensor with layout {tensor.layout} on {tensor.device.type}"
        raise EncodeError(f"cannot encode a {kind} inside a value: make it a field of its own, or convert it to dense")
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    raw = plain.reshape(-1).view(torch.uint8) if plain.numel() else torch.empty(0, dtype=torch.uint8)
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw.numpy().data


def tensor_from_parts(name: Any, shape: Any, segment: memoryview) -> Any:
    """Return a dense CPU tensor that owns its memory; needs torch."""
    if type(name) is not str or not _TORCH_DTYPE.fullmatch(name):
        raise DecodeError("the type of a tensor is not a name")
    try:
        import torch
    except ImportError as error:
        raise DecodeError("the value holds a tensor, and torch is not installed here") from error
    dims, dtype = _dims_of(shape), getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise DecodeError(f"this torch has no type {name!r}")
    if math.prod(dims) * dtype.itemsize != len(segment):
        raise DecodeError(f"a tensor of shape {dims} and type {dtype} cannot have {len(segment)} bytes")
    try:
        tensor = torch.empty(dims, dtype=dtype)
        if len(segment):
            tensor.reshape(-1).view(torch.uint8).numpy().data[:] = segment
    except (RuntimeError, TypeError) as error:
        raise DecodeError(f"no tensor can have the shape {dims} and type {dtype}: {error}") from error
    return tensor
