"""BatchMeta: concat and union."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.metas import FLOAT, INT, check_rows_are_whole, located, meta_of, mixed
from transfer_queue.errors import InvalidArgument, StaleSampleError
from transfer_queue.metadata import BatchMeta, FieldLocation, FieldSchema

# ---------------------------------------------------------------- concat


@given(st.lists(st.lists(st.integers(0, 99), max_size=4), max_size=5))
def test_concat_puts_rows_behind_each_other(pieces: list[list[int]]) -> None:
    """All columns are joined in order; empty metas and None are skipped; the result does not share with its pieces."""
    metas: list[BatchMeta | None] = [meta_of(piece) for piece in pieces]
    joined = BatchMeta.concat([None, *metas, BatchMeta()])
    assert joined.global_indexes == [row for piece in pieces for row in piece]
    if joined:
        assert joined.extra_info == {"step": 1}
        check_rows_are_whole(joined)
        check_rows_are_whole(pickle.loads(pickle.dumps(joined)))
        joined.production_status[:] = 0
        assert all(meta.is_ready for meta in metas if meta)


def test_concat_of_nothing_is_empty() -> None:
    """Without rows the result is an empty meta."""
    assert BatchMeta.concat([]) == BatchMeta.concat([None, BatchMeta(extra_info={"a": 1})]) == BatchMeta()


def test_concat_refuses_other_fields() -> None:
    """Different names or dtypes are named; without validation the fields of all pieces stay."""
    one, other = meta_of(range(2), {"x": FLOAT, "y": INT}), meta_of(range(2, 4), {"x": FLOAT})
    with pytest.raises(ValueError, match=r"field_names mismatch.*\['y'\]"):
        BatchMeta.concat([one, other])
    joined = BatchMeta.concat([one, other], validate=False)
    assert joined.field_names == ["x"]
    assert located(joined) == {"x": [1000] * 4}
    with pytest.raises(ValueError, match=r"dtype mismatch in field 'x'.*float32.*int64"):
        BatchMeta.concat([other, meta_of([9], {"x": INT})])
    for wrong in ([one, "meta"], 3):
        with pytest.raises(TypeError):
            BatchMeta.concat(wrong)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1, True),
        (1, 2, False),
        ([1, {"a": (2,)}], [1, {"a": (2,)}], True),
        ([1, {"a": (2,)}], [1, {"a": (3,)}], False),
        (np.arange(3), np.arange(3), True),
        (np.arange(3), np.arange(4), False),
        (torch.arange(3), torch.arange(3), True),
        (torch.arange(3), torch.arange(3).float(), False),
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, True),
        (np.arange(3), 1, False),
        (None, 0, False),
    ],
)
def test_shared_extra_info_must_agree(one: Any, other: Any, same: bool) -> None:
    """Entries are united; one key with two values, compared by value, is refused unless validation is off."""
    pieces = [meta_of([1], extra_info={"k": one, "a": 1}), meta_of([2], extra_info={"k": other, "b": 2})]
    if same:
        assert set(BatchMeta.concat(pieces).extra_info) == {"k", "a", "b"}
        return
    with pytest.raises(ValueError, match=r"extra_info\['k'\] has conflicting values"):
        BatchMeta.concat(pieces)
    assert BatchMeta.concat(pieces, validate=False).extra_info["k"] is other


def test_rows_of_different_shapes_make_a_nested_field() -> None:
    """A field is nested if it was in a piece, or if tensor rows differ in shape; each row keeps its shape."""
    joined = BatchMeta.concat([meta_of([1]), meta_of([2, 3], {"x": FieldSchema("float32", (5,))})])
    assert joined.field_schema["x"]["is_nested"]
    assert joined.field_schema["x"]["shape"] is None
    assert joined.get_shapes("x") == [(4,), (5,), (5,)]
    nested = BatchMeta.concat([meta_of([1]), meta_of([2], {"x": FieldSchema("float32", (4,), is_nested=True)})])
    assert nested.field_schema["x"]["is_nested"]
    assert nested.get_shapes("x") == [(4,)] * 2
    texts = [meta_of([row], {"s": FieldSchema(is_non_tensor=True)}) for row in range(2)]
    assert BatchMeta.concat(texts).field_schema["s"]["is_nested"] is False


def test_a_field_without_place_in_one_piece_has_none() -> None:
    """Locations stay for the fields that have one in every piece, however the pieces group them."""
    fields = {"x": FLOAT, "y": INT, "z": INT}
    blocks = {name: np.full(2, number) for number, name in enumerate(fields)}
    rows = np.arange(2)
    apart = meta_of(rows, fields, locations=[FieldLocation((name,), blocks[name], rows) for name in ("x", "y")])
    together = meta_of(rows, fields)
    assert located(BatchMeta.concat([apart, together])) == {"x": [0, 0, 1000, 1000], "y": [1, 1, 1000, 1000]}
    assert located(BatchMeta.concat([apart, meta_of(rows, fields, locations=())])) == {}


def test_columns_that_one_piece_lacks_have_none_there() -> None:
    """Keys and groups of one piece stay, the other rows have none; hand-made rows keep an unknown generation."""
    joined = BatchMeta.concat([meta_of([4]), BatchMeta([5], ["q"], {"x": {"dtype": torch.float32, "shape": (4,)}})])
    assert joined.keys == ["key-4", None]
    assert joined.group_ids == ["group-2", None]
    assert joined.generations.tolist() == [1, -1]
    assert joined.partition_ids == ["p", "q"]
    assert not joined.is_ready


def test_leases_stay_with_their_rows() -> None:
    """Parts of a lease are cut and joined, also with rows of other leases; each row keeps its own."""
    meta = meta_of(range(4), lease_token=7, lease_deadline_s=3.0)
    joined = BatchMeta.concat(meta.chunk(2))
    assert (joined.lease_token, joined.lease_deadline_s) == (7, 3.0)
    assert meta[1].select_fields(["x"]).lease_token == 7
    several = BatchMeta.concat([meta[:2], meta_of([9], lease_token=8, lease_deadline_s=2.0), meta[2:]])
    assert (several.lease_token, several.lease_deadline_s) == (None, 2.0)
    for same in (several, pickle.loads(pickle.dumps(several)), several.copy()):
        assert {token: rows.tolist() for token, rows in same.rows_by_lease().items()} == {7: [0, 1, 3, 4], 8: [2]}
    several.mark_renewed(8, 5.0)
    assert (several.lease_deadline_s, several[2:3].lease_deadline_s, several[3].lease_token) == (3.0, 5.0, 7)
    assert repr(several).endswith("lease 7+8>")


def test_rows_without_a_lease_are_counted() -> None:
    """Who wants the leases of rows that have none is told how many, and how to get one."""
    joined = BatchMeta.concat([meta_of(range(4), lease_token=7), meta_of([9])])
    assert joined.lease_token is None
    for meta, text in ((joined, "1 of 5"), (meta_of([9]), "1 of 1")):
        with pytest.raises(InvalidArgument, match=f"{text} samples are not leased.*lease=seconds"):
            meta.rows_by_lease()


# ---------------------------------------------------------------- union


def test_union_joins_fields() -> None:
    """Fields, tags and extra info of both are there, the other's win; a row is ready if it is in both."""
    one = meta_of(range(3), {"x": FLOAT, "y": FLOAT}, produced=np.array([1, 0, 1]), extra_info={"a": 1, "b": 1})
    other = meta_of(range(3), {"y": INT, "z": INT}, produced=np.array([1, 1, 0]), extra_info={"b": 2, "c": 2})
    other.update_custom_meta([{"row": 10}, {}, {"new": 1}])
    before = one.copy(), other.copy()
    joined = one.union(other)
    assert joined.field_names == ["x", "y", "z"]
    assert joined.get_dtypes("y") == [torch.int64] * 3
    assert joined.production_status.tolist() == [1, 0, 0]
    assert joined.custom_meta == [{"row": 10}, {"row": 1}, {"row": 2, "new": 1}]
    assert joined.changed_tags() == [{"row": 10}, None, {"new": 1}]
    assert joined.extra_info == {"a": 1, "b": 2, "c": 2}
    assert located(joined) == {"x": [1000] * 3, "y": [1000] * 3, "z": [1000] * 3}
    assert (one, other) == before
    joined.custom_meta[0]["row"] = 99
    joined.production_status[:] = 1
    assert (one, other) == before


def test_what_another_handle_has_no_place_for_has_none() -> None:
    """The place known here may be that of overwritten values."""
    meta = meta_of(range(3), {"x": FLOAT, "y": FLOAT})
    assert located(meta.union(meta_of(range(3), {"y": INT}, locations=()))) == {"x": [1000] * 3}


def test_columns_of_a_put_are_added_in_place() -> None:
    """Written fields replace those of the same name and their place; then all rows are ready."""
    meta = BatchMeta(range(2), ["p", "p"], {"x": {}}, [1, 0])
    meta.add_columns({}, generations=np.array([4, 5]))
    assert meta.production_status.tolist() == [1, 0]
    assert meta.generations.tolist() == [4, 5]
    meta.add_columns({"y": INT, "a": FLOAT}, [FieldLocation(("y", "a"), np.full(2, 9), np.arange(2))])
    assert meta.field_names == ["a", "x", "y"]
    assert located(meta) == {"a": [9, 9], "y": [9, 9]}
    assert meta.is_ready


def test_union_with_an_empty_side_is_a_copy_of_the_other() -> None:
    """The copy is deep."""
    meta = meta_of(range(2), extra_info={"deep": [1]})
    for joined in (meta.union(BatchMeta()), BatchMeta(extra_info={"a": 1}).union(meta)):
        assert joined == meta
        joined.extra_info["deep"].append(2)
        joined.production_status[:] = 0
        assert meta == meta_of(range(2), extra_info={"deep": [1]})


def test_union_needs_the_same_rows() -> None:
    """Other indexes, another order, other partitions are ValueErrors; another type is a TypeError."""
    meta = meta_of(range(3))
    for other in (meta_of([0, 2, 1]), meta_of(range(2)), meta_of(range(1, 4))):
        with pytest.raises(ValueError, match="global_indexes do not match"):
            meta.union(other)
    with pytest.raises(ValueError, match="partition_ids do not match"):
        meta.union(meta_of(range(3), partition_id="q"))
    for wrong in ([1], None):
        with pytest.raises(TypeError):
            meta.union(wrong)


def test_union_with_a_handle_from_before_a_clear_is_refused() -> None:
    """Two generations of one row are two samples; a generation known to one side only is taken."""
    meta = meta_of(range(3))
    before = meta.copy()
    with pytest.raises(StaleSampleError, match=r"samples \[1\] were cleared") as caught:
        meta.union(meta_of(range(3), generations=np.array([0, 5, 2])))
    assert caught.value.details == {"indexes": [1]}
    assert meta == before
    hand_made = BatchMeta(range(3), ["p"] * 3, {"y": {"dtype": torch.int8, "shape": ()}}, [1, 1, 1])
    for joined in (meta.union(hand_made), hand_made.union(meta)):
        assert joined.generations.tolist() == [0, 1, 2]
        assert joined.keys == ["key-0", "key-1", "key-2"]
        assert joined.field_names == ["x", "y"]
        assert joined.custom_meta == [{"row": 0}, {"row": 1}, {"row": 2}]
        assert joined.changed_tags() == [None] * 3


@given(st.data())
def test_cutting_and_joining_lose_nothing(data: st.DataObject) -> None:
    """Selected fields joined again are the meta; rows cut anywhere and joined again are the meta."""
    size = data.draw(st.integers(1, 12))
    meta = mixed(size)
    names = data.draw(st.sets(st.sampled_from(["x", "t"])))
    rest = set(meta.field_names) - names
    assert meta.select_fields(names).union(meta.select_fields(rest)) == meta
    cut = data.draw(st.integers(0, size))
    assert BatchMeta.concat([meta[:cut], meta[cut:]]) == meta
    order = data.draw(st.permutations(range(size)))
    shuffled = meta.select_samples(order)
    reordered = meta.copy()
    reordered.reorder(order)
    assert shuffled == reordered
