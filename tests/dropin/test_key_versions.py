"""Policy versions of rows that are put by key (checklist 10, 11, 20)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import transfer_queue as tq
from tests.dropin.columns import batch

KEYS = list("abcd")


@pytest.fixture
def bounded() -> Iterator[str]:
    """The partition of a session that hands out no sample of more than one version back."""
    tq.close()
    tq.init({"runtime": "embedded", "limits": {"max_staleness": 1}})
    yield "p"
    tq.close()


def listed(partition: str) -> list[str]:
    listing: Any = tq.kv_list(partition)
    return list(listing[partition])


def test_11_a_version_per_key_or_one_for_all(bounded: str) -> None:
    """Rows that are too old for the policy go, by whatever function they were put."""
    tq.kv_batch_put(KEYS, bounded, batch(4), policy_version=[0, 1, 2, 0])
    tq.kv_put("e", bounded, {"x": torch.ones(1, dtype=torch.int64)}, policy_version=0)
    tq.kv_batch_put(["f", "g"], bounded, batch(2), policy_version=1)
    asyncio.run(tq.async_kv_put("h", bounded, {"x": torch.ones(1, dtype=torch.int64)}, {"n": 1}, policy_version=2))
    tq.kv_put("i", bounded, {"x": torch.ones(1, dtype=torch.int64)})
    assert tq.get_client().set_policy_version(2) == 3
    assert listed(bounded) == ["b", "c", "f", "g", "h", "i"]
    assert tq.get_client().set_policy_version(3) == 3
    assert listed(bounded) == ["c", "h", "i"]


def test_11_a_tag_may_bring_the_version_before_the_data(bounded: str) -> None:
    """A row gets its version once; the same again is fine."""
    tq.kv_put("a", bounded, tag={"status": "pending"}, policy_version=1)
    tq.kv_put("a", bounded, {"x": torch.ones(1, dtype=torch.int64)}, policy_version=1)
    with pytest.raises(ValueError, match="version"):
        tq.kv_put("a", bounded, tag={"status": "finished"}, policy_version=2)
    assert tq.kv_list(bounded) == {bounded: {"a": {"status": "pending"}}}


BAD: dict[str, tuple[type[Exception], Any]] = {
    "negative": (ValueError, -1),
    "too few": (ValueError, [0, 0]),
    "text": (TypeError, "1"),
    "fraction": (TypeError, 0.5),
    "nested": (TypeError, [[0], [0], [0], [0]]),
}


@pytest.mark.parametrize("what", BAD)
def test_20_a_bad_version_leaves_nothing(bounded: str, what: str) -> None:
    error, version = BAD[what]
    with pytest.raises(error, match="version"):
        tq.kv_batch_put(KEYS, bounded, batch(4), policy_version=version)
    assert tq.kv_list() == {}
