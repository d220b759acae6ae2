"""BatchMeta: fields derived from data."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import NonTensorData, NonTensorStack, TensorDict

from transfer_queue.metadata import BatchMeta, FieldLocation, FieldSchema

DENSE = {"dtype": torch.float32, "shape": (4,), "is_nested": False, "is_non_tensor": False}
TEXT = {"dtype": None, "shape": None, "is_nested": False, "is_non_tensor": True}


def fetched(size: int, produced: np.ndarray | None = None) -> BatchMeta:
    return BatchMeta.from_columns(
        partition_id="train_0",
        indexes=np.arange(size),
        generations=np.zeros(size, np.int64),
        fields={"x": FieldSchema("float32", (4,)), "tokens": FieldSchema("int64", is_nested=True)},
        produced=produced,
        locations=(FieldLocation(("x", "tokens"), np.ones(size, np.int64), np.arange(size)),),
    )


def jagged(*lengths: int) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(length) for length in lengths], layout=torch.jagged)


def test_fields_are_added_from_data() -> None:
    """Dense, jagged and object columns of a TensorDict become fields with dtype and row shapes; all rows are ready."""
    meta = BatchMeta([1, 2, 3], ["p"] * 3)
    data = TensorDict(
        {
            "dense": torch.zeros(3, 2, 5, dtype=torch.bfloat16),
            "scalar": torch.zeros(3, dtype=torch.bool),
            "ragged": jagged(2, 0, 2),
            "text": NonTensorStack("a", "b", "c"),
            "same": NonTensorData({"q": 1}, batch_size=[3]),
        },
        batch_size=[3],
    )
    assert meta.add_fields(data) is meta
    assert meta.is_ready
    assert meta.field_names == ["dense", "ragged", "same", "scalar", "text"]
    assert meta.field_schema["dense"] == {**DENSE, "dtype": torch.bfloat16, "shape": (2, 5)}
    assert meta.field_schema["scalar"] == {**DENSE, "dtype": torch.bool, "shape": ()}
    assert meta.field_schema["text"] == meta.field_schema["same"] == TEXT
    assert meta.field_schema["ragged"] == {
        "dtype": torch.float32,
        "shape": None,
        "is_nested": True,
        "is_non_tensor": False,
        "per_sample_shapes": [(2,), (0,), (2,)],
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")  # said once per process
def test_ragged_tensors_of_other_layouts() -> None:
    """Rows that are ragged in another dimension, or strided, have their shapes too."""
    rows = [torch.zeros(2, 3), torch.zeros(2, 1)]
    strided = torch.nested.nested_tensor([torch.zeros(2, 3), torch.zeros(4, 1)])
    second_dimension = torch.nested.nested_tensor([row.mT for row in rows], layout=torch.jagged).transpose(1, 2)
    meta = BatchMeta([1, 2], ["p", "p"])
    meta.add_fields(TensorDict({"strided": strided, "second": second_dimension}, batch_size=[2]))
    assert meta.get_shapes("strided") == [(2, 3), (4, 1)]
    assert meta.get_shapes("second") == [(2, 3), (2, 1)]


def test_added_fields_replace_those_of_the_same_name() -> None:
    """A replaced field has no known location any more; without `set_all_ready` the status stays."""
    meta = fetched(2, produced=np.array([1, 0]))
    meta.add_fields(TensorDict({"x": torch.zeros(2, dtype=torch.int8)}, batch_size=[2]), set_all_ready=False)
    assert meta.production_status.tolist() == [1, 0]
    assert meta.get_dtypes("x") == [torch.int8] * 2
    assert [location.fields for location in meta.locations] == [("tokens",)]


def test_data_that_does_not_fit_adds_nothing() -> None:
    """Other numbers of rows and nested TensorDicts are ValueErrors, other types TypeErrors; no columns: no change."""
    meta = fetched(2)
    before = meta.copy()
    assert meta.add_fields(TensorDict({}, batch_size=[0])) is meta
    for data in (
        TensorDict({"y": torch.zeros(3)}, batch_size=[3]),
        TensorDict({"y": torch.zeros(3)}, batch_size=[]),
        TensorDict({"y": TensorDict({"z": torch.zeros(2)}, batch_size=[2])}, batch_size=[2]),
    ):
        with pytest.raises(ValueError, match=r"'y'|entries for 2 samples"):
            meta.add_fields(data)
    with pytest.raises(TypeError):
        meta.add_fields({"y": torch.zeros(2)})
    assert meta == before
