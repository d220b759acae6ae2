"""Data types, objects and memory of what comes back; the numbers are those of the drop-in checklist."""

from __future__ import annotations

import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from tests.dropin.columns import DTYPES, form_of, jagged, numbers, objects, put, rows_of, same
from transfer_queue import TransferQueueClient
from transfer_queue.config import LAYOUTS, merged, settings
from transfer_queue.messages import GetUnitStats
from transfer_queue.runtime.embedded import EmbeddedRuntime

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")


# ---------------------------------------------------------------- data types


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_37_every_dtype_comes_back_bit_for_bit(client: Any, partition: str, dtype: torch.dtype, layout: str) -> None:
    """Every bit pattern that the type has room for, NaN and infinity among them: dense, jagged and as objects."""
    patterns = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(dtype.itemsize)
    if dtype is torch.bool:
        patterns = patterns & 1
    else:
        patterns = patterns[torch.randperm(len(patterns))]
    dense = patterns.view(dtype).reshape(16, -1)
    ragged = torch.nested.nested_tensor_from_jagged(dense.reshape(-1).clone(), torch.tensor([0, 7, 7, 256]))
    rows = [row.clone() for row in dense]
    data = {"dense": dense[:3], "jagged": ragged, "row": NonTensorStack(*(NonTensorData(row) for row in rows[:3]))}
    got = client.get_data(client.put(TensorDict(data, [3]), partition_id=partition), layout=layout)
    same(rows_of(got["dense"]), rows[:3])
    same(rows_of(got["jagged"]), list(ragged.unbind()))
    same(list(got["row"]), rows[:3])
    assert got["dense"].dtype == got["jagged"].dtype == dtype


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype.is_floating_point and dtype.itemsize > 1], ids=str
)
def test_37_nan_and_infinity(client: Any, partition: str, dtype: torch.dtype) -> None:
    """Also the sign of zero."""
    special = torch.tensor([[float("nan"), float("inf")], [float("-inf"), -0.0]], dtype=dtype)
    same(client.get_data(put(client, partition, special))["x"], special)


def test_37_a_conflict_of_dtypes_names_both_and_writes_nothing(client: Any, partition: str) -> None:
    """Refused for new rows and for rows that have other columns, whatever else the put brings; the space is free."""
    meta = client.put({"x": torch.zeros(2), "y": torch.zeros(2, 3)}, partition_id=partition)
    stored = _bytes_live(client)
    wrong = {"new": torch.zeros(2, 3), "x": torch.zeros(2, dtype=torch.int64)}
    for rows in ({"partition_id": partition}, {"metadata": meta}):
        with pytest.raises(ValueError, match=r"'x'.*float32.*int64"):
            client.put(wrong, **rows)
    with pytest.raises(ValueError, match=r"'y'.*float32.*bfloat16"):
        client.put({"y": jagged(1, 2, dtype=torch.bfloat16)}, partition_id=partition)
    whole = client.get_meta(["x"], 2, partition, task_name="t", mode="force_fetch")
    assert len(whole) == 2 and _bytes_live(client) == stored
    assert client.get_meta(["new"], 2, partition, task_name="t", mode="force_fetch").production_status.sum() == 0
    same(client.get_data(whole)["x"], torch.zeros(2))


def _bytes_live(client: Any) -> int:
    """Bytes of live rows in the one unit of the queue, which the client met when it put."""
    report = client._core.transfer.units.get(1).peer.begin(GetUnitStats()).result(10)
    return int(report.entries["bytes_live"])


def test_22_a_column_without_rows_forgets_its_dtype(client: Any, partition: str) -> None:
    """Dummy rows of float32 register columns; when they are cleared, integers, jagged rows and objects take over."""
    names = ("ids", "tokens", "raw")
    for _ in range(2):
        dummy = client.put(
            TensorDict({name: torch.zeros(1) for name in names}, [1]), partition_id=partition, keys=["dummy"]
        )
        client.clear_samples(dummy)
        data = {"ids": torch.arange(2), "tokens": jagged(2, 3, dtype=torch.int32), "raw": objects({"a": 1}, "b")}
        meta = client.put(TensorDict(data, [2]), partition_id=partition)
        got = client.get_data(meta)
        same(got["ids"], torch.arange(2))
        assert got["tokens"].dtype == torch.int32 and list(got["raw"]) == [{"a": 1}, "b"]
        with pytest.raises(ValueError, match="'ids'"):
            client.put({"ids": torch.zeros(1)}, partition_id=partition)
        client.clear_samples(meta)


# ---------------------------------------------------------------- objects

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}]
VALUES: dict[str, list[Any]] = {
    "empty": [{}, [], "", None, (), b""],
    "tuples": [(1, "a"), (), ((1, 2), [3, (4,)]), {"t": (1,)}],
    "chats": [CHAT, [], CHAT[:1]],
    "numbers": [1, True, 2.5, -(2**80), float("inf")],
    "text": ["", "ünïcode", "\ud800", "a" * 5000],
    "NumPy values": [np.float32(1.5), np.int8(-3), np.str_("x"), np.bytes_(b"y"), np.bool_(True)],
    "arrays": [np.arange(3), np.empty((0, 2)), np.array(["a", "bc"]), np.array([b"a", b"bc"]), objects({"a": 1}, None)],
    "tensors": [{"pixels": torch.rand(2, 3), "grid": torch.tensor([[1, 2]])}, {}, {"pixels": torch.empty(0, 3)}],
    "torch types": [{"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.tensor(True)}, (torch.arange(2),)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", VALUES.values(), ids=VALUES.keys())
def test_38_object_columns(client: Any, partition: str, rows: list[Any], layout: str) -> None:
    """As stack, array, payload with an entry per row, and list: each value in its place, of its type."""
    data = {
        "stack": NonTensorStack(*(NonTensorData(row) for row in rows)),
        "array": objects(*rows),
        "payload": NonTensorData(data=list(rows)),
        "tuple": NonTensorData(data=tuple(rows)),
    }
    meta = client.put(TensorDict(data, [len(rows)]), partition_id=partition)
    got = client.get_data(meta, layout=layout)
    for name in data:
        assert form_of(got.get(name)) == "stack"
        same(list(got[name]), rows)
        same(got[name].tolist(), rows)
    position = len(rows) - 1
    one = client.get_data(meta.select_samples([position]), layout=layout)
    same(one["stack"].tolist(), rows[position:])
    same(pickle.loads(pickle.dumps(got))["stack"].tolist(), rows)


def test_38_arrays_of_two_dimensions_are_a_row_each(client: Any, partition: str) -> None:
    """Of objects or of text: the rows stay arrays."""
    for square in (np.array([["a", 1], ["b", None]], object), np.array([["a", "b"], ["c", "d"]])):
        got = client.get_data(client.put(TensorDict({"x": square}, [2]), partition_id=partition))
        same(got["x"].tolist(), list(square))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_38_one_payload_for_all_rows(client: Any, partition: str, layout: str) -> None:
    """Without an entry per row the payload is the value of every row, a copy for each."""
    data = TensorDict({"x": NonTensorData(data=[1, 2]), "s": "same", "n": NonTensorData(data=None)}, [3])
    got = client.get_data(client.put(data, partition_id=partition), layout=layout)
    assert got["x"].tolist() == [[1, 2]] * 3 and got["s"].tolist() == ["same"] * 3 and got["n"].tolist() == [None] * 3
    got["x"][0].append(3)
    assert got["x"].tolist() == [[1, 2, 3], [1, 2], [1, 2]]


PAYLOADS: list[Any] = [
    [5],
    [5, 6, 7],
    [],
    (1, 2),
    "text",
    {"a": [1]},
    None,
    True,
    3,
    2.5,
    [torch.ones(2)],
    np.arange(3),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("payload", PAYLOADS, ids=repr)
def test_55_non_tensor_data_on_one_row(client: Any, partition: str, payload: Any, layout: str) -> None:
    """The payload itself, whatever its length; with another row it is one value of two."""
    one = client.put(TensorDict({"x": NonTensorData(data=payload, batch_size=[1])}, [1]), partition_id=partition)
    got = client.get_data(pickle.loads(pickle.dumps(one)), layout=layout)
    assert form_of(got.get("x")) == "payload" and got.batch_size == (1,)
    same(got["x"], payload)
    both = put(client, partition, NonTensorStack("other"))
    same(list(client.get_data(both, layout=layout)["x"]), [payload, "other"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_55_a_column_over_4_gib() -> None:
    """Sizes and offsets beyond 32 bits: the rows around the limit come back, from a queue with room for it."""
    available = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    if available is None or min(int(available[1]) << 10, shutil.disk_usage("/dev/shm").free // 2) < 6 << 30:
        pytest.skip("needs 6 GiB of free memory, and a /dev/shm of which half is as much")
    lengths = torch.tensor([(4 << 30) - 3, 5, 1000])
    values = torch.zeros(int(lengths.sum()), dtype=torch.uint8)
    values[-1008:] = torch.arange(1008) % 251
    column = torch.nested.nested_tensor_from_jagged(values, torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    runtime = EmbeddedRuntime(settings(merged({"runtime": "embedded"})))
    try:
        with TransferQueueClient("large", runtime.info, connector=runtime) as client:
            meta = client.put(TensorDict({"x": column}, [3]), partition_id="large")
            for rows in ([1, 2], [2]):
                found = client.get_data(meta.select_samples(rows))["x"]
                same(rows_of(found), [rows_of(column)[row] for row in rows])
            view = client.get_data(meta, copy=False)["x"]
            assert view.offsets().tolist() == column.offsets().tolist()
            assert view.values()[-1008:].equal(values[-1008:])
            del found, view
    finally:
        runtime.close()


# ---------------------------------------------------------------- memory


def _mixed(rows: int, width: int) -> TensorDict:
    """Every form of column, each with about 4 × `width` bytes in a row."""
    return TensorDict(
        {
            "dense": torch.rand(rows, width),
            "jagged": jagged(*[width] * rows),
            "other": torch.rand(rows, width),
            "text": ["a" * 4 * width] * rows,
            "dict": [{"pixels": torch.rand(width)} for _ in range(rows)],
            "scalar": torch.arange(rows),
        },
        [rows],
    )


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_39_results_are_writable_and_share_nothing(client: Any, partition: str, layout: str, copy: bool) -> None:
    """Not with storage, not with each other, not one column with another, not a row with its double."""
    meta = client.put(_mixed(4, 50), partition_id=partition)
    wanted = client.get_data(meta, layout="dense")
    got = client.get_data(meta, layout=layout, copy=copy)
    numeric = ("dense", "jagged", "other", "scalar")
    changed = {name: [row + 1 for row in rows_of(got[name])] for name in numeric}
    for name in numeric:
        (got[name].values() if got[name].is_nested else got[name]).add_(1)
    got["dict"][0]["pixels"].zero_()
    again = client.get_data(meta, layout="dense", copy=copy)
    for name in (*numeric, "text", "dict"):
        same(rows_of(again[name]), rows_of(wanted[name]))
    for name in numeric:
        same(rows_of(got[name]), changed[name])
    doubled = client.get_data(meta.select_samples([2, 2]), layout="dense", copy=copy)
    doubled["dense"][0].zero_()
    doubled["dict"][0]["pixels"].zero_()
    same(doubled["dense"][1], wanted["dense"][2])
    same(doubled["dict"][1]["pixels"], wanted["dict"][2]["pixels"])


@pytest.mark.parametrize("width", [64, 1 << 14])
@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_39_a_row_pickles_to_its_own_size(client: Any, partition: str, layout: str, copy: bool, width: int) -> None:
    """So do columns and batches: none takes the put along that it came with, nor the other columns of the result."""
    rows, row_bytes = 16, 4 * width
    meta = client.put(_mixed(rows, width), partition_id=partition)
    one = client.get_data(meta.select_samples([3]), layout=layout, copy=copy)
    several = client.get_data(meta, layout=layout, copy=copy)
    for name in ("dense", "jagged", "other", "text", "dict"):
        assert row_bytes < len(pickle.dumps(one.get(name))) < row_bytes + 8000
        assert row_bytes < len(pickle.dumps(one[name])) < row_bytes + 8000
        assert len(pickle.dumps(several.get(name))) < rows * (row_bytes + 2000) + 8000
    for name in ("text", "dict"):
        assert len(pickle.dumps(several[name][5])) < row_bytes + 1000
    assert len(pickle.dumps(several[5]["dense"].clone())) < row_bytes + 1000


def test_39_tensors_of_a_list_pickle_alone(client: Any, partition: str) -> None:
    """Rows of two ranks, and rows that no tensor can nest: each has memory of its own."""
    wide = put(client, partition, numbers(4, 1000), numbers(4, 2, 1000), numbers(4))
    for row in client.get_data(wide)["x"]:
        assert len(pickle.dumps(row)) < 4 * row.numel() + 1000
    client.clear_samples(wide)
    half = put(client, partition, numbers(4, 2, 3000).to(torch.float8_e5m2), numbers(4, 1, 3001).to(torch.float8_e5m2))
    for row in client.get_data(half)["x"]:
        assert row.untyped_storage().nbytes() == row.numel()
