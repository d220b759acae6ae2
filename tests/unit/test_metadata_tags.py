"""BatchMeta: tags, and which of their entries still have to be sent."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from transfer_queue.metadata import BatchMeta, FieldSchema


def hand_made() -> BatchMeta:
    return BatchMeta([7, 3, 5], ["a", "a", "b"], custom_meta=[{"n": 1}, {}, {"n": 3}])


def fetched(size: int, tags: list[dict[str, Any]] | None = None) -> BatchMeta:
    return BatchMeta.from_columns(
        partition_id="train_0",
        indexes=np.arange(10, 10 + size),
        generations=np.full(size, 2),
        fields={"x": FieldSchema("float32", (4,))},
        tags=tags or [{"n": row, "status": "running"} for row in range(size)],
    )


def test_tags_merge() -> None:
    """An update merges entry by entry and leaves others alone; None changes nothing, here or as an entry."""
    meta = hand_made()
    meta.update_custom_meta([{"m": 1}, {"m": 2}, None])
    meta.update_custom_meta(None)
    assert meta.custom_meta == [{"n": 1, "m": 1}, {"m": 2}, {"n": 3}]
    copied = meta.get_all_custom_meta()
    copied[0]["n"] = 9
    assert meta.custom_meta[0]["n"] == 1
    with pytest.raises(ValueError, match="2 entries for 3 samples"):
        meta.update_custom_meta([{}, {}])
    with pytest.raises(TypeError):
        meta.update_custom_meta([{}, {}, 3])
    assert meta.custom_meta == [{"n": 1, "m": 1}, {"m": 2}, {"n": 3}]
    meta.clear_custom_meta()
    assert meta.custom_meta == [{}, {}, {}]


def test_a_hand_made_meta_sends_all_its_tags() -> None:
    """Without a fetch, everything counts as changed."""
    assert hand_made().changed_tags() == [{"n": 1}, None, {"n": 3}]


def test_only_changed_entries_are_sent() -> None:
    """An update counts whatever its value, an assigned or edited tag counts where it differs from what was fetched."""
    nothing = [None] * 3
    meta = fetched(3)
    assert meta.changed_tags() == nothing
    assert meta.custom_meta[1] == {"n": 1, "status": "running"}
    assert meta.changed_tags() == nothing
    meta.update_custom_meta([{"status": "running"}, {}, {"n": 5}])
    assert meta.changed_tags() == [{"status": "running"}, None, {"n": 5}]

    assigned = fetched(3)
    assigned.custom_meta = [{**tag, "length": 7} for tag in assigned.custom_meta]
    assert assigned.changed_tags() == [{"length": 7}] * 3

    edited = fetched(3)
    edited.custom_meta[2]["n"] = True
    edited.custom_meta[0]["new"] = [1]
    del edited.custom_meta[1]["status"]
    assert edited.changed_tags() == [{"new": [1]}, None, {"n": True}]


def test_changes_count_from_the_last_time_they_were_sent() -> None:
    """After sending, the same entries are no changes any more, but later ones are, also through a list held since."""
    meta = fetched(2)
    held = meta.custom_meta
    meta.update_custom_meta([{"status": "done"}, {"deep": [1]}])
    meta.mark_tags_sent(meta.changed_tags())
    assert meta.changed_tags() == [None, None]
    assert meta.custom_meta[0]["status"] == "done"
    held[1]["deep"].append(2)
    assert meta.changed_tags() == [None, {"deep": [1, 2]}]


def test_a_fetched_tag_is_the_callers_own() -> None:
    """Changing a tag changes neither what was fetched nor the tags of metas cut from the same draw."""
    tags = [{"list": [row]} for row in range(2)]
    meta = fetched(2, tags=tags)
    part = meta[:1]
    meta.custom_meta[0]["list"].append(9)
    later_part = meta[:1]
    later_part.custom_meta[0]["list"].append(8)
    assert tags[0] == {"list": [0]}
    assert part.custom_meta == [{"list": [0]}]
    assert meta.custom_meta[0] == {"list": [0, 9]}


def test_changes_survive_cutting_joining_and_pickling() -> None:
    """What still has to be sent travels along with its rows."""
    meta = fetched(4)
    meta.update_custom_meta([{"a": row} for row in range(4)])
    meta.custom_meta[3]["n"] = 30
    changes = [{"a": 0}, {"a": 1}, {"a": 2}, {"a": 3, "n": 30}]
    assert pickle.loads(pickle.dumps(meta)).changed_tags() == changes
    assert meta.copy().changed_tags() == changes
    assert [part.changed_tags() for part in meta.chunk(2)] == [changes[:2], changes[2:]]
    assert meta.select_samples([3, 0]).changed_tags() == [changes[3], changes[0]]
    assert BatchMeta.concat([meta[3], fetched(1), meta[:1]]).changed_tags() == [changes[3], None, changes[0]]
    meta.reorder([3, 2, 1, 0])
    assert meta.changed_tags() == changes[::-1]


def test_a_union_keeps_what_has_to_be_sent() -> None:
    """Changes of both handles stay changes; what the other one merely fetched does not undo a change."""
    one, other = fetched(2), fetched(2, [{"n": 5, "status": "done"}, {"n": 1, "status": "running"}])
    one.update_custom_meta([{"status": "failed"}, {"mine": 1}])
    other.update_custom_meta([{"theirs": 2}, {"mine": 3}])
    joined = one.union(other)
    assert joined.custom_meta == [
        {"n": 5, "status": "failed", "theirs": 2},
        {"n": 1, "status": "running", "mine": 3},
    ]
    assert joined.changed_tags() == [{"status": "failed", "theirs": 2}, {"mine": 3}]
    joined.custom_meta[0]["n"] = 0
    assert (one.custom_meta[0]["n"], other.custom_meta[0]["n"]) == (0, 5)
