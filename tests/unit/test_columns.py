"""What users put becomes columns, and columns become what users get: same values, types, shapes and layouts."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, NonTensorStack, TensorDict, lazy_stack

from tests.unit.whole_block import write_block
from transfer_queue.client import columns
from transfer_queue.config import LAYOUTS
from transfer_queue.errors import EncodeError, InvalidArgument, UnknownName, WrongType
from transfer_queue.storage.block import Directories, plan_block
from transfer_queue.storage.gather import RowSet, gathered, pick

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64,
    torch.uint64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


def read_back(
    *puts: Any, rows: list[tuple[int, int]] | None = None, layout: str = "as_put", allow_pickle: bool = False
) -> TensorDict:
    """Store puts as blocks and read (put, row) pairs of them; None: all rows in order."""
    blocks, everything = [], []
    for number, data in enumerate(puts):
        count, encoded = columns.encode(data, allow_pickle=allow_pickle)
        plan = plan_block(encoded, count)
        memory = np.full(plan.size_bytes, 0xA5, np.uint8)
        write_block(plan, memory, number)
        blocks.append(Directories().open_block(memory, 0, number))
        everything += [(number, slot) for slot in range(count)]
    chosen = everything if rows is None else rows
    which, slots = np.array(chosen, np.int64).reshape(-1, 2).T.copy()
    found: dict[str, list[Any]] = {name: [] for name in list(puts[0].keys())}
    for name, parts in found.items():
        for part in pick(name, RowSet(blocks, which, slots)):
            values = np.empty(part.size_bytes, np.uint8)
            part.copy_into(values)
            parts.append(gathered(part, values))
    return columns.decode(found, len(chosen), layout=layout, allow_pickle=allow_pickle)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal type, shape and bits."""
    assert (found.dtype, found.shape, found.layout) == (wanted.dtype, wanted.shape, wanted.layout)
    assert bits(found) == bits(wanted)


def same_rows(found: torch.Tensor, wanted: list[torch.Tensor]) -> None:
    rows = list(found.unbind(0))
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted, strict=True):
        same(row, want)


def random_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of any bits, NaNs included."""
    generator = torch.Generator().manual_seed(5)
    if dtype is torch.bool:
        return torch.rand(shape, generator=generator) > 0.5
    size = int(np.prod(shape, dtype=np.int64))
    raw = torch.randint(0, 256, (size * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    """A jagged tensor of any dtype; `torch.nested.nested_tensor` knows only some."""
    lengths = torch.tensor([0, *(len(row) for row in rows)])
    flat = torch.cat([row.contiguous().reshape(-1).view(torch.uint8) for row in rows])
    values = flat.view(rows[0].dtype).view(-1, *rows[0].shape[1:])
    return torch.nested.nested_tensor_from_jagged(values, lengths.cumsum(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3,), (2, 3), (2, 0)], ids=str)
def test_dense_rows_keep_type_shape_and_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every dtype, NaN and Inf included, for rows without dimension, empty rows and rows of several dimensions."""
    data = {"x": random_bits(dtype, 4, *shape)}
    same(read_back(data)["x"], data["x"])
    same(read_back(data, rows=[(0, 2), (0, 0), (0, 2)])["x"], torch.stack([data["x"][i] for i in (2, 0, 2)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("trailing", [(), (2,)], ids=str)
def test_ragged_rows_keep_type_shape_and_bits(dtype: torch.dtype, trailing: tuple[int, ...]) -> None:
    """Jagged stays jagged, with empty rows in place."""
    rows = [random_bits(dtype, length, *trailing) for length in (2, 0, 5, 1, 0)]
    found = read_back({"x": jagged(rows)})["x"]
    assert found.is_nested and found.layout is torch.jagged
    same_rows(found, rows)
    same_rows(read_back({"x": jagged(rows)}, rows=[(0, 4), (0, 2)])["x"], [rows[4], rows[2]])


def test_rows_that_are_all_empty_stay() -> None:
    """A ragged field of which every row is empty keeps its rows."""
    rows = [torch.empty(0, dtype=torch.int64)] * 3
    same_rows(read_back({"x": jagged(rows)})["x"], rows)


@pytest.mark.parametrize(
    "make",
    [
        lambda base: base.t(),
        lambda base: base[::2, 1:],
        lambda base: base[:, :1].expand(-1, 7),
        lambda base: base.clone().requires_grad_() * 2,
        lambda base: torch.complex(base, base).conj(),
        torch.nn.Parameter,
    ],
    ids=["transposed", "strided", "expanded", "gradient", "conjugated", "parameter"],
)
def test_tensors_are_stored_as_the_values_they_show(make: Any) -> None:
    """Views, expansions and tensors with history are stored by value, and the caller's object is left as it was."""
    shown = make(torch.arange(12.0).reshape(4, 3))
    before = (shown.stride(), shown.requires_grad, shown._version)
    same(read_back({"x": shown})["x"], shown.detach().resolve_conj().contiguous())
    assert (shown.stride(), shown.requires_grad, shown._version) == before


@pytest.mark.parametrize("inside", [True, False])
def test_tensors_of_inference_mode_are_stored(inside: bool) -> None:
    """What was made in inference mode can be put inside and outside of it, dense, ragged and as rows."""
    with torch.inference_mode():
        data = {"x": torch.rand(2, 3), "j": jagged([torch.rand(2), torch.rand(4)]), "l": [torch.rand(2), torch.rand(1)]}
        transposed = {"x": data["x"].t(), "j": torch.ones(3), "l": [torch.tensor(1)] * 3}
    with torch.inference_mode(inside):
        found = read_back(data)
        same(found["x"], data["x"])
        same_rows(found["j"], list(data["j"].unbind(0)))
        same_rows(found["l"], data["l"])
        same(read_back(transposed)["x"], transposed["x"].contiguous())


def test_gradients_are_left_behind() -> None:
    """A ragged tensor with history is stored by value and keeps its history."""
    leaf = torch.rand(5, requires_grad=True)
    tensor = torch.nested.nested_tensor_from_jagged(leaf * 2, torch.tensor([0, 2, 5]))
    found = read_back({"x": tensor, "rows": list(tensor.unbind(0))})
    assert torch.equal(found["x"].values(), leaf.detach() * 2) and not found["x"].requires_grad
    assert tensor.requires_grad and torch.equal(found["rows"].values(), leaf.detach() * 2)


def test_contiguous_tensors_are_not_copied() -> None:
    """Encoding looks at the caller's memory."""
    tensor = torch.zeros(4, 8)
    _, [column] = columns.encode({"x": tensor})
    assert column.values[0].ctypes.data == tensor.data_ptr()


def test_results_are_writable_and_share_nothing() -> None:
    """Two fields, two reads: no memory in common, and each pickles to about its own size."""
    data = {"x": torch.arange(6.0), "y": jagged([torch.arange(3.0), torch.arange(2.0)] * 3)}
    one, two = read_back(data), read_back(data)
    for name in data:
        first, second = (found[name].values() if name == "y" else found[name] for found in (one, two))
        first.add_(1)
        assert not torch.equal(first, second)
    assert len(pickle.dumps(one["x"])) < 1000
    one["z"] = torch.zeros(6)
    assert not one.is_locked and one.batch_size == torch.Size([6]) and one.device in (None, torch.device("cpu"))


@pytest.mark.parametrize(
    ("layout", "one_length", "two_lengths"),
    [("as_put", "dense", "jagged"), ("jagged", "jagged", "jagged"), ("dense", "dense", "jagged")],
)
def test_dense_puts_of_several_lengths(layout: str, one_length: str, two_lengths: str) -> None:
    """Rows put dense come dense if they have one shape, else jagged; a forced layout wins where it can."""
    puts = [{"x": torch.ones(2, 3)}, {"x": torch.ones(1, 5)}, {"x": torch.ones(1, 3)}]
    for rows, wanted in (([(0, 1), (2, 0)], one_length), ([(0, 1), (1, 0)], two_lengths)):
        found = read_back(*puts, rows=rows, layout=layout)["x"]
        assert found.is_nested == (wanted == "jagged")
        same_rows(found, [puts[put]["x"][row] for put, row in rows])


@pytest.mark.parametrize(("layout", "dense"), [("as_put", False), ("jagged", False), ("dense", True)])
def test_jagged_puts_stay_jagged_unless_told_otherwise(layout: str, dense: bool) -> None:
    """Rows put jagged come jagged, also if they have equal lengths, also beside rows that were put dense."""
    ragged = {"x": jagged([torch.ones(3), torch.ones(3), torch.ones(1)])}
    plain = {"x": torch.zeros(2, 3)}
    for puts, rows in (((ragged,), [(0, 0), (0, 1)]), ((ragged, plain), [(1, 1), (0, 0)])):
        found = read_back(*puts, rows=rows, layout=layout)["x"]
        assert found.is_nested != dense and [len(row) for row in found.unbind(0)] == [3, 3]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_single_values_are_never_jagged(layout: str) -> None:
    """A field of single values per row is dense in every layout; rows of one value each have a dimension."""
    data = {"s": torch.arange(3), "v": torch.arange(3).reshape(3, 1)}
    found = read_back(data, layout=layout)
    same(found["s"], data["s"])
    assert found["v"].is_nested == (layout == "jagged")
    same_rows(found["v"], list(data["v"]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_rows_ragged_in_several_dimensions() -> None:
    """Strided nested rows come jagged if only their first dimension differs, else strided; dense if told and equal."""
    rows = [torch.rand(2, 3), torch.rand(4, 1), torch.rand(1, 3)]
    data = {"x": torch.nested.nested_tensor(rows)}
    found = read_back(data)["x"]
    assert found.is_nested and found.layout is torch.strided
    same_rows(found, rows)
    assert read_back(data, rows=[(0, 0), (0, 2)])["x"].layout is torch.jagged
    same(read_back(data, rows=[(0, 1), (0, 1)], layout="dense")["x"], torch.stack([rows[1], rows[1]]))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_unusual_jagged_tensors() -> None:
    """Jagged tensors with holes, or ragged in another dimension, are stored as the rows they show."""
    base = torch.arange(30.0).view(3, 10)
    holes = torch.nested.narrow(base, 1, torch.tensor([1, 2, 3]), torch.tensor([2, 0, 4]), layout=torch.jagged)
    same_rows(read_back({"x": holes})["x"], [base[0, 1:3], base[1, 2:2], base[2, 3:7]])
    turned = torch.nested.nested_tensor([torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged).transpose(1, 2)
    same_rows(read_back({"x": turned})["x"], [row.contiguous() for row in turned.unbind(0)])
    part = torch.nested.nested_tensor_from_jagged(torch.arange(9.0), torch.tensor([2, 4, 9], dtype=torch.int64))
    same_rows(read_back({"x": part})["x"], [torch.arange(2.0, 4.0), torch.arange(4.0, 9.0)])


def test_a_list_of_tensors_is_its_rows() -> None:
    """Rows of one type and rank become one ragged field; single values a dense one; anything else stays a list."""
    rows = [torch.arange(3), torch.arange(0), torch.arange(20_000)]
    found = read_back({"x": rows, "s": [torch.tensor(4), torch.tensor(5), torch.tensor(6)]})
    same_rows(found["x"], rows)
    same(found["s"], torch.tensor([4, 5, 6]))
    mixed = [torch.arange(3), torch.ones(2, 2), "text"]
    listed = read_back({"x": mixed})["x"].tolist()
    same(listed[0], mixed[0])
    same(listed[1], mixed[1])
    assert listed[2] == "text"


def test_rows_of_other_rank_or_kind_come_as_a_list() -> None:
    """Tensors of two ranks and objects in one column: a stack of values, each unchanged, in the order asked for."""
    puts = [
        {"x": torch.ones(2, 3)},
        {"x": torch.zeros(1, 2, 2)},
        {"x": ["text", {"a": 1}]},
        {"x": jagged([torch.ones(5)])},
    ]
    found = read_back(*puts, rows=[(2, 1), (1, 0), (0, 0), (2, 0), (3, 0)])["x"].tolist()
    assert found[0] == {"a": 1} and found[3] == "text"
    for row, want in zip(
        (found[1], found[2], found[4]), (torch.zeros(2, 2), torch.ones(3), torch.ones(5)), strict=True
    ):
        same(row, want)


VALUES: dict[str, list[Any]] = {
    "text": ["", "a", "ünïcode \ud800", "日本"],
    "ascii": ["", "a", "bc"],
    "bytes": [b"", b"\x00\xff"],
    "ints": [0, -(2**63), 2**63 - 1],
    "large ints": [2**64, -(2**70)],
    "floats": [0.0, -0.0, float("inf")],
    "bools": [True, False],
    "none": [None, None],
    "mixed": [1, 1.0, True, "1", None, b"1"],
    "containers": [{}, [], (), "", {"a": [1, (2, 3)]}, [[]]],
    "numpy": [np.float32(1.5), np.int8(-3), np.str_("x"), np.bytes_(b"y")],
}


@pytest.mark.parametrize("rows", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize("form", ["list", "stack", "tensordict", "array"])
def test_values_come_back_equal_and_of_their_type(rows: list[Any], form: str) -> None:
    """Python and NumPy values in every form that a column of them may have."""
    array = np.empty(len(rows), object)
    array[:] = rows if not any(isinstance(row, list | tuple) for row in rows) else None
    for position, row in enumerate(rows):
        array[position] = row
    data: Any = {
        "list": lambda: {"x": rows},
        "stack": lambda: TensorDict({"x": NonTensorStack(*(NonTensorData(data=row) for row in rows))}, [len(rows)]),
        "tensordict": lambda: TensorDict({"x": NonTensorData(data=rows)}, [len(rows)]),
        "array": lambda: {"x": array},
    }[form]()
    found = read_back(data)
    listed = found["x"].tolist()
    assert listed == rows and [type(value) for value in listed] == [type(row) for row in rows]
    assert list(found["x"]) == rows and found[len(rows) - 1]["x"] == rows[-1]
    assert isinstance(found.get("x"), NonTensorStack)
    again = pickle.loads(pickle.dumps(found))
    assert again["x"].tolist() == rows
    assert found.clone()["x"].tolist() == rows and found[:1]["x"].tolist() == rows[:1]


def test_stacks_of_values_are_independent() -> None:
    """Changing one entry of a result changes no other."""
    found = read_back({"x": [{"n": 1}, {"n": 1}], "y": ["a", "b"]})
    found["x"][0]["n"] = 2
    found[1]["y"] = "c"
    assert found["x"].tolist() == [{"n": 2}, {"n": 1}]
    assert found["y"].tolist()[0] == "a"
    joined = torch.cat([found, found])
    assert joined["x"].tolist() == [{"n": 2}, {"n": 1}] * 2
    assert found.to("cpu").lock_()["y"].tolist()[0] == "a"


def test_a_value_for_the_whole_batch_is_given_to_each_row() -> None:
    """A `NonTensorData` that has not one entry per row is the value of every row."""
    found = read_back(
        TensorDict({"x": "same", "y": NonTensorData(data=[1, 2]), "z": NonTensorData(data=[1, 2, 3])}, [3])
    )
    assert found["x"].tolist() == ["same"] * 3
    assert found["y"].tolist() == [[1, 2]] * 3
    assert found["z"].tolist() == [1, 2, 3]


def test_the_value_of_a_batch_of_one_row_is_not_a_list_of_one() -> None:
    """Alone it comes back as it stands; beside other rows it is one of their values."""
    alone = TensorDict({"x": NonTensorData(data=[5])}, [1])
    assert read_back(alone)["x"] == read_back({"x": NonTensorData(data=[5])})["x"] == [5]
    assert read_back(alone, {"x": ["a", [6]]}, rows=[(1, 0), (0, 0), (1, 1)])["x"].tolist() == ["a", [5], [6]]


def test_dicts_of_tensors_are_values_per_row() -> None:
    """A row may be a dict of tensors, as multi-modal inputs are."""
    rows = [{"pixels": torch.rand(2, 3), "grid": np.arange(3)}, {}]
    found = read_back({"mm": rows})["mm"].tolist()
    same(found[0]["pixels"], rows[0]["pixels"])
    assert found[0]["grid"].tolist() == [0, 1, 2] and found[1] == {}


@pytest.mark.parametrize("dtype", ["bool", "<i4", ">f8", "complex64", "uint16", "float16"])
def test_numeric_arrays_are_tensors(dtype: str) -> None:
    """A NumPy array of numbers is stored as the tensor with its values, whatever its strides and byte order."""
    array = np.arange(12).astype(dtype).reshape(4, 3)[::-1, ::2]
    found = read_back({"x": array})["x"]
    np.testing.assert_array_equal(found.numpy(), array)
    assert found.dtype == torch.from_numpy(np.zeros(1, np.dtype(dtype).newbyteorder("="))).dtype


def test_lazily_stacked_tensordicts_are_stored() -> None:
    """A lazy stack whose rows differ in shape becomes a ragged field."""
    rows = [TensorDict({"x": torch.arange(length), "t": f"{length}"}) for length in (2, 4)]
    found = read_back(lazy_stack(rows))
    same_rows(found["x"], [torch.arange(2), torch.arange(4)])
    assert found["t"].tolist() == ["2", "4"]


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ({"a": torch.ones(3), "b": ["x"] * 2}, InvalidArgument, "'a' has 3, 'b' has 2"),
        ({"a": torch.tensor(1.0)}, InvalidArgument, "'a' is a single value"),
        ({"a": np.array(1.0)}, InvalidArgument, "'a' is a single value"),
        ({"a": TensorDict({"b": torch.ones(2)}, [2])}, InvalidArgument, "'a' is a TensorDict"),
        (TensorDict({"a": TensorDict({"b": torch.ones(2)}, [2])}, [2]), InvalidArgument, "'a' is a TensorDict"),
        (TensorDict({"a": torch.ones(2)}, []), InvalidArgument, "batch size"),
        ({"a": {"b": 1}}, InvalidArgument, "'a' is a dict"),
        ({"a": [1, object()]}, EncodeError, r"'a', row 1 \(builtins.object\)"),
        ({"a": "text"}, EncodeError, "'a' is a str"),
        ({"a": torch.ones(2).to_sparse()}, EncodeError, "'a' is a torch.sparse_coo"),
        ({"a": torch.ones(2, device="meta")}, EncodeError, "'a' is a torch.strided on meta"),
        ({"a": np.ones(2, np.longdouble)}, EncodeError, "'a' has NumPy type"),
        ({1: torch.ones(2)}, InvalidArgument, "field names"),
        ([torch.ones(2)], WrongType, "not list"),
    ],
    ids=str,
)
def test_what_cannot_be_stored_is_named(data: Any, error: type[Exception], text: str) -> None:
    """Errors name the field, and the row and type where one value is to blame."""
    with pytest.raises(error, match=text):
        columns.encode(data)


def test_pickle_is_used_only_if_allowed() -> None:
    """An object that needs pickle is refused, unless the client allows it on both sides."""
    data = {"x": [range(3), "plain"]}
    with pytest.raises(EncodeError, match="builtins.range"):
        columns.encode(data)
    assert read_back(data, allow_pickle=True)["x"].tolist() == [range(3), "plain"]


def test_unknown_layouts_and_empty_batches() -> None:
    """A wrong layout lists the known ones; a batch without rows is a batch."""
    with pytest.raises(UnknownName, match="did you mean 'jagged'"):
        columns.decode({}, 0, layout="jaged")
    assert columns.empty().batch_size == torch.Size([0])
    assert columns.encode({}) == (0, [])


@given(st.lists(st.one_of(st.text(), st.binary(), st.integers(), st.floats(), st.booleans(), st.none()), min_size=1))
def test_any_list_of_simple_values_survives(rows: list[Any]) -> None:
    """Any mixture of simple values comes back bit for bit."""
    found = read_back({"x": rows})["x"].tolist()
    assert [(type(value), repr(value)) for value in found] == [(type(row), repr(row)) for row in rows]
