"""Fields shared by groups of rows: one value per group is encoded, whatever form it comes in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, lazy_stack

from transfer_queue.client.columns import encode
from transfer_queue.client.sharing import Sharing
from transfer_queue.errors import EncodeError, InvalidArgument, UnknownName
from transfer_queue.storage.block import EncodedColumn

GROUPS = ["b", "a", "a", 7, "b"]
OF_ROWS = [0, 1, 1, 2, 0]  # number of the group of each row

SMALL = torch.arange(9.0).reshape(3, 3)
LARGE = torch.arange(3 * 8192.0).reshape(3, 8192)
RAGGED = [torch.arange(3), torch.arange(0), torch.arange(5)]
SQUARE = [torch.ones(2, 3), torch.ones(1, 1), torch.ones(4, 2)]


def encoded(values: Any) -> EncodedColumn:
    count, [column] = encode({"x": values}, sharing=Sharing.of(["x"], GROUPS))
    assert count == len(GROUPS)
    return column


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def of_rows(entries: list[Any]) -> list[Any]:
    return [entries[group] for group in OF_ROWS]


@pytest.mark.parametrize(
    ("per_group", "per_row"),
    [
        (SMALL, SMALL[OF_ROWS]),
        (LARGE, LARGE[OF_ROWS]),
        (LARGE.bfloat16(), LARGE.bfloat16()[OF_ROWS]),
        (SMALL[:, 0], SMALL[OF_ROWS, 0]),
        (LARGE.numpy(), LARGE.numpy()[OF_ROWS]),
        (SMALL.numpy().astype(">f8"), SMALL.numpy().astype(">f8")[OF_ROWS]),
        (np.array(["x", "yy", ""]), np.array(["x", "yy", ""])[OF_ROWS]),
        (nested(RAGGED), nested(of_rows(RAGGED))),
        (SQUARE, of_rows(SQUARE)),
        (RAGGED, of_rows(RAGGED)),
        (["é", "", "long"], of_rows(["é", "", "long"])),
        ((b"1", b"22", b""), tuple(of_rows([b"1", b"22", b""]))),
        ([1, 2, 3], of_rows([1, 2, 3])),
        ([True, None, {"k": [1, SMALL]}], of_rows([True, None, {"k": [1, SMALL]}])),
    ],
)
def test_an_entry_per_group_and_an_entry_per_row_are_stored_alike(per_group: Any, per_row: Any) -> None:
    """The values are those that a put of the groups' entries as rows would store, with a reference per row."""
    _, [alone] = encode({"x": per_group})
    for column in (encoded(per_group), encoded(per_row)):
        assert column.references is not None and column.references.tolist() == OF_ROWS
        assert column.size_bytes == alone.size_bytes
        assert b"".join(map(bytes, column.values)) == b"".join(map(bytes, alone.values))
        assert [getattr(column.spec, name) for name in ("name", "layout", "dtype", "shape")] == [
            getattr(alone.spec, name) for name in ("name", "layout", "dtype", "shape")
        ]
        for found, wanted in ((column.offsets, alone.offsets), (column.shapes, alone.shapes)):
            np.testing.assert_array_equal(found, wanted)


def test_entries_of_tensordicts_are_shared_too() -> None:
    """Tensors, values per row, values for the whole batch and lazily stacked rows."""
    data = TensorDict({"x": LARGE[OF_ROWS], "n": torch.arange(5)}, batch_size=[5])
    data["text"] = of_rows(["r", "s", "t"])
    data.set_non_tensor("one", "same")
    count, columns = encode(data, sharing=Sharing.of(["x", "text", "one"], GROUPS))
    found = {column.spec.name: column for column in columns}
    assert count == 5 and found["n"].references is None
    assert found["x"].size_bytes == LARGE.nbytes
    assert bytes(found["text"].values[0]) == b"rst" and bytes(found["one"].values[0]) == b"samesamesame"
    lazy = lazy_stack([TensorDict({"x": RAGGED[group]}) for group in OF_ROWS])
    _, [column] = encode(lazy, sharing=Sharing.of(["x"], GROUPS))
    assert (column.spec.layout, column.size_bytes) == ("ragged", 8 * 8)


def test_large_rows_are_not_copied() -> None:
    """The column looks at the caller's memory: rows of a tensor, and one row shown many times."""
    column = encoded(LARGE[OF_ROWS])
    assert len(column.values) == 3
    whole = LARGE[OF_ROWS]
    starts = [values.ctypes.data - whole.data_ptr() for values in encoded(whole).values]
    assert starts == [0, 1 * 4 * 8192, 3 * 4 * 8192]
    _, [column] = encode({"x": LARGE[:1].expand(4, -1)}, sharing=Sharing.of(["x"], ["g"] * 4))
    assert column.values[0].ctypes.data == LARGE.data_ptr() and column.size_bytes == 4 * 8192


def test_groups_of_one_row_share_nothing() -> None:
    """Where each row has a group of its own the column is a common one."""
    _, [column] = encode({"x": SMALL}, sharing=Sharing.of(["x"], ["a", "b", "c"]))
    assert column.references is None


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        (torch.zeros(4, 2), InvalidArgument, "field 'x' has 4 entries for 5 rows of 3 groups"),
        (["a"] * 2, InvalidArgument, "2 entries for 5 rows of 3 groups"),
        (torch.tensor(1.0), InvalidArgument, "single value"),
        ({"k": [1] * 5}, InvalidArgument, "field 'x' is a dict"),
        (torch.zeros(5, 2).to_sparse(), EncodeError, "sparse"),
        (torch.zeros(5, 9999, device="meta"), EncodeError, "meta"),
        ([object()] * 5, EncodeError, "'x', row 0 .*object"),
        (3, EncodeError, "field 'x' is a int"),
        (["a", "b", "bb", "c", "a"], InvalidArgument, "group 'a': row 1 is str of length 1, row 2 is str of length 2"),
        ([1, 1, 1, 1, 1.0], InvalidArgument, "group 'b': row 0 is int, row 4 is float"),
        (nested([torch.ones(n) for n in (1, 2, 3, 4, 1)]), InvalidArgument, r"float32 \[2\], row 2"),
        ([{"k": torch.ones(n)} for n in (1, 2, 3, 4, 1)], InvalidArgument, r"'k': Tensor torch.float32 \[2\], row 2"),
    ],
)
def test_what_is_not_shared_is_named(values: Any, error: type[Exception], text: str) -> None:
    """Entries that fit neither rows nor groups, that cannot be stored, or that differ in form within a group."""
    with pytest.raises(error, match=text):
        encoded(values)


def test_shared_fields_that_are_not_there_are_named() -> None:
    """With those that are, and the nearest."""
    with pytest.raises(UnknownName, match="'imag', which data does not have.*did you mean 'image'"):
        encode({"image": SMALL}, sharing=Sharing.of(["imag"], ["a", "b", "c"]))
