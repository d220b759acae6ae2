"""Values as bytes and back: exact types, bounded decoding, nothing that runs."""

from __future__ import annotations

import collections
import contextlib
import datetime
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from transfer_queue.errors import DecodeError, EncodeError
from transfer_queue.wire.values import MAX_DEPTH, PICKLE, pack_value, unpack_value


class Point(NamedTuple):
    x: int
    y: int


TORCH_DTYPES = sorted(
    {
        dtype
        for name in dir(torch)
        if isinstance(dtype := getattr(torch, name), torch.dtype) and not name.startswith(("q", "complex32", "chalf"))
    },
    key=str,
)


def same(left: Any, right: Any) -> bool:
    """Equal in type, structure, dtype, shape and bytes; NaN equals NaN."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return raw(left) == raw(right) and (left.dtype, left.shape) == (right.dtype, right.shape)
    if isinstance(left, np.ndarray):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return same(left.tolist(), right.tolist()) if left.dtype.kind in "OT" else left.tobytes() == right.tobytes()
    if isinstance(left, np.generic):
        return bool(left.dtype == right.dtype) and left.tobytes() == right.tobytes()
    if isinstance(left, dict):
        return same(list(left.items()), list(right.items()))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    return left == right or repr(left) == repr(right)


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(st.characters())
    | st.binary()
)
arrays = npst.arrays(
    npst.scalar_dtypes() | npst.unicode_string_dtypes() | npst.byte_string_dtypes(), npst.array_shapes(min_side=0)
)
keys = st.text() | st.integers() | st.tuples(st.text(), st.integers())
values = st.recursive(
    scalars | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)


@given(values)
def test_any_nesting_comes_back_identical(value: Any) -> None:
    """Types, order, dtypes and bytes of nested values survive the round trip."""
    assert same(unpack_value(pack_value(value)), value)


@given(st.binary(max_size=400))
def test_random_bytes_give_a_value_or_a_decode_error(data: bytes) -> None:
    """No input makes decoding fail in any other way."""
    with contextlib.suppress(DecodeError):
        unpack_value(data)


@given(values, st.data())
def test_a_damaged_value_gives_a_value_or_a_decode_error(value: Any, data: st.DataObject) -> None:
    """One changed, missing or additional byte never leads to another kind of failure."""
    packed = bytearray(pack_value(value))
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    with contextlib.suppress(DecodeError):
        unpack_value(packed)


@pytest.mark.parametrize(
    "value",
    [
        2**63,
        -(2**63) - 1,
        2**4000,
        "\ud83d half a pair",
        {1, "a"},
        frozenset({(1, 2)}),
        {(1, "a"): 1, None: 2, 1.5: 3},
        np.str_("ü"),
        np.str_(""),
        np.bytes_(b"\0"),
        np.float16(1.5),
        np.longdouble(1) / 3,
        np.datetime64("2020-01-01T00:00:01", "ns"),
        np.timedelta64(3, "D"),
        np.void(b"abc"),
        np.array([(1, "a")], dtype=[("a", ">i4"), ("b", "U3")])[0],
        np.array(["2020-01-01", "NaT"], "M8[D]"),
        np.array([1, "a", None, [1], (2, 3), {"x": np.arange(2)}], object),
        np.array([[[1], [2]], [[3], [4]]], object),
        np.array(None),
        np.empty((0, 2), object),
        np.zeros(2, np.dtype([("a", "i1"), ("b", "f8")], align=True)),
        np.array([(1, [2, 3])], dtype=[("a", "i4"), ("b", "i4", (2,))]),
        np.arange(3, dtype=">u2"),
    ],
    ids=repr,
)
def test_special_values_come_back_identical(value: Any) -> None:
    """Large integers, lone surrogates, sets, NumPy scalars, structured, dated and object arrays round-trip."""
    assert same(unpack_value(pack_value(value)), value)


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 2 brought strings of any length")
def test_arrays_of_variable_strings_come_back() -> None:
    """NumPy's StringDType keeps its type."""
    array = np.array(["a", "long " * 30], np.dtypes.StringDType())
    back = unpack_value(pack_value(array))
    assert back.dtype == array.dtype
    assert back.tolist() == array.tolist()


@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (0, 5), (1,)], ids=str)
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_tensors_of_every_type_and_shape_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """dtype, shape and bytes are exact, for bfloat16, float8, bool, 0-d and empty tensors too."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        tensor.reshape(-1).view(torch.uint8).copy_(torch.arange(tensor.nbytes) % 2)
    assert same(unpack_value(pack_value({"x": (tensor,)})), {"x": (tensor,)})


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6).reshape(2, 3).T,
        torch.arange(12)[::3],
        torch.arange(3).expand(2, 3),
        torch.arange(3.0).flip(0),
        torch.ones(2, requires_grad=True) * 2,
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["transposed", "strided", "expanded", "flipped", "with gradient", "conjugated"],
)
def test_views_are_stored_by_value(tensor: torch.Tensor) -> None:
    """Values are right whatever the memory layout, and the tensor put in is unchanged."""
    before = tensor.detach().clone()
    back = unpack_value(pack_value(tensor))
    assert torch.equal(back, before)
    assert torch.equal(tensor.detach(), before)
    assert not back.requires_grad


def test_decoded_arrays_belong_to_the_caller() -> None:
    """Arrays and tensors are writable and share memory with nothing."""
    packed = pack_value([np.arange(4), np.arange(4), np.array([1, None], object), torch.arange(4)])
    first, second, objects, tensor = unpack_value(packed)
    for array in (first, second, objects):
        assert array.flags.owndata
        assert array.flags.writeable
    first[:] = 7
    tensor.fill_(7)
    assert second.tolist() == [0, 1, 2, 3]
    assert unpack_value(packed)[3].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "value",
    [
        object(),
        datetime.date(2020, 1, 1),
        collections.OrderedDict(a=1),
        Point(1, 2),
        np.ma.array([1]),
        torch.zeros(2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unsupported_types_are_refused_by_name(value: Any) -> None:
    """What would not come back identical is refused, and the error names the type."""
    name = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
    with pytest.raises(EncodeError, match=name):
        pack_value({"nested": [value]})


def test_endless_and_too_deep_values_are_refused() -> None:
    """A list that contains itself and tuples nested beyond the limit end as `EncodeError`."""
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = ()
    for _ in range(MAX_DEPTH):
        deep = (deep,)
    for value in (endless, deep):
        with pytest.raises(EncodeError):
            pack_value(value)


def test_the_deepest_nesting_that_is_accepted_comes_back() -> None:
    """Whatever can be encoded can be decoded."""
    value: Any = 0
    for _ in range(MAX_DEPTH):
        value = ([[value]],)
    assert unpack_value(pack_value(value)) == value


def test_pickle_needs_the_opt_in_on_both_sides(tmp_path: Path) -> None:
    """Without it nothing is pickled, a pickled payload is a `DecodeError`, and nothing in it runs."""
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (canary,)

    with pytest.raises(EncodeError, match="Bomb"):
        pack_value([Bomb()])
    packed = pack_value([Bomb()], allow_pickle=True)
    with pytest.raises(DecodeError, match="allow_pickle"):
        unpack_value(packed)
    assert not canary.exists()
    unpack_value(packed, allow_pickle=True)
    assert canary.exists()


def test_pickled_objects_come_back_with_the_opt_in() -> None:
    """An arbitrary object round-trips where both sides allow it."""
    value = {"when": datetime.date(2020, 1, 2), "array": np.arange(3)}
    back = unpack_value(pack_value(value, allow_pickle=True), allow_pickle=True)
    assert same(back, value)


def test_a_broken_pickle_is_a_decode_error() -> None:
    """Bytes that cannot be unpickled do not raise pickle's errors."""
    packed = msgpack.packb(msgpack.ExtType(PICKLE, pickle.dumps(1)[:-3]))
    with pytest.raises(DecodeError):
        unpack_value(packed, allow_pickle=True)


def test_claims_beyond_the_bytes_are_refused_before_memory_is_taken() -> None:
    """Nested headers that each claim millions of elements cost nothing."""
    code = (
        "import resource\n"
        "from transfer_queue.errors import DecodeError\n"
        "from transfer_queue.wire.values import unpack_value\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for header in (b'\\xdd\\x00\\x80\\x00\\x00', b'\\xdf\\x00\\x80\\x00\\x00', b'\\xdc\\xff\\xff'):\n"
        "    for tail in (b'', b'\\xc0' * (9 << 20)):\n"
        "        try:\n"
        "            unpack_value(header * 1000 + tail)\n"
        "        except DecodeError:\n"
        "            continue\n"
        "        raise SystemExit('decoded')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    grown_kib = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown_kib < 100 << 10


@pytest.mark.parametrize("size", [2**31, 2**63, 2**64 - 1])
def test_segments_that_lie_about_their_size_are_refused(size: int) -> None:
    """Lengths are compared with what is there before anything is allocated."""
    packed = bytearray(pack_value(np.arange(10)))
    packed[17:25] = size.to_bytes(8, "little")
    with pytest.raises(DecodeError):
        unpack_value(packed)


def test_python_numbers_keep_their_type_and_value() -> None:
    """True stays bool, 1.0 stays float, NaN stays NaN."""
    back = unpack_value(pack_value([True, 1, 1.0, math.nan, -0.0]))
    assert [type(item) for item in back] == [bool, int, float, float, float]
    assert math.isnan(back[3])
    assert math.copysign(1, back[4]) == -1


def test_torch_is_not_imported_for_values_without_tensors() -> None:
    """A process that only moves NumPy data never loads torch."""
    code = (
        "import sys, numpy\n"
        "from transfer_queue.wire.values import pack_value, unpack_value\n"
        "unpack_value(pack_value({'a': (1, numpy.arange(3))}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
