"""Metas that travel, and rows that move as in a list. Numbers in names are those of the checklist."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dropin.metas import ENTRIES, FLOAT, INT, batch, fetched, keyed, model_of, model_of_keys, rows
from transfer_queue.metadata import BatchMeta, KVBatchMeta


@pytest.mark.parametrize(
    "travel",
    [
        lambda meta: pickle.loads(pickle.dumps(meta)),
        lambda meta: cloudpickle.loads(cloudpickle.dumps(meta)),
        copy.deepcopy,
    ],
    ids=["pickle", "cloudpickle", "deepcopy"],
)
@pytest.mark.parametrize("make", [BatchMeta, batch, KVBatchMeta, keyed], ids=lambda make: make.__name__)
def test_33_metas_travel(travel: Callable[[Any], Any], make: Callable[[], Any]) -> None:
    """A meta comes back equal and by itself: what is changed in it does not change the original."""
    meta = make()
    back = travel(meta)
    assert type(back) is type(meta)
    assert back == meta
    back.extra_info["new"] = 1
    back.extra_info.get("step", []).append(5)
    for tag in back.custom_meta if isinstance(back, BatchMeta) else back.tags:
        tag["n"] = 9
    if isinstance(back, BatchMeta):
        back.production_status[:] = 1 - back.production_status
        assert back.production_status.tolist() == [1 - status for status in meta.production_status]
    assert meta == make()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("status", [[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 1, 1]])
def test_33_status_is_writable_afterwards(status: list[int], protocol: int) -> None:
    """The array of an unpickled meta takes values in place, whatever it holds."""
    back = pickle.loads(pickle.dumps(rows(4, production_status=status), protocol))
    assert back.production_status.tolist() == status
    assert back.production_status.dtype == np.int8
    back.production_status[2] = 1
    assert back.production_status[2] == 1


@pytest.mark.parametrize("looked_at", [False, True])
def test_33_a_large_meta_is_cheap_to_pickle(looked_at: bool) -> None:
    """8 columns of 16384 rows: some kB without tags, per row little more than its tag with them."""
    size, names = 16384, [f"field_{number}" for number in range(8)]
    schema = dict.fromkeys(names, INT)
    bare = BatchMeta(range(size), ["p"] * size, schema, [1] * size)
    assert len(pickle.dumps(bare)) < 4_000
    tags = [{"status": "finished", "prompt_len": row % 999, "seq_len": row} for row in range(size)]
    meta = fetched(tags)
    if looked_at:
        assert meta.custom_meta == tags
    assert len(pickle.dumps(meta)) < len(pickle.dumps(tags)) + 4_000


@st.composite
def metas(draw: st.DrawFn) -> BatchMeta:
    size = draw(st.integers(0, 9))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=size, max_size=size))

    shapes = column(st.integers(0, 3).map(lambda length: (length,)))
    return BatchMeta(
        column(st.integers(0, 2**40)),
        column(st.sampled_from("pqr")),
        {"x": FLOAT, "t": {"is_nested": True, "per_sample_shapes": shapes}},
        column(st.integers(0, 1)),
        {"step": 1},
        column(ENTRIES),
    )


@st.composite
def keyed_metas(draw: st.DrawFn) -> KVBatchMeta:
    keys = draw(st.lists(st.text(max_size=3), unique=True, max_size=9))
    return KVBatchMeta(keys, [draw(ENTRIES) for _ in keys], "p", ["x"], {"step": 1})


@given(metas(), st.integers(1, 12))
def test_31_chunks_joined_again_are_the_meta(meta: BatchMeta, chunks: int) -> None:
    """Sizes are those of an even split; travelling to workers and back changes nothing."""
    parts = meta.chunk(chunks)
    assert [len(part) for part in parts] == [len(part) for part in np.array_split(np.arange(len(meta)), chunks)]
    joined = BatchMeta.concat([pickle.loads(pickle.dumps(part)) for part in parts])
    assert joined == (meta or BatchMeta())
    assert joined.changed_tags() == meta.changed_tags()
    by_partition = BatchMeta.concat(meta.chunk_by_partition())
    assert model_of(by_partition) == sorted(model_of(meta), key=lambda row: meta.partition_ids.index(row[1]))


@given(keyed_metas(), st.integers(1, 12))
def test_31_chunks_of_keys_joined_again_are_the_meta(meta: KVBatchMeta, chunks: int) -> None:
    """The same for keys."""
    parts = meta.chunk(chunks)
    assert [len(part) for part in parts] == [len(part) for part in np.array_split(np.arange(len(meta)), chunks)]
    assert KVBatchMeta.concat([pickle.loads(pickle.dumps(part)) for part in parts]) == (meta or KVBatchMeta())


@given(metas(), st.data())
def test_31_rows_move_as_in_a_list(meta: BatchMeta, data: st.DataObject) -> None:
    """Selecting, slicing, indexing, reordering and joining do to a meta what they do to the list of its rows."""
    before, size = model_of(meta), len(meta)
    positions = data.draw(st.lists(st.integers(0, size - 1), max_size=9)) if size else []
    part = meta.select_samples(positions)
    assert model_of(part) == [before[position] for position in positions]
    bounds = data.draw(st.slices(size))
    assert model_of(meta[bounds]) == before[bounds]
    assert [model_of(row) for row in meta] == [[row] for row in before]
    assert model_of(BatchMeta.concat([part, meta, meta[bounds]])) == model_of(part) + before + before[bounds]
    names = data.draw(st.sets(st.sampled_from(["x", "t"])))
    joined = meta.select_fields(names).union(meta.select_fields({"x", "t"} - names))
    assert joined == meta or not meta
    order = data.draw(st.permutations(range(size)))
    meta.reorder(order)
    assert model_of(meta) == [before[position] for position in order]


@given(keyed_metas(), st.data())
def test_31_keys_move_as_in_a_list(meta: KVBatchMeta, data: st.DataObject) -> None:
    """Selected and reordered keys keep their tags."""
    before = copy.deepcopy(model_of_keys(meta))
    order = data.draw(st.permutations(range(len(meta))))
    wanted = order[: data.draw(st.integers(0, len(meta)))]
    part = meta.select_keys([before[position][0] for position in wanted])
    assert model_of_keys(part) == [before[position] for position in wanted]
    assert (part.partition_id, part.fields, part.extra_info) == ("p", ["x"], {"step": 1})
    meta.reorder(order)
    assert model_of_keys(meta) == [before[position] for position in order]
