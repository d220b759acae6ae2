"""Arguments of the key-value functions; the numbers are those of the drop-in checklist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import NonTensorStack, TensorDict

from tests.dropin.columns import batch, jagged, objects
from transfer_queue import KVBatchMeta, TransferQueueClient

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")

NESTED = {"x": jagged(2, 3)}
BAD: dict[str, tuple[type[Exception], Callable[[Any, str], Any]]] = {
    "put: nothing": (ValueError, lambda c, p: c.kv_put("a", p)),
    "batch put: nothing": (ValueError, lambda c, p: c.kv_batch_put(["a"], p)),
    "tags of another length": (ValueError, lambda c, p: c.kv_batch_put(["a", "b"], p, tags=[{}])),
    "fields of another length": (ValueError, lambda c, p: c.kv_batch_put(["a"], p, batch(2))),
    "fields without batch size": (ValueError, lambda c, p: c.kv_batch_put(["a"], p, TensorDict({}, []))),
    "duplicate keys in a put": (ValueError, lambda c, p: c.kv_batch_put(["a", "a"], p, batch(2))),
    "put: a list": (ValueError, lambda c, p: c.kv_put("a", p, [1])),
    "put: a nested tensor": (ValueError, lambda c, p: c.kv_put("a", p, NESTED)),
    "put: two rows": (ValueError, lambda c, p: c.kv_put("a", p, batch(2))),
    "put: a nested TensorDict": (ValueError, lambda c, p: c.kv_put("a", p, {"x": batch(1)})),
    "empty put": (ValueError, lambda c, p: c.kv_batch_put([], p, tags=[])),
    "empty get": (ValueError, lambda c, p: c.kv_batch_get([], p)),
    "empty retrieve": (ValueError, lambda c, p: c.kv_retrieve_meta([], p)),
    "put: a key that is no str": (TypeError, lambda c, p: c.kv_put(1, p, tag={})),
    "keys: a set": (TypeError, lambda c, p: c.kv_batch_get({"a"}, p)),
    "keys: a bare str": (TypeError, lambda c, p: c.kv_batch_put("a", p, tags=[{}])),
    "keys: not all str": (TypeError, lambda c, p: c.kv_batch_put(["a", 1], p, tags=[{}, {}])),
    "keys of a clear": (TypeError, lambda c, p: c.kv_clear(3, p)),
    "partition: an int": (TypeError, lambda c, p: c.kv_put("a", 3, tag={})),
    "partition of a listing": (TypeError, lambda c, p: c.kv_list(3)),
    "tag: a list": (TypeError, lambda c, p: c.kv_put("a", p, tag=[1])),
    "tags: not all dicts": (TypeError, lambda c, p: c.kv_batch_put(["a", "b"], p, tags=[{}, None])),
    "batch put: a plain dict": (TypeError, lambda c, p: c.kv_batch_put(["a"], p, {"x": torch.ones(1)})),
    "by meta: without partition": (ValueError, lambda c, p: c.kv_batch_get_by_meta(KVBatchMeta(["a"], [{}]))),
    "by meta: a list": (TypeError, lambda c, p: c.kv_batch_get_by_meta(["a"])),
    "unknown layout": (ValueError, lambda c, p: c.kv_batch_get("a", p, layout="flat")),
    "negative timeout": (ValueError, lambda c, p: c.kv_put("a", p, tag={}, timeout=-1)),
}


@pytest.mark.parametrize("case", BAD)
def test_20_bad_input(client: TransferQueueClient, partition: str, case: str) -> None:
    """Refused before anything is sent: no partition appears."""
    kind, call = BAD[case]
    with pytest.raises(kind):
        call(client, partition)
    assert client.kv_list(partition) == {}


def test_20_bad_selection(client: TransferQueueClient, partition: str) -> None:
    """A selected name that the meta does not have; `numpy.str_` is a str; a changed dtype stores nothing."""
    meta = client.kv_batch_put([np.str_("a")], partition, batch(1))
    with pytest.raises(ValueError, match=r"select_fields.*not found"):
        client.kv_batch_get_by_meta(meta, ["y"])
    with pytest.raises(ValueError, match="x"):
        client.kv_batch_put(["a", "b"], partition, batch(2, x=torch.ones(2, 1)), [{"s": 1}] * 2)
    assert client.kv_list(partition) == {partition: {"a": {}}}


# ---------------------------------------------------------------- what we add


def test_52_strict_layout_and_no_fields(client: TransferQueueClient, partition: str) -> None:
    client.kv_batch_put(["a", "b"], partition, batch(2))
    client.kv_put("b", partition, {"late": torch.ones(1)})
    for how in ({"keys": ["a", "no"]}, {"keys": ["a"], "select_fields": "no"}):
        with pytest.raises(ValueError, match="'no'"):
            client.kv_batch_get(**how, partition_id=partition, strict=True)
    with pytest.raises(ValueError, match="late"):
        client.kv_batch_get(["a", "b"], partition, ["x", "late"], strict=True)
    assert client.kv_batch_get(["a", "b"], partition, layout="jagged")["x"].is_nested
    assert not client.kv_batch_get(["a", "b"], partition, layout="dense")["x"].is_nested
    nothing = client.kv_batch_get(["a", "b", "a"], partition, [])
    assert nothing.batch_size == torch.Size([3]) and not list(nothing.keys())


def test_53_data_parser(client: TransferQueueClient, partition: str) -> None:
    """It gets batched columns, nested and object ones as lists, and what it makes of them is stored."""
    seen: dict[str, type] = {}

    def double(columns: dict[str, Any]) -> dict[str, Any]:
        seen.update({name: type(column) for name, column in columns.items()})
        columns["x"] *= 2
        columns["r"] = [row + 1 for row in columns["r"]]
        columns["o"] = [f"<{value}>" for value in columns["o"]]
        return columns

    given = batch(2, x=torch.ones(2, 2), r=jagged(1, 3), o=NonTensorStack("a", "b"))
    before = [row.clone() for row in given["r"].unbind()]
    client.kv_batch_put(["a", "b"], partition, given, data_parser=double)
    assert seen == {"x": torch.Tensor, "r": list, "o": list}
    got = client.kv_batch_get(["a", "b"], partition)
    assert got["x"].eq(2).all() and given["x"].eq(1).all() and list(got["o"]) == ["<a>", "<b>"]
    assert all(torch.equal(row, was + 1) for row, was in zip(got["r"].unbind(), before, strict=True))
    client.kv_put("c", partition, {"o": objects(1, 2)[0]}, data_parser=lambda columns: {"o": [columns["o"][0] + 1]})
    assert list(client.kv_batch_get("c", partition)["o"]) == [2]
    client.put(batch(1), None, f"{partition}_rows", lambda columns: {"x": columns["x"] + 5})
    meta = client.get_meta(["x"], 1, f"{partition}_rows", task_name="t")
    assert client.get_data(meta)["x"].tolist() == [[5]]
    client.clear_partition(f"{partition}_rows")


def test_53_data_parser_that_breaks_its_word(client: TransferQueueClient, partition: str) -> None:
    wrong: list[tuple[type[Exception], Any]] = [
        (ValueError, lambda columns: columns | {"more": [1, 2]}),
        (ValueError, lambda columns: {}),
        (ValueError, lambda columns: {"x": columns["x"][:1]}),
        (TypeError, lambda columns: None),
        (TypeError, lambda columns: {"x": 3}),
        (TypeError, "no function"),
    ]
    for kind, parser in wrong:
        with pytest.raises(kind):
            client.kv_batch_put(["a", "b"], partition, batch(2), [{}, {}], data_parser=parser)
    assert client.kv_list(partition) == {}
