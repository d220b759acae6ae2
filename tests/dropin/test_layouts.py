"""Layouts of what comes back; the numbers are those of the drop-in checklist."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict

from tests.dropin.columns import DTYPES, form_of, jagged, numbers, objects, put, rows_of, same, strided
from transfer_queue import TransferQueueClient, config
from transfer_queue.config import LAYOUTS, layout_in_force, merged
from transfer_queue.runtime.embedded import EmbeddedRuntime

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

PADDED = [dtype for dtype in DTYPES if dtype.itemsize > 1 or not dtype.is_floating_point]  # which PyTorch can pad


LENGTHS = st.lists(st.integers(0, 3), min_size=1, max_size=3)
PUTS = st.lists(st.tuples(st.booleans(), LENGTHS), min_size=1, max_size=4)  # (jagged, length of each row)


@dataclass(frozen=True)
class Cell:
    """Batches that are put, and the form of a get of all rows: under as_put, jagged and dense."""

    put: Callable[[], list[Any]]
    forms: tuple[str, str, str]


CELLS = {
    "dense [N, L]": Cell(lambda: [numbers(4, 3)], ("dense", "jagged", "dense")),
    "dense [N, L, D]": Cell(lambda: [numbers(4, 3, 2)], ("dense", "jagged", "dense")),
    "dense of one row": Cell(lambda: [numbers(1, 3)], ("dense", "jagged", "dense")),
    "dense rows of length zero": Cell(lambda: [numbers(4, 0)], ("dense", "jagged", "dense")),
    "[N] scalars": Cell(lambda: [numbers(4)], ("dense", "dense", "dense")),
    "[N] scalars of several puts": Cell(lambda: [numbers(4), numbers(1)], ("dense", "dense", "dense")),
    "[N, 1]": Cell(lambda: [numbers(4, 1)], ("dense", "jagged", "dense")),
    "dense puts of one length": Cell(lambda: [numbers(1, 3), numbers(2, 3)], ("dense", "jagged", "dense")),
    "dense puts of two lengths": Cell(lambda: [numbers(1, 3), numbers(2, 5)], ("jagged", "jagged", "jagged")),
    "dense and jagged puts, equal": Cell(lambda: [numbers(1, 3), jagged(3, 3)], ("jagged", "jagged", "dense")),
    "jagged": Cell(lambda: [jagged(3, 0, 5)], ("jagged", "jagged", "jagged")),
    "jagged, equal": Cell(lambda: [jagged(3, 3)], ("jagged", "jagged", "dense")),
    "jagged with a dimension": Cell(lambda: [jagged(3, 1, trailing=(2,))], ("jagged", "jagged", "jagged")),
    "jagged, all rows empty": Cell(lambda: [jagged(0, 0, 0)], ("jagged", "jagged", "dense")),
    "strided nested, ragged first": Cell(lambda: [strided((2, 3), (4, 3))], ("jagged", "jagged", "jagged")),
    "strided nested, equal": Cell(lambda: [strided((2, 3), (2, 3))], ("jagged", "jagged", "dense")),
    "ragged in several dimensions": Cell(lambda: [strided((2, 3), (4, 1))], ("strided", "strided", "strided")),
    "dense puts of several shapes": Cell(
        lambda: [numbers(2, 2, 3), numbers(1, 4, 1)], ("strided", "strided", "strided")
    ),
    "several dimensions that no tensor nests": Cell(
        lambda: [numbers(2, 2, 3).to(torch.float8_e5m2), numbers(1, 4, 1).to(torch.float8_e5m2)],
        ("stack", "stack", "stack"),
    ),
    "NonTensorStack": Cell(lambda: [NonTensorStack("a", {"b": 1}, None)], ("stack", "stack", "stack")),
    "NonTensorStack of one row": Cell(lambda: [NonTensorStack([1, 2])], ("stack", "stack", "stack")),
    "list": Cell(lambda: [["a", "bc", ""]], ("stack", "stack", "stack")),
    "array of objects": Cell(lambda: [objects({"a": 1}, [], None)], ("stack", "stack", "stack")),
    "array of one object": Cell(lambda: [objects({"a": 1})], ("stack", "stack", "stack")),
    "tensors of two ranks": Cell(lambda: [numbers(2, 3), numbers(1, 2, 2), numbers(1)], ("stack", "stack", "stack")),
    "tensors and objects": Cell(
        lambda: [numbers(2, 3), NonTensorStack("text", {"a": 1}), jagged(4, 1)], ("stack", "stack", "stack")
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS.keys())
def test_35_every_cell_of_the_layout_table(client: Any, partition: str, cell: Cell, layout: str) -> None:
    """Rows come back equal, in the form that the layout says, forwards and backwards, and can be cut."""
    batches = cell.put()
    meta = put(client, partition, *batches)
    wanted = [row for batch in batches for row in rows_of(batch)]
    for order in (range(len(wanted)), range(len(wanted) - 1, -1, -1)):
        got = client.get_data(meta.select_samples(list(order)), layout=layout)
        assert form_of(got.get("x")) == cell.forms[LAYOUTS.index(layout)]
        assert got.batch_size == torch.Size([len(wanted)]) and not got.is_locked
        same(rows_of(got["x"]), [wanted[row] for row in order])
        same(got[0]["x"], wanted[order[0]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_35_rows_of_equal_length(client: Any, partition: str, layout: str) -> None:
    """Single rows and whole batches that were put in any form have one length: jagged only says so if told to."""
    meta = put(client, partition, numbers(2, 3), numbers(1, 3))
    for rows in ([0], [2], [0, 2], [1, 1, 1]):
        found = client.get_data(meta.select_samples(rows), layout=layout)["x"]
        assert form_of(found) == ("jagged" if layout == "jagged" else "dense")
        assert found.dim() == 2 and [len(row) for row in rows_of(found)] == [3] * len(rows)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # a name for each example, one client for all
@given(
    puts=st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 3), min_size=1, max_size=3)), min_size=1, max_size=4
    ),
    data=st.data(),
)
def test_35_any_rows_of_any_puts(client: Any, puts: list[tuple[bool, list[int]]], data: st.DataObject) -> None:
    """Dense puts (of their first length) and jagged ones, drawn in any order and number: the form is what §8 says."""
    batches = [jagged(*lengths) if ragged else numbers(len(lengths), lengths[0]) for ragged, lengths in puts]
    wanted = [row for batch in batches for row in rows_of(batch)]
    was_jagged = [ragged for ragged, lengths in puts for _ in lengths]
    drawn = data.draw(st.lists(st.integers(0, len(wanted) - 1), min_size=1, max_size=6))
    meta = put(client, "any", *batches).select_samples(drawn)
    equal = len({len(wanted[row]) for row in drawn}) == 1
    forms = {"jagged": "jagged", "dense": "dense" if equal else "jagged"}
    forms["as_put"] = "jagged" if any(was_jagged[row] for row in drawn) else forms["dense"]
    for layout in LAYOUTS:
        found = client.get_data(meta, layout=layout)["x"]
        assert form_of(found) == forms[layout]
        same(rows_of(found), [wanted[row] for row in drawn])
    client.clear_partition("any")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_35_rows_ragged_in_another_dimension(client: Any, partition: str, layout: str) -> None:
    """Jagged where PyTorch can represent such rows, else strided."""
    wanted = [numbers(2, 3), numbers(2, 5)]
    try:
        torch.nested.as_nested_tensor(wanted, layout=torch.jagged)
        form = "jagged"
    except RuntimeError:
        form = "strided"
    found = client.get_data(put(client, partition, strided((2, 3), (2, 5)).copy_(_nested(wanted))), layout=layout)["x"]
    assert form_of(found) == form
    same([row.contiguous() for row in rows_of(found)], wanted)


def _nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.nested_tensor(rows, layout=torch.strided)


def test_35_sliced_input_is_stored_as_the_values_it_shows(client: Any, partition: str) -> None:
    """Steps, transpositions and expansions; nested tensors with holes or ragged in another dimension."""
    base = numbers(4, 6)
    for shown in (base[::2, 1::2], base.t(), base[:1].expand(3, 6), base.flip(0)):
        same(client.get_data(client.put({"x": shown}, partition_id=partition))["x"], shown.contiguous())
    holes = torch.nested.narrow(base, 1, torch.tensor([1, 2, 3, 0]), torch.tensor([2, 0, 3, 1]), layout=torch.jagged)
    found = client.get_data(client.put({"x": holes}, partition_id=partition))["x"]
    same(rows_of(found), [base[0, 1:3], base[1, 2:2], base[2, 3:6], base[3, :1]])
    turned = jagged(2, 4, trailing=(3,)).transpose(1, 2)
    found = client.get_data(client.put({"x": turned}, partition_id=partition))["x"]
    same([row.contiguous() for row in rows_of(found)], [row.contiguous() for row in turned.unbind()])


def test_35_a_nested_tensordict_is_refused_by_name(client: Any, partition: str) -> None:
    """A column of columns has no place; nothing of the put is written."""
    data = TensorDict({"x": torch.ones(2), "inner": TensorDict({"y": torch.ones(2)}, [2])}, [2])
    with pytest.raises(ValueError, match="'inner'"):
        client.put(data, partition_id=partition)
    assert partition not in client.get_partition_list()


# ---------------------------------------------------------------- jagged at work


@pytest.mark.parametrize("dtype", PADDED, ids=str)
@pytest.mark.parametrize(
    "column",
    [lambda: numbers(3, 4), lambda: numbers(3, 1), lambda: jagged(2, 0, 3), lambda: jagged(2, 1, trailing=(2,))],
    ids=["dense", "[N, 1]", "jagged", "jagged with a dimension"],
)
def test_36_jagged_results_do_what_callers_ask_of_them(
    client: Any, partition: str, column: Callable[[], torch.Tensor], dtype: torch.dtype
) -> None:
    """Offsets, padding (also of the whole `TensorDict`), rows, slices, sums."""
    batch = column().to(dtype)
    wanted = rows_of(batch)
    got = client.get_data(put(client, partition, batch), layout="jagged")
    lengths = [len(row) for row in wanted]
    padded = torch.nn.utils.rnn.pad_sequence(wanted, batch_first=True)
    found = got["x"]
    assert found.offsets().diff().tolist() == lengths and found.values().dtype == dtype
    same(torch.nested.to_padded_tensor(found, 0), padded)
    same(found.to_padded_tensor(0), padded)
    same(got.to_padded_tensor()["x"], padded)
    same(list(found.unbind()), wanted)
    same([got[row]["x"] for row in range(len(wanted))], wanted)
    same(rows_of(got[1:]["x"]), wanted[1:])
    if dtype is not torch.bool:
        sums = found.sum(dim=1)
        assert torch.equal(sums.to(padded.dtype), padded.sum(dim=1).to(padded.dtype))


def test_36_all_rows_empty(client: Any, partition: str) -> None:
    """Nothing to pad, and still a row each."""
    found = client.get_data(put(client, partition, jagged(0, 0)), layout="jagged")
    assert found["x"].offsets().diff().tolist() == [0, 0] and found["x"].to_padded_tensor(0).shape == (2, 0)
    assert found.to_padded_tensor()["x"].shape == (2, 0) and found[1]["x"].shape == (0,)


# ---------------------------------------------------------------- which layout


def test_52_the_layout_of_a_call(client: Any, queue: EmbeddedRuntime, partition: str, monkeypatch: Any) -> None:
    """First the argument, then TQ_LAYOUT, read when used, then what the client was made with."""
    meta = put(client, partition, jagged(2, 2))
    with TransferQueueClient("dense", queue.info, connector=queue, layout="dense") as other:
        assert form_of(client.get_data(meta)["x"]) == "jagged"
        assert form_of(other.get_data(meta)["x"]) == "dense"
        monkeypatch.setenv("TQ_LAYOUT", "jagged")
        assert form_of(other.get_data(meta)["x"]) == "jagged"
        assert form_of(other.get_data(meta, layout=None)["x"]) == "jagged"
        assert form_of(other.get_data(meta, layout="dense")["x"]) == "dense"
        monkeypatch.setenv("TQ_LAYOUT", "flat")
        with pytest.raises(ValueError, match="TQ_LAYOUT.*'flat'.*as_put, dense, jagged"):
            other.get_data(meta)
        assert form_of(other.get_data(meta, layout="dense")["x"]) == "dense"
    with pytest.raises(ValueError, match=r"layout.*'jaged'.*did you mean 'jagged'"):
        client.get_data(meta, layout="jaged")


def test_48_the_layout_of_a_queue(monkeypatch: Any) -> None:
    """Who starts it applies its own TQ_LAYOUT; another process's has its say in that process only."""
    assert config.settings(merged(None)).layout == layout_in_force(None, "as_put") == "as_put"
    assert config.settings(merged({"layout": "dense"})).layout == "dense"
    monkeypatch.setenv("TQ_LAYOUT", "jagged")
    conf = merged({"layout": "dense"})
    assert conf.layout == config.settings(conf).layout == "jagged"
    monkeypatch.setenv("TQ_LAYOUT", "as_put")
    assert config.settings(conf).layout == "jagged" and layout_in_force(None, conf.layout) == "as_put"
    for wrong in ("flat", 1):
        with pytest.raises(ValueError, match="layout.*as_put, dense, jagged"):
            layout_in_force(wrong, "as_put")  # type: ignore[arg-type]  # what is under test
    monkeypatch.delenv("TQ_LAYOUT")
    with pytest.raises(ValueError, match="layout.*'flat'.*as_put, dense, jagged"):
        config.settings(merged({"layout": "flat"}))
