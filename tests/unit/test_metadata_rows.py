"""BatchMeta: selecting, cutting and reordering rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.metas import FLOAT, INT, check_rows_are_whole, located, meta_of, mixed
from transfer_queue.metadata import BatchMeta


@pytest.mark.parametrize("position", [0, 2, -1, -5, np.int64(3), np.int32(-2), torch.tensor(1)])
def test_an_index_gives_one_row(position: Any) -> None:
    """Python, NumPy and torch integers, negative ones too, give the meta of that row."""
    meta = meta_of(range(20, 25))
    row = meta[position]
    assert row.global_indexes == [range(20, 25)[int(position)]]
    assert row.extra_info == {"step": 1}
    check_rows_are_whole(row)


@given(st.integers(0, 8), st.slices(8))
def test_slices_cut_as_lists_are_cut(size: int, rows: slice) -> None:
    """Any slice gives the rows that it would give of a list."""
    part = meta_of(range(size))[rows]
    assert part.global_indexes == list(range(size))[rows]
    check_rows_are_whole(part)


def test_what_is_no_row_is_refused() -> None:
    """Outside the rows it is an IndexError, so that a meta can be iterated; other types are a TypeError."""
    meta = meta_of(range(3))
    for outside in (3, -4):
        with pytest.raises(IndexError, match="meta of 3 samples"):
            meta[outside]
    for wrong in ("x", 1.0, None, [0, 1]):
        with pytest.raises(TypeError):
            meta[wrong]
    assert [row.global_indexes for row in meta] == [[0], [1], [2]]


@given(st.lists(st.integers(0, 5), max_size=12))
def test_samples_are_selected_by_position(positions: list[int]) -> None:
    """Rows come in the order asked for, repeats included, and whole."""
    meta = meta_of(range(100, 106))
    for given_as in (positions, np.array(positions, np.int64), tuple(positions)):
        part = meta.select_samples(given_as)
        assert part.global_indexes == [100 + position for position in positions]
        check_rows_are_whole(part)


@pytest.mark.parametrize(
    ("positions", "error"), [([3], ValueError), ([-1], ValueError), ([0.5], TypeError), ("0", TypeError)]
)
def test_positions_outside_are_refused(positions: Any, error: type[Exception]) -> None:
    """Selection does not count from the end; positions are integers within the meta."""
    with pytest.raises(error):
        meta_of(range(3)).select_samples(positions)


def test_fields_are_selected_by_name() -> None:
    """Unknown names fall away; locations follow their fields; no field at all is fine."""
    meta = meta_of(range(3), {"x": FLOAT, "y": INT})
    part = meta.select_fields(["y", "unknown"])
    assert part.field_names == ["y"]
    assert located(part) == {"y": [1000] * 3}
    check_rows_are_whole(part)
    assert meta.field_names == ["x", "y"]
    assert meta.select_fields([]).field_names == []
    assert len(meta.select_fields([])) == 3
    for wrong in ("x", [1], None):
        with pytest.raises(TypeError):
            meta.select_fields(wrong)


@given(st.integers(0, 30), st.integers(1, 12))
def test_chunks_are_exact(size: int, chunks: int) -> None:
    """There are exactly as many chunks as asked for, the first ones longer by one, and together they are the meta."""
    meta = mixed(size)
    parts = meta.chunk(chunks)
    assert [len(part) for part in parts] == [len(part) for part in np.array_split(np.arange(size), chunks)]
    assert all(part.extra_info == {"step": [1]} for part in parts)
    if size:
        assert BatchMeta.concat(parts) == meta
        assert BatchMeta.concat(parts).backend_meta == meta.backend_meta
    parts[0].set_extra_info("mine", 1)
    assert not meta.has_extra_info("mine")


@pytest.mark.parametrize(("chunks", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)])
def test_chunks_must_be_a_positive_integer(chunks: Any, error: type[Exception]) -> None:
    """Fewer than one chunk is a ValueError, other types a TypeError."""
    with pytest.raises(error):
        meta_of(range(3)).chunk(chunks)


def test_one_chunk_per_partition() -> None:
    """Partitions come by first appearance and keep the order of their rows."""
    meta = mixed(7).select_samples([2, 0, 5, 3, 1])
    parts = meta.chunk_by_partition()
    assert [(part.partitions, part.global_indexes) for part in parts] == [
        (("part-2",), [2, 5]),
        (("part-0",), [0, 3]),
        (("part-1",), [1]),
    ]
    assert BatchMeta().chunk_by_partition() == []
    assert len(meta_of(range(3)).chunk_by_partition()) == 1


@given(st.permutations(range(6)))
def test_reorder_is_in_place(order: list[int]) -> None:
    """The meta itself has the new order, in every column, and the inverse order brings it back."""
    meta = meta_of(range(6))
    before = meta.copy()
    meta.reorder(order)
    assert meta.global_indexes == order
    check_rows_are_whole(meta)
    meta.reorder(np.argsort(order))
    assert meta == before


@pytest.mark.parametrize("positions", [[0, 1], [0, 1, 2, 2], [0, 1, 1], [0, 1, 3], [-1, 0, 1]])
def test_an_order_must_name_every_row_once(positions: list[int]) -> None:
    """Wrong length, duplicates and positions outside are ValueErrors and change nothing."""
    meta = meta_of(range(3))
    with pytest.raises(ValueError, match="positions"):
        meta.reorder(positions)
    assert meta == meta_of(range(3))
