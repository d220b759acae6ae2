"""`KVBatchMeta`, and where both metas are found. Numbers in names are those of the checklist."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import transfer_queue
import transfer_queue.metadata
from tests.dropin.metas import keyed
from transfer_queue.metadata import BatchMeta, KVBatchMeta


def test_01_both_classes_are_exported() -> None:
    """They are the same plain classes at top level and in `transfer_queue.metadata`, and work in a union of types."""
    assert transfer_queue.BatchMeta is transfer_queue.metadata.BatchMeta is BatchMeta
    assert transfer_queue.KVBatchMeta is transfer_queue.metadata.KVBatchMeta is KVBatchMeta
    assert "KVBatchMeta" in transfer_queue.__all__
    for meta in (BatchMeta(), KVBatchMeta()):
        assert isinstance(meta, BatchMeta | KVBatchMeta)
    assert not isinstance("meta", BatchMeta | KVBatchMeta)


def test_01_metas_of_keys_need_no_torch() -> None:
    """Making, cutting, joining and pickling them imports neither torch nor ray."""
    program = """
import pickle, sys
from transfer_queue import KVBatchMeta
meta = pickle.loads(pickle.dumps(KVBatchMeta(["a", "b"], [{}, {"n": 1}], "p")))
print(KVBatchMeta.concat(meta.chunk(2)).select_keys(["b"]) == meta)
assert not {"torch", "tensordict", "ray", "zmq"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def test_32_keys_everything_is_optional() -> None:
    """A dataclass with defaults of its own for each meta; an empty one is false."""
    meta = KVBatchMeta()
    assert [field.name for field in dataclasses.fields(meta)] == [
        "keys",
        "tags",
        "partition_id",
        "fields",
        "extra_info",
    ]
    assert dataclasses.asdict(meta) == {"keys": [], "tags": [], "partition_id": None, "fields": None, "extra_info": {}}
    assert (meta.size, len(meta), bool(meta)) == (0, 0, False)
    meta.extra_info["a"] = 1
    meta.keys.append("k")
    assert KVBatchMeta() == KVBatchMeta([], [], None, None, {}) == KVBatchMeta(extra_info=None)
    assert repr(keyed()) == "<KVBatchMeta train: 3 keys, fields x, y>"
    assert repr(KVBatchMeta()) == "<KVBatchMeta no partition: 0 keys, fields not known>"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tags": [{}]}, ValueError),
        ({"tags": []}, ValueError),
        ({"keys": ["a", "b", "a"]}, ValueError),
        ({"fields": ["x", "x"]}, ValueError),
        ({"keys": "abc"}, TypeError),
        ({"keys": ["a", "b", 3]}, TypeError),
        ({"tags": [{}, {}, "tag"]}, TypeError),
        ({"tags": None}, TypeError),
        ({"tags": {"a": 1}}, TypeError),
        ({"partition_id": 3}, TypeError),
        ({"fields": "x"}, TypeError),
        ({"extra_info": [1]}, TypeError),
    ],
)
def test_32_keys_that_do_not_fit(changes: dict[str, Any], error: type[Exception]) -> None:
    """Counts that differ and duplicates are ValueErrors, wrong types TypeErrors."""
    with pytest.raises(error):
        keyed(**changes)


def test_32_keys_arguments_are_copied() -> None:
    """Tags and extra_info deeply; NumPy strings become str."""
    tags, extra_info, keys = [{"list": [1]}], {"list": [1]}, [np.str_("k")]
    meta = KVBatchMeta(keys, tags, "p", ("x",), extra_info)
    tags[0]["list"].append(2)
    extra_info["list"].append(2)
    keys.clear()
    assert meta == KVBatchMeta(["k"], [{"list": [1]}], "p", ["x"], {"list": [1]})
    assert type(meta.keys[0]) is str


def test_32_keys_attributes_are_assignable() -> None:
    """What was assigned is what the meta has; extra_info stays a dict."""
    meta = keyed()
    meta.keys, meta.tags = ["a", "b"], [{"t": 1}, {"t": 2}]
    meta.partition_id, meta.fields, meta.extra_info = "val", None, {"a": 1}
    assert meta == KVBatchMeta(["a", "b"], [{"t": 1}, {"t": 2}], "val", None, {"a": 1})
    assert meta.size == 2
    meta.extra_info.update(b=2)
    assert meta.extra_info == {"a": 1, "b": 2}
    meta.extra_info = None
    assert meta.extra_info == {}
    meta.tags = [{}]
    for use in (lambda: meta.chunk(1), lambda: meta.reorder([1, 0]), lambda: meta.select_keys(["a"])):
        with pytest.raises(ValueError, match="tags"):
            use()


def test_32_keys_are_selected_in_the_order_asked() -> None:
    """A new meta; duplicates are a ValueError, unknown keys a RuntimeError that names them."""
    meta = keyed()
    part = meta.select_keys(["key-2", "key-0"])
    assert part == keyed(keys=["key-2", "key-0"], tags=[{"n": 2}, {"n": 0}])
    part.tags[0]["n"] = 9
    part.extra_info["step"].append(5)
    assert meta == keyed()
    assert meta.select_keys([]) == keyed(0)
    with pytest.raises(ValueError, match="key-1"):
        meta.select_keys(["key-1", "key-1"])
    with pytest.raises(RuntimeError, match="key-9"):
        meta.select_keys(["key-1", "key-9"])


def test_32_keys_in_chunks() -> None:
    """Exactly as many pieces as asked for, the first ones longer; all with partition, fields and extra_info."""
    parts = keyed(7).chunk(3)
    assert [part.keys for part in parts] == [
        ["key-0", "key-1", "key-2"],
        ["key-3", "key-4"],
        ["key-5", "key-6"],
    ]
    assert [len(part) for part in keyed(2).chunk(4)] == [1, 1, 0, 0]
    assert {(part.partition_id, *part.fields, part.extra_info["step"][0]) for part in parts} == {("train", "x", "y", 4)}
    parts[0].extra_info["step"].append(5)
    assert parts[1].extra_info == {"step": [4]}
    for wrong, error in ((0, ValueError), (-1, ValueError), (1.5, TypeError)):
        with pytest.raises(error):
            keyed().chunk(wrong)


def test_32_keys_are_joined() -> None:
    """Empty metas and None are skipped; nothing left is an empty meta, whose extra_info is a dict."""
    parts = keyed(4).chunk(2)
    assert KVBatchMeta.concat([KVBatchMeta(), parts[0], None, parts[1]]) == keyed(4)
    assert KVBatchMeta.concat([]) == KVBatchMeta.concat([KVBatchMeta(partition_id="p"), None]) == KVBatchMeta()
    assert KVBatchMeta.concat([]).extra_info == {}
    other_order = keyed(1, keys=["other"], fields=["y", "x"])
    assert KVBatchMeta.concat([keyed(1), other_order]).fields == ["x", "y"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fields": ["x"]}, "fields mismatch"),
        ({"fields": None}, "fields mismatch"),
        ({"partition_id": "val"}, "partition_id mismatch"),
        ({"partition_id": None}, "partition_id mismatch"),
        ({"extra_info": {"step": [5]}}, "conflicting values"),
        ({"keys": ["key-0", "b", "c"]}, "duplicate.*key-0"),
    ],
)
def test_32_keys_that_cannot_be_joined(changes: dict[str, Any], text: str) -> None:
    """Differing columns, partitions and extra_info, and repeated keys, are ValueErrors."""
    with pytest.raises(ValueError, match=text):
        KVBatchMeta.concat([keyed(), keyed(**{"keys": ["a", "b", "c"]} | changes)])
    with pytest.raises(TypeError, match="KVBatchMeta"):
        KVBatchMeta.concat([keyed(), BatchMeta()])
