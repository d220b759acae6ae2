"""Which tag entries a put sends: those changed since the fetch. Numbers in names are those of the checklist."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.dropin.metas import ENTRIES, fetched
from transfer_queue.metadata import BatchMeta


def test_30_only_entries_changed_since_the_fetch_are_sent() -> None:
    """Updates, an assigned list, an assigned row and an assigned entry count; all else stays as the queue has it."""
    tags = [{"n": row, "status": "running"} for row in range(4)]
    updated, listed, row, entry = (fetched(copy.deepcopy(tags)) for _ in range(4))
    updated.update_custom_meta([{"status": "done"}, {}, {"n": 2}, None])
    assert updated.changed_tags() == [{"status": "done"}, None, {"n": 2}, None]
    listed.custom_meta = [{**tag, "length": 7} for tag in tags]
    assert listed.changed_tags() == [{"length": 7}] * 4
    row.custom_meta[1] = {"n": 1, "status": "done"}
    assert row.changed_tags() == [None, {"status": "done"}, None, None]
    entry.custom_meta[3]["status"] = "done"
    assert entry.changed_tags() == [None, None, None, {"status": "done"}]
    assert fetched(tags).changed_tags() == [None] * 4


def test_30_what_is_no_tag_is_refused_when_it_is_sent() -> None:
    """The list of tags is the caller's, so what was put into it is checked at its use."""
    longer, wrong = fetched([{}, {}]), fetched([{}, {}])
    longer.custom_meta.append({})
    with pytest.raises(ValueError, match="3 entries for 2 samples"):
        longer.changed_tags()
    wrong.custom_meta[1] = "tag"
    with pytest.raises(TypeError, match="must be a dict"):
        wrong.changed_tags()


@pytest.mark.parametrize("looked_at", [False, True])
def test_30_a_change_made_while_a_put_was_on_its_way_is_not_lost(looked_at: bool) -> None:
    """Only what was sent counts as sent."""
    meta = fetched([{"n": 0}, {"n": 1}])
    if looked_at:
        meta.custom_meta[0]["n"] = 5
    else:
        meta.update_custom_meta([{"n": 5}, None])
    sent = meta.changed_tags()
    meta.update_custom_meta([{"n": 6}, {"status": "done"}])
    meta.mark_tags_sent(sent)
    assert meta.changed_tags() == [{"n": 6}, {"status": "done"}]
    meta.mark_tags_sent(meta.changed_tags())
    assert meta.changed_tags() == [None, None]
    meta.mark_tags_sent(None)
    assert meta.custom_meta == [{"n": 6}, {"n": 1, "status": "done"}]


class Writer:
    """What a user did to the tags of a fetched meta, entry by entry."""

    def __init__(self, stored: list[dict[str, Any]]) -> None:
        self.tags = copy.deepcopy(stored)
        self.sent_up_to()

    def sent_up_to(self) -> None:
        self.known = copy.deepcopy(self.tags)
        self.edited: list[set[str]] = [set() for _ in self.tags]  # by any way
        self.named: list[set[str]] = [set() for _ in self.tags]  # by an update

    def edit(self, row: int, change: dict[str, Any], named: bool) -> None:
        self.tags[row].update(copy.deepcopy(change))
        self.edited[row].update(change)
        if named:
            self.named[row].update(change)

    def remove(self, row: int, key: str) -> None:
        self.tags[row].pop(key, None)
        self.named[row].discard(key)

    def check(self, meta: BatchMeta) -> None:
        """All entries that were named or differ are sent, none that was not touched, and with the value they have."""
        for row, changed in enumerate(meta.changed_tags()):
            tag, known, entries = self.tags[row], self.known[row], changed or {}
            different = {key for key in tag if key not in known or told(tag[key]) != told(known[key])}
            assert different | self.named[row] <= entries.keys() <= self.edited[row]
            assert all(told(value) == told(tag[key]) for key, value in entries.items())
        assert [told(row.custom_meta) for row in meta.samples] == [told(tag) for tag in self.tags]


def told(value: Any) -> str:
    """A value as text, which tells 1, 1.0 and True apart."""
    return repr(dict(sorted(value.items()))) if isinstance(value, dict) else repr(value)


@given(st.data())
def test_30_the_queue_gets_what_was_changed_and_nothing_else(data: st.DataObject) -> None:
    """Whatever is done to the tags, and however the meta is cut, joined, copied and pickled in between."""
    stored = data.draw(st.lists(ENTRIES, min_size=1, max_size=3))
    writer, meta, size = Writer(stored), fetched(copy.deepcopy(stored)), len(stored)
    steps = ["update", "edit", "assign", "remove", "look", "pickle", "cut", "send"]
    for step in data.draw(st.lists(st.sampled_from(steps), max_size=8)):
        row, entries = data.draw(st.integers(0, size - 1)), data.draw(ENTRIES)
        if step == "update":
            meta.update_custom_meta([entries if one == row else None for one in range(size)])
            writer.edit(row, entries, named=True)
        elif step == "edit":
            meta.custom_meta[row].update(copy.deepcopy(entries))
            writer.edit(row, entries, named=False)
        elif step == "assign":
            meta.custom_meta = [tag | entries for tag in meta.custom_meta]
            for one in range(size):
                writer.edit(one, entries, named=False)
        elif step == "remove":
            meta.custom_meta[row].pop("a", None)
            writer.remove(row, "a")
        elif step == "look":
            assert [told(tag) for tag in meta.custom_meta] == [told(tag) for tag in writer.tags]
        elif step == "send":
            meta.mark_tags_sent(meta.changed_tags())
            writer.sent_up_to()
        elif step == "pickle":
            meta = pickle.loads(pickle.dumps(meta))
        elif step == "cut":
            meta = BatchMeta.concat([meta[:row].copy(), meta[row:]])
        writer.check(meta)
