"""Batches between the form that workers compute on and the one that the queue keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from recipe.verl_style.protocol import DataProto, from_data_proto, to_data_proto
from transfer_queue import TransferQueueClient

RAGGED = torch.nested.as_nested_tensor([torch.arange(2), torch.arange(0), torch.arange(3)], layout=torch.jagged)
CHATS = [[{"role": "user", "content": "1 + 1"}], [], [{"role": "user", "content": "2"}, {"role": "assistant"}]]


def column(values: list[Any]) -> Any:
    """[B] objects, also where they are lists."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_what_goes_through_the_queue_comes_back(client: TransferQueueClient) -> None:
    """Dense, ragged and scalar tensors, strings and lists, and `meta_info` beside them."""
    tensors = {"dense": torch.randn(3, 2), "score": torch.tensor([0.5, 1.0, 2.0]), "tokens": RAGGED}
    objects = {"uid": column(["a", "b", "c"]), "raw_prompt": column(CHATS)}
    rows, meta_info = from_data_proto(DataProto(tensors, objects, {"temperature": 0.7}))
    batch = client.kv_batch_put(["k0", "k1", "k2"], "p", rows)
    batch.extra_info = meta_info

    back = to_data_proto(client.kv_batch_get_by_meta(batch), batch.extra_info)
    assert back.batch.keys() == tensors.keys()
    assert torch.equal(back.batch["dense"], tensors["dense"])
    assert torch.equal(back.batch["score"], tensors["score"])
    assert [row.tolist() for row in back.batch["tokens"].unbind()] == [[0, 1], [], [0, 1, 2]]
    assert back.non_tensor_batch.keys() == objects.keys()
    assert back.non_tensor_batch["uid"].tolist() == ["a", "b", "c"]
    assert back.non_tensor_batch["raw_prompt"].tolist() == CHATS
    assert back.meta_info == {"temperature": 0.7}


def test_a_proto_of_another_library_is_taken() -> None:
    """Its tensors are a TensorDict; a proto of objects alone has none."""
    theirs = SimpleNamespace(batch=TensorDict({"x": torch.ones(2)}, [2]), non_tensor_batch={}, meta_info={"step": 3})
    rows, meta_info = from_data_proto(theirs)
    assert rows["x"].tolist() == [1, 1]
    assert meta_info == {"step": 3}
    rows, _ = from_data_proto(SimpleNamespace(batch=None, non_tensor_batch={"uid": column(["a"])}, meta_info={}))
    assert rows.batch_size == torch.Size([1])
    assert to_data_proto(rows, {}).non_tensor_batch["uid"].tolist() == ["a"]


def test_meta_info_is_the_copy_of_whoever_has_it() -> None:
    """What a worker notes in its batch does not reach the driver's."""
    info = {"step": 1}
    proto = to_data_proto(TensorDict({"x": torch.ones(1)}, [1]), info)
    proto.meta_info["step"] = 2
    _, returned = from_data_proto(proto)
    returned["step"] = 3
    assert info == {"step": 1}
    assert proto.meta_info == {"step": 2}


@pytest.mark.parametrize(
    ("proto", "text"),
    [
        (DataProto({"x": torch.ones(2)}, {"uid": column(["a"])}), r"rows: {'x': 2, 'uid': 1}"),
        (DataProto({"x": torch.ones(1)}, {"x": column(["a"])}), r"\['x'\] are tensors and objects at once"),
    ],
)
def test_columns_that_do_not_belong_together(proto: DataProto, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        from_data_proto(proto)
