"""BatchMeta: rows, fields, status, tags, extra info, pickling. Cutting and joining have a file of their own."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
import torch

from transfer_queue.errors import InvalidArgument, TransferQueueError, UnknownName, WrongType
from transfer_queue.metadata import BatchMeta, Coded, FieldLocation, FieldSchema

DENSE = {"dtype": torch.float32, "shape": (4,), "is_nested": False, "is_non_tensor": False}
TEXT = {"dtype": None, "shape": None, "is_nested": False, "is_non_tensor": True}
RAGGED = {
    "dtype": torch.int64,
    "shape": None,
    "is_nested": True,
    "is_non_tensor": False,
    "per_sample_shapes": [(3,), (0,), (3,)],
}


def hand_made(**changes: Any) -> BatchMeta:
    arguments: dict[str, Any] = {
        "global_indexes": [7, 3, 5],
        "partition_ids": ["a", "a", "b"],
        "field_schema": {"x": DENSE, "tokens": RAGGED, "name": TEXT},
        "production_status": [1, 0, 1],
        "extra_info": {"step": 4},
        "custom_meta": [{"n": 1}, {}, {"n": 3}],
    }
    return BatchMeta(**{**arguments, **changes})


def fetched(size: int = 6, **changes: Any) -> BatchMeta:
    location = FieldLocation(("x", "tokens"), np.full(size, 1 << 48), np.arange(size))
    arguments: dict[str, Any] = {
        "partition_id": "train_0",
        "indexes": np.arange(10, 10 + size),
        "generations": np.full(size, 2),
        "fields": {"x": FieldSchema("float32", (4,)), "tokens": FieldSchema("int64", is_nested=True)},
        "locations": (location,),
        "keys": [f"key-{row}" for row in range(size)],
        "tags": [{"n": row, "status": "running"} for row in range(size)],
        "group_ids": [row // 2 for row in range(size)],
    }
    return BatchMeta.from_columns(**{**arguments, **changes})


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize("meta", [BatchMeta(), BatchMeta(samples=[]), BatchMeta.empty(), BatchMeta((), [], {}, [])])
def test_an_empty_meta_is_false_and_has_nothing(meta: BatchMeta) -> None:
    """Without arguments there are no rows, no fields, nothing ready and an empty extra info."""
    assert not meta
    assert len(meta) == meta.size == 0
    assert meta.global_indexes == []
    assert meta.partition_ids == []
    assert meta.partitions == ()
    assert meta.field_names == []
    assert meta.field_schema == {}
    assert meta.custom_meta == []
    assert meta.samples == []
    assert meta.extra_info == {}
    assert meta.production_status.shape == (0,)
    assert not meta.is_ready
    assert repr(meta) == "<BatchMeta: empty>"


def test_a_meta_says_what_it_was_given() -> None:
    """Every argument comes back from the attribute of its name, field names sorted."""
    meta = hand_made()
    assert meta
    assert meta.size == len(meta) == 3
    assert meta.global_indexes == [7, 3, 5]
    assert all(type(index) is int for index in meta.global_indexes)
    assert meta.partition_ids == ["a", "a", "b"]
    assert meta.partitions == ("a", "b")
    assert meta.field_names == ["name", "tokens", "x"]
    assert meta.field_schema == {"x": DENSE, "tokens": RAGGED, "name": TEXT}
    assert meta.production_status.tolist() == [1, 0, 1]
    assert meta.production_status.dtype == np.int8
    assert meta.custom_meta == [{"n": 1}, {}, {"n": 3}]
    assert meta.extra_info == {"step": 4}
    assert meta.generations.tolist() == [-1, -1, -1]
    assert (meta.keys, meta.group_ids, meta.locations, meta.lease_token, meta.lease_deadline_s) == (
        None,
        None,
        (),
        None,
        None,
    )
    assert repr(meta) == "<BatchMeta a+b: 3 samples, 2 ready, fields name, tokens, x>"


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda values: (value for value in values)])
def test_indexes_may_be_any_sequence_of_integers(kind: Any) -> None:
    """Lists, tuples, arrays, tensors and generators of indexes are the same; NumPy integers count as integers."""
    assert BatchMeta(kind([4, 2]), ["p", "p"]).global_indexes == [4, 2]
    assert BatchMeta([np.int32(4)], [np.str_("p")]).partition_ids == ["p"]


def test_what_is_given_is_copied() -> None:
    """Later changes of the caller's containers do not reach the meta."""
    given: dict[str, Any] = {
        "global_indexes": [1],
        "partition_ids": ["p"],
        "field_schema": {"x": dict(DENSE)},
        "production_status": np.ones(1, np.int8),
        "extra_info": {"a": 1},
        "custom_meta": [{"list": [1]}],
    }
    meta = BatchMeta(**given)
    before = meta.copy()
    given["global_indexes"][0] = 9
    given["partition_ids"][0] = "q"
    given["field_schema"]["x"]["shape"] = (9,)
    given["production_status"][0] = 0
    given["extra_info"]["a"] = 2
    given["custom_meta"][0]["list"].append(2)
    assert meta == before


def test_the_meta_of_a_draw_keeps_what_the_controller_said() -> None:
    """Generations, keys, groups, locations and lease are there; without `produced` all rows are ready."""
    meta = fetched(lease_token=17, lease_deadline_s=2.5)
    assert meta.is_ready
    assert meta.indexes.tolist() == meta.global_indexes == [10, 11, 12, 13, 14, 15]
    assert meta.generations.tolist() == [2] * 6
    assert meta.partition_ids == ["train_0"] * 6
    assert meta.keys == [f"key-{row}" for row in range(6)]
    assert meta.group_ids == [0, 0, 1, 1, 2, 2]
    assert list(meta.schemas) == ["tokens", "x"]
    assert [location.fields for location in meta.locations] == [("x", "tokens")]
    assert (meta.lease_token, meta.lease_deadline_s) == (17, 2.5)
    assert not fetched(produced=np.array([1, 1, 0, 1, 1, 1])).is_ready
    assert repr(meta) == "<BatchMeta train_0: 6 samples, 6 ready, fields tokens, x, lease 17>"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"partition_ids": ["a"]}, ValueError),
        ({"production_status": [1, 1]}, ValueError),
        ({"production_status": [1, 2, 0]}, ValueError),
        ({"custom_meta": [{}]}, ValueError),
        ({"_custom_backend_meta": [{}]}, ValueError),
        ({"global_indexes": [1, -2, 3]}, ValueError),
        ({"global_indexes": [[1, 2, 3]]}, ValueError),
        ({"field_schema": {"x": {**RAGGED, "per_sample_shapes": [(1,)]}}}, ValueError),
        ({"field_schema": {"x": {"colour": 1}}}, ValueError),
        ({"global_indexes": "abc"}, TypeError),
        ({"global_indexes": [1.0, 2.0, 3.0]}, TypeError),
        ({"global_indexes": [True, False, True]}, TypeError),
        ({"partition_ids": "aab"}, TypeError),
        ({"partition_ids": ["a", "a", 3]}, TypeError),
        ({"partition_ids": 3}, TypeError),
        ({"field_schema": ["x"]}, TypeError),
        ({"field_schema": {"x": torch.float32}}, TypeError),
        ({"field_schema": {3: DENSE}}, TypeError),
        ({"field_schema": {"x": {"shape": 4}}}, TypeError),
        ({"custom_meta": [{}, {}, "tag"]}, TypeError),
        ({"custom_meta": {"a": 1}}, TypeError),
        ({"extra_info": [1]}, TypeError),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    """Lengths that disagree are a ValueError, wrong types a TypeError; both are errors of this library."""
    with pytest.raises(error) as caught:
        hand_made(**changes)
    assert isinstance(caught.value, TransferQueueError)


# ---------------------------------------------------------------- attributes


def test_attributes_are_assignable() -> None:
    """Each attribute can be replaced as a whole, with the checks of the constructor."""
    meta = hand_made()
    meta.global_indexes = [1, 2, 3]
    meta.partition_ids = ["c", "c", "c"]
    meta.field_schema = {"y": DENSE}
    meta.production_status = [1, 1, 1]
    meta.extra_info = {"b": 2}
    meta.custom_meta = [{"t": 1}, {"t": 2}, None]
    assert meta.global_indexes == [1, 2, 3]
    assert meta.partition_ids == ["c", "c", "c"]
    assert meta.field_names == ["y"]
    assert meta.is_ready
    assert meta.extra_info == {"b": 2}
    assert meta.custom_meta == [{"t": 1}, {"t": 2}, {}]
    for name, value in [("global_indexes", [1]), ("partition_ids", ["c"]), ("production_status", [1])]:
        with pytest.raises(InvalidArgument, match="3 samples"):
            setattr(meta, name, value)


def test_assigning_other_indexes_forgets_what_named_the_old_rows() -> None:
    """Generations, locations, keys and lease belong to the rows; the same indexes assigned again change nothing."""
    meta = fetched(lease_token=1)
    meta.global_indexes = meta.global_indexes
    assert meta == fetched()
    assert meta.locations
    meta.global_indexes = range(6)
    assert meta.generations.tolist() == [-1] * 6
    assert (meta.locations, meta.keys, meta.group_ids, meta.lease_token) == ((), None, None, None)


def test_production_status_can_be_written_to() -> None:
    """The status array is the meta's own and stays writable through pickling, copying and cutting."""
    for make in (lambda meta: meta, copy.deepcopy, lambda meta: pickle.loads(pickle.dumps(meta)), lambda meta: meta[:]):
        original = fetched()
        meta = make(original)
        meta.production_status[1] = 0
        assert not meta.is_ready
        assert original.is_ready == (meta is not original)
        meta.production_status[:] = 1
        assert meta.is_ready


def test_dtypes_and_shapes_per_row() -> None:
    """Both are lists with one entry per row; unknown ragged shapes are None; an unknown column is a KeyError."""
    meta = hand_made()
    assert meta.get_dtypes("x") == [torch.float32] * 3
    assert meta.get_shapes("x") == [(4,)] * 3
    assert meta.get_shapes("tokens") == [(3,), (0,), (3,)]
    assert meta.get_dtypes("name") == [None] * 3
    assert fetched(2).get_shapes("tokens") == [None, None]
    for ask in (meta.get_dtypes, meta.get_shapes):
        with pytest.raises(KeyError, match="did you mean 'tokens'") as caught:
            ask("tokns")
        assert isinstance(caught.value, UnknownName)


def test_samples_are_read_only_rows() -> None:
    """Rows tell index, partition, status, tag and fields; a field's entries answer by item and by attribute."""
    meta = hand_made()
    rows = meta.samples
    assert len(rows) == 3
    assert [row.global_index for row in rows] == [7, 3, 5]
    assert rows[-1].partition_id == "b"
    assert rows[1].production_status == 0
    assert rows[2].custom_meta == {"n": 3}
    assert rows[0].fields["x"].shape[0] == rows[0].fields["x"]["shape"][0] == 4
    assert rows[1].fields["tokens"].shape == (0,)
    assert rows[1].fields["tokens"]["dtype"] == torch.int64
    assert dict(rows[0].fields["name"]) == TEXT
    assert rows[0:2] == [rows[0], rows[1]]
    assert rows == list(rows)
    assert rows != []
    rows[2].custom_meta["n"] = 9
    assert meta.custom_meta[2] == {"n": 3}
    with pytest.raises(AttributeError):
        rows[0].global_index = 1
    with pytest.raises(IndexError):
        rows[3]
    with pytest.raises(KeyError):
        rows[0].fields["x"]["colour"]


def test_a_meta_can_be_made_of_samples() -> None:
    """Rows of several metas make a new one; rows and row arguments together are refused."""
    meta = hand_made()
    made = BatchMeta(samples=[meta.samples[2], meta.samples[0]], extra_info={"step": 4})
    assert made == meta.select_samples([2, 0])
    assert BatchMeta(samples=fetched().samples).generations.tolist() == [2] * 6
    with pytest.raises(InvalidArgument, match="not both"):
        BatchMeta([1], ["p"], samples=meta.samples)
    with pytest.raises(WrongType, match="rows of a BatchMeta"):
        BatchMeta(samples=[{"global_index": 1}])


def test_extra_info() -> None:
    """It is a dict of the caller's own, never None, with a method for each thing one does to it."""
    meta = BatchMeta(extra_info={"a": [1]})
    meta.set_extra_info("b", 2)
    meta.update_extra_info({"c": 3})
    meta.extra_info["d"] = 4
    assert meta.get_extra_info("b") == 2
    assert meta.get_extra_info("z") is None
    assert meta.get_extra_info("z", 5) == 5
    assert meta.has_extra_info("d")
    assert not meta.has_extra_info("z")
    assert meta.remove_extra_info("d") == 4
    assert meta.remove_extra_info("d") is None
    copied = meta.get_all_extra_info()
    assert copied == {"a": [1], "b": 2, "c": 3}
    copied["a"].append(2)
    assert meta.extra_info["a"] == [1]
    meta.clear_extra_info()
    assert meta.extra_info == {}
    meta.extra_info = None
    assert meta.extra_info == {}
    with pytest.raises(WrongType):
        meta.update_extra_info(3)
    assert BatchMeta.empty({"a": 1}).extra_info == {"a": 1}


# ---------------------------------------------------------------- travelling


@pytest.mark.parametrize("travel", [pickle, cloudpickle])
@pytest.mark.parametrize("make", [BatchMeta, hand_made, fetched], ids=["empty", "hand_made", "fetched"])
def test_metas_survive_pickling(travel: Any, make: Any) -> None:
    """A meta comes back equal, with everything the client needs."""
    meta = make()
    back = travel.loads(travel.dumps(meta))
    assert back == meta
    assert type(back) is BatchMeta
    assert (back.keys, back.group_ids) == (meta.keys, meta.group_ids)
    assert [location.fields for location in back.locations] == [location.fields for location in meta.locations]
    for ours, theirs in zip(meta.locations, back.locations, strict=True):
        assert ours.blocks.tolist() == theirs.blocks.tolist()
        assert ours.slots.tolist() == theirs.slots.tolist()


def test_copies_are_deep() -> None:
    """Nothing that is changed in a copy changes the original."""
    for make in (copy.deepcopy, BatchMeta.copy):
        meta = hand_made(extra_info={"deep": [1]}, custom_meta=[{"deep": [1]}, {}, {}])
        copied = make(meta)
        assert copied == meta
        copied.extra_info["deep"].append(2)
        copied.custom_meta[0]["deep"].append(2)
        copied.production_status[:] = 0
        copied.reorder([2, 1, 0])
        assert meta == hand_made(extra_info={"deep": [1]}, custom_meta=[{"deep": [1]}, {}, {}])


@pytest.mark.parametrize(
    "other",
    [
        hand_made(global_indexes=[7, 3, 6]),
        hand_made(partition_ids=["a", "b", "b"]),
        hand_made(production_status=None),
        hand_made(extra_info={"step": 5}),
        hand_made(custom_meta=None),
        hand_made(field_schema={"x": DENSE}),
        hand_made()[:2],
        BatchMeta(),
        "meta",
    ],
)
def test_metas_differ_where_their_content_differs(other: Any) -> None:
    """Equality compares rows, fields, status, tags and extra info."""
    assert hand_made() == hand_made()
    assert hand_made() != other


def seconds_of_work(action: Callable[[], object]) -> float:
    start = time.thread_time()
    action()
    return time.thread_time() - start


def test_a_large_meta_pickles_small_and_fast() -> None:
    """16384 rows × 5 fields, ragged ones with the shape of each row: less than 1 MB and 5 ms of work."""
    random = np.random.default_rng(0)
    size = 16384
    names = [f"field_{number}" for number in range(5)]
    shapes = [Coded([(length,) for length in range(512)], random.integers(0, 512, size)) for _ in names]
    schemas = [FieldSchema("int64", is_nested=True, row_shapes=column) for column in shapes]
    places = [FieldLocation((name,), random.integers(0, 512, size) + (3 << 48), np.arange(size)) for name in names]
    meta = fetched(
        size,
        indexes=random.permutation(size),
        fields=dict(zip(names, schemas, strict=True)),
        locations=places,
        keys=None,
        tags=None,
        group_ids=None,
    )
    data = pickle.dumps(meta)
    assert len(data) < 1_000_000
    assert any(seconds_of_work(lambda: pickle.dumps(meta)) < 0.005 for _ in range(200))  # one quiet moment is enough
    assert pickle.loads(data) == meta


def test_metas_need_no_torch() -> None:
    """Making, cutting, pickling and showing metas imports neither torch nor tensordict nor ray."""
    program = """
import pickle, sys
import numpy as np
from transfer_queue.metadata import BatchMeta, FieldSchema
meta = BatchMeta.from_columns(partition_id="p", indexes=np.arange(4), generations=np.zeros(4, np.int64),
                              fields={"x": FieldSchema("bfloat16", (2,))})
meta = BatchMeta.concat(pickle.loads(pickle.dumps(meta)).chunk(2))
print(meta, meta.samples[0].fields["x"].shape, meta.get_shapes("x"), meta == meta[:])
assert not {"torch", "tensordict", "ray", "zmq"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
