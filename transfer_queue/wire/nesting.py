"""What may stand in the free dicts of messages (tags, parameters, reports): nothing that could not be sent on.

A receiver that took more than it can encode would fail later, in the answers to others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from itertools import chain
from typing import Any

import msgpack
import numpy as np

from transfer_queue.errors import EncodeError

MOST_NESTED = 500  # lists, dicts and tuples within each other; some versions of msgpack go to 511

_FLAT = frozenset((type(None), bool, int, float, str, bytes, complex))


def encodable(entries: dict[str, Any]) -> dict[str, Any]:
    """Return a dict that a receiver takes as far as its depth goes; raises `EncodeError`."""
    if entries:
        all_encodable([entries])
    return entries


def all_encodable(dicts: Iterable[dict[str, Any] | None]) -> list[dict[str, Any] | None]:
    """The same for many, which are looked at together: that takes a fraction of the time."""
    entries = list(dicts)
    given = list(filter(None, entries))
    with contextlib.suppress(TypeError):  # what is no dict at all is refused where it is packed
        flat = chain(chain.from_iterable(given), chain.from_iterable(map(dict.values, given)))
        if _FLAT.issuperset(map(type, flat)):
            return entries
    try:
        _check_depth(entries)
    except ValueError as error:
        raise EncodeError(f"cannot send {error}: keep tags and parameters flat") from None
    return entries


def check_entries(dicts: Iterable[dict[Any, Any]]) -> None:
    """Check dicts that were decoded; raises `ValueError` with what is wrong."""
    dicts = tuple(filter(None, dicts))
    if not dicts:
        return
    try:
        "".join(chain.from_iterable(dicts))
    except TypeError:
        raise ValueError("a dict with keys other than str") from None
    _check_depth(list(chain.from_iterable(map(dict.values, dicts))))


def _check_depth(level: list[Any]) -> None:
    for _ in range(MOST_NESTED + 1):
        kinds = set(map(type, level))
        if kinds <= _FLAT:
            return
        if msgpack.Timestamp in kinds:
            raise ValueError("a timestamp of MessagePack")
        level = list(chain.from_iterable(map(_inside, level)))
    raise ValueError(f"values nested deeper than {MOST_NESTED}")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return chain(value, value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if isinstance(value, np.ndarray) and value.dtype.kind == "O":
        found: list[Any] = value.ravel().tolist()
        return found
    return ()
