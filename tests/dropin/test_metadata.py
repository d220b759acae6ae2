"""`BatchMeta`, row by row of its table. Numbers in names are those of the checklist."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from tests.dropin.metas import FLOAT, INT, RAGGED, batch, keyed, model_of, model_of_keys, rows
from transfer_queue.metadata import BatchMeta, KVBatchMeta


@pytest.mark.parametrize("meta", [BatchMeta(), BatchMeta.empty(), BatchMeta(samples=[]), BatchMeta([], [], None)])
def test_32_everything_is_optional(meta: BatchMeta) -> None:
    """Without arguments a meta is empty, false and not ready."""
    assert not meta
    assert meta.size == len(meta) == 0
    assert (meta.global_indexes, meta.partition_ids, meta.field_names, meta.field_schema) == ([], [], [], {})
    assert (meta.custom_meta, meta.extra_info) == ([], {})
    assert (meta.production_status.dtype, meta.production_status.shape) == (np.int8, (0,))
    assert meta.is_ready is False


def test_32_arguments_by_position() -> None:
    """The order of the arguments is part of the contract."""
    meta = BatchMeta([1], ["p"], {"x": FLOAT}, [1], {"a": 1}, [{"t": 1}], [{"backend": 1}])
    assert (meta.global_indexes, meta.partition_ids, meta.field_names) == ([1], ["p"], ["x"])
    assert meta.is_ready is True
    assert (meta.extra_info, meta.custom_meta, meta.backend_meta) == ({"a": 1}, [{"t": 1}], [{"backend": 1}])


@pytest.mark.parametrize(
    "changes",
    [
        {"partition_ids": ["a"]},
        {"partition_ids": []},
        {"production_status": [1]},
        {"custom_meta": [{}]},
        {"_custom_backend_meta": [{}]},
        {"field_schema": {"t": RAGGED | {"per_sample_shapes": [(1,)]}}},
    ],
)
def test_32_lengths_must_agree(changes: dict[str, Any]) -> None:
    """Columns of other lengths are a ValueError."""
    with pytest.raises(ValueError, match="3 samples"):
        batch(**changes)


def test_32_containers_are_copied_in() -> None:
    """What the caller does to the given containers afterwards changes nothing."""
    given_values: dict[str, Any] = {
        "global_indexes": [1],
        "partition_ids": ["p"],
        "field_schema": {"x": dict(FLOAT)},
        "production_status": np.ones(1, np.int8),
        "extra_info": {"a": 1},
        "custom_meta": [{"list": [1]}],
    }
    meta = BatchMeta(**given_values)
    before = copy.deepcopy(meta)
    given_values["production_status"][0] = 0
    given_values["field_schema"]["x"]["shape"] = (9,)
    given_values["custom_meta"][0]["list"].append(2)
    for name in ("global_indexes", "partition_ids", "custom_meta", "extra_info", "field_schema"):
        given_values[name].clear()
    assert meta == before


def test_32_columns_of_rows() -> None:
    """Indexes are int, partitions str, field names sorted, shapes those of rows."""
    meta = batch()
    assert meta.global_indexes == [7, 3, 5]
    assert {type(index) for index in meta.global_indexes} == {int}
    assert meta.partition_ids == ["a", "a", "b"]
    assert meta.field_names == ["tokens", "x"]
    assert meta.field_schema == {"x": FLOAT, "tokens": RAGGED}
    assert meta.production_status.tolist() == [1, 0, 1]
    assert (meta.production_status.dtype, meta.is_ready) == (np.int8, False)
    meta.production_status[1] = 1
    assert meta.is_ready is True


def test_32_attributes_are_assignable() -> None:
    """Assigned columns replace the old ones; their length is checked."""
    meta = batch()
    assigned = {
        "global_indexes": [1, 2, 3],
        "partition_ids": ["c", "c", "d"],
        "field_schema": {"y": INT},
        "extra_info": {"b": 2},
        "custom_meta": [{"t": 1}, {}, {"t": 3}],
    }
    for name, value in assigned.items():
        setattr(meta, name, value)
        assert getattr(meta, name) == value
    meta.production_status = np.array([1, 1, 1])
    assert meta.is_ready
    for name in ("global_indexes", "partition_ids", "production_status", "custom_meta"):
        with pytest.raises(ValueError, match="3 samples"):
            setattr(meta, name, assigned.get(name, [1, 1])[:2])


def test_32_custom_meta() -> None:
    """A list of dicts; an update merges, None changes nothing, a wrong length is a ValueError; deep copy; clear."""
    meta = batch()
    assert isinstance(meta.custom_meta, list)
    meta.update_custom_meta([{"m": 1}, {"n": 5}, {}])
    meta.update_custom_meta(None)
    assert meta.custom_meta == [{"n": 0, "m": 1}, {"n": 5}, {"n": 2}]
    with pytest.raises(ValueError, match="1 entries for 3"):
        meta.update_custom_meta([{}])
    copied = meta.get_all_custom_meta()
    copied[0]["n"] = 9
    assert meta.custom_meta[0]["n"] == 0
    meta.clear_custom_meta()
    assert meta.custom_meta == [{}, {}, {}]


def test_32_extra_info() -> None:
    """A dict, never None, with a method for each thing one does to it."""
    meta = BatchMeta(extra_info=None)
    assert meta.extra_info == {}
    meta.set_extra_info("a", [1])
    meta.update_extra_info({"b": 2, "c": 3})
    meta.extra_info.update(d=4)
    assert (meta.get_extra_info("b"), meta.get_extra_info("z"), meta.get_extra_info("z", 5)) == (2, None, 5)
    assert (meta.has_extra_info("d"), meta.has_extra_info("z")) == (True, False)
    assert (meta.remove_extra_info("d"), meta.remove_extra_info("d")) == (4, None)
    copied = meta.get_all_extra_info()
    assert copied == {"a": [1], "b": 2, "c": 3}
    copied["a"].append(2)
    assert meta.extra_info["a"] == [1]
    meta.clear_extra_info()
    assert meta.extra_info == {}
    meta.extra_info = None
    assert meta.extra_info == {}


def test_32_size_and_items() -> None:
    """Items are metas of their rows; integers of any kind, also negative, and slices."""
    meta = batch()
    assert (meta.size, len(meta), bool(meta)) == (3, 3, True)
    for row in (1, -2, np.int64(1), np.int32(-2)):
        assert isinstance(meta[row], BatchMeta)
        assert meta[row].global_indexes == [3]
        assert meta[row].extra_info == meta.extra_info
    assert meta[1:].global_indexes == [3, 5]
    assert meta[::-2].global_indexes == [5, 7]
    assert meta[3:].size == 0
    for outside in (3, -4, np.int64(3)):
        with pytest.raises(IndexError):
            meta[outside]
    for wrong in ("1", 1.0, None, [0]):
        with pytest.raises(TypeError):
            meta[wrong]


def test_32_samples_are_read_only_rows() -> None:
    """Each row has index, partition, status, tag and fields; a field answers by item and by attribute."""
    meta = batch()
    row = meta.samples[2]
    assert (row.global_index, row.partition_id, row.production_status, row.custom_meta) == (5, "b", 1, {"n": 2})
    assert sorted(row.fields) == ["tokens", "x"]
    assert row.fields["tokens"]["shape"] == row.fields["tokens"].shape == (2,)
    assert row.fields["x"]["dtype"] == row.fields["x"].dtype == torch.float32
    assert [row.global_index for row in meta.samples] == meta.global_indexes
    with pytest.raises(AttributeError):
        row.global_index = 1
    back = pickle.loads(pickle.dumps(row))
    assert (back, back.fields["tokens"].shape) == (row, (2,))


def test_45_samples_as_older_code_uses_them() -> None:
    """`BatchMeta(samples=[])` is an empty meta, and what it has is equal to []; shapes are read from the first row."""
    meta = BatchMeta(samples=[], extra_info={"a": 1})
    assert (meta.size, meta.extra_info) == (0, {"a": 1})
    assert meta.samples == []
    assert batch().samples != []
    assert batch().samples[0].fields["x"].shape[0] == 4
    assert BatchMeta(samples=batch().samples, extra_info={"step": [4]}) == batch()


def test_32_selection() -> None:
    """New metas; unknown names are dropped; a position outside [0, B) is a ValueError."""
    meta = batch()
    assert meta.select_fields(["x", "unknown"]).field_names == ["x"]
    assert meta.select_fields([]).field_names == []
    part = meta.select_samples([2, 0, 2])
    assert (part.global_indexes, part.custom_meta) == ([5, 7, 5], [{"n": 2}, {"n": 0}, {"n": 2}])
    part.custom_meta[0]["n"] = 9
    part.production_status[:] = 0
    assert part.custom_meta[2] == {"n": 2}
    assert meta == batch()
    for outside in (3, -1):
        with pytest.raises(ValueError, match="outside"):
            meta.select_samples([outside])


def test_32_chunks() -> None:
    """Exactly as many contiguous pieces as asked for, the first ones longer by one, each with its own extra_info."""
    meta = rows(7, extra_info={"a": 1})
    parts = meta.chunk(chunks=3)
    assert [part.global_indexes for part in parts] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [len(part) for part in meta.chunk(9)] == [1] * 7 + [0, 0]
    assert [len(part) for part in BatchMeta().chunk(2)] == [0, 0]
    assert all(part.extra_info == {"a": 1} for part in meta.chunk(9))
    parts[0].set_extra_info("a", 2)
    assert meta.extra_info == parts[1].extra_info == {"a": 1}
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            meta.chunk(wrong)


def test_32_chunk_by_partition() -> None:
    """One piece per partition, by first appearance, rows in their order."""
    meta = rows(5, partition_ids=["b", "a", "b", "c", "a"])
    assert [(part.partition_ids[0], part.global_indexes) for part in meta.chunk_by_partition()] == [
        ("b", [0, 2]),
        ("a", [1, 4]),
        ("c", [3]),
    ]


def test_32_concat() -> None:
    """Empty metas and None are skipped; nothing left is an empty meta; nested if any piece is."""
    joined = BatchMeta.concat([None, rows(2), BatchMeta(extra_info={"z": 1}), rows(1)])
    assert joined.global_indexes == [0, 1, 0]
    assert joined.extra_info == {}
    assert BatchMeta.concat([]) == BatchMeta.concat([None, BatchMeta()]) == BatchMeta()
    nested = BatchMeta.concat([rows(1), rows(1, FLOAT | {"is_nested": True})])
    assert nested.field_schema["x"]["is_nested"] is True


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((rows(1), rows(1, field_schema={"y": FLOAT})), "field_names mismatch"),
        ((rows(1), rows(1, INT)), "dtype mismatch"),
        ((rows(1, extra_info={"k": 1}), rows(1, extra_info={"k": 2})), "conflicting values"),
        ((rows(1, extra_info={"k": np.ones(2)}), rows(1, extra_info={"k": np.ones(3)})), "conflicting values"),
    ],
)
def test_32_concat_of_what_does_not_fit(pieces: tuple[BatchMeta, BatchMeta], text: str) -> None:
    """Other columns, dtypes and extra_info are ValueErrors, unless validation is off."""
    with pytest.raises(ValueError, match=text):
        BatchMeta.concat(pieces)
    assert len(BatchMeta.concat(pieces, validate=False)) == 2


@pytest.mark.parametrize("values", [(1, 1), ([1], [1]), (np.ones(2), np.ones(2)), (torch.ones(2), torch.ones(2))])
def test_32_extra_info_is_compared_by_value(values: tuple[Any, Any]) -> None:
    """Equal values of one key unite, those of arrays and tensors too, in both kinds of meta."""
    one, other = ({"k": value, str(id(value)): 1} for value in values)
    assert set(BatchMeta.concat([rows(1, extra_info=one), rows(1, extra_info=other)]).extra_info) == {*one, *other}
    pieces = [keyed(1, extra_info=one), keyed(1, keys=["other"], extra_info=other)]
    assert set(KVBatchMeta.concat(pieces).extra_info) == {*one, *other}


def test_32_union() -> None:
    """The other meta wins, the status is the minimum, and both are left as they were."""
    one = rows(2, production_status=[1, 0], extra_info={"a": 1, "b": 1})
    other = rows(2, INT, custom_meta=[{"m": 1}, {"n": 5}], extra_info={"b": 2})
    other.add_fields(TensorDict({"y": torch.zeros(2)}, batch_size=[2]), set_all_ready=False)
    before = one.copy(), other.copy()
    joined = one.union(other)
    assert (joined.field_names, joined.get_dtypes("x")) == (["x", "y"], [torch.int64] * 2)
    assert joined.production_status.tolist() == [1, 0]
    assert joined.custom_meta == [{"n": 0, "m": 1}, {"n": 5}]
    assert joined.extra_info == {"a": 1, "b": 2}
    assert (one, other) == before


def test_32_union_needs_the_same_rows() -> None:
    """Other indexes, order or partitions are ValueErrors; with one side empty the result is a copy of the other."""
    meta = rows(2)
    for other in (rows(3), rows(2, global_indexes=[1, 0])):
        with pytest.raises(ValueError, match="global_indexes do not match"):
            meta.union(other)
    with pytest.raises(ValueError, match="partition_ids do not match"):
        meta.union(rows(2, partition_ids=["p", "q"]))
    for joined in (meta.union(BatchMeta()), BatchMeta().union(meta)):
        assert joined == meta
        joined.production_status[:] = 0
        assert meta.is_ready


@pytest.mark.parametrize("positions", [[0], [0, 1, 2, 2], [0, 1, 1], [0, 1, 3], [0, 1, -1]])
@pytest.mark.parametrize("make", [batch, keyed])
def test_32_an_order_names_every_row_once(make: Callable[[], Any], positions: list[int]) -> None:
    """Length, duplicates and range are ValueErrors, which change nothing, in both kinds of meta."""
    meta = make()
    with pytest.raises(ValueError, match="positions"):
        meta.reorder(positions)
    assert meta == make()


def test_32_reorder_is_in_place() -> None:
    """The meta itself has the new order; lists, arrays and tensors of positions are the same."""
    for positions in ([2, 0, 1], np.array([2, 0, 1]), torch.tensor([2, 0, 1])):
        meta, keys = batch(), keyed()
        meta.reorder(positions)
        keys.reorder(positions)
        assert model_of(meta) == [model_of(batch())[row] for row in (2, 0, 1)]
        assert model_of_keys(keys) == [("key-2", {"n": 2}), ("key-0", {"n": 0}), ("key-1", {"n": 1})]


def test_32_add_fields() -> None:
    """Returns the meta itself; row shapes of a 1-D column are (); other row counts are refused; no columns: no-op."""
    meta = batch()
    data = TensorDict({"s": torch.zeros(3), "text": NonTensorStack("a", "b", "c")}, batch_size=[3])
    assert meta.add_fields(data, set_all_ready=False) is meta
    assert not meta.is_ready
    assert meta.field_schema["s"] == FLOAT | {"shape": ()}
    assert meta.field_schema["text"]["is_non_tensor"] is True
    assert meta.add_fields(data).is_ready
    before = meta.copy()
    assert meta.add_fields(TensorDict({}, batch_size=[0])) is meta
    with pytest.raises(ValueError, match="2 entries for 3 samples"):
        meta.add_fields(TensorDict({"z": torch.zeros(2)}, batch_size=[2]))
    assert meta == before


def test_32_copy_empty_dtypes_shapes() -> None:
    """A copy is deep; dtypes and shapes have one entry per row; an unknown column is a KeyError."""
    meta = batch()
    copied = meta.copy()
    copied.extra_info["step"].append(5)
    copied.custom_meta[0]["n"] = 9
    copied.production_status[:] = 0
    assert meta == batch()
    assert BatchMeta.empty(extra_info={"a": 1}).extra_info == {"a": 1}
    assert (meta.get_dtypes("x"), meta.get_shapes("x")) == ([torch.float32] * 3, [(4,)] * 3)
    assert meta.get_shapes("tokens") == [(3,), (0,), (2,)]
    for ask in (meta.get_dtypes, meta.get_shapes):
        with pytest.raises(KeyError):
            ask("unknown")
