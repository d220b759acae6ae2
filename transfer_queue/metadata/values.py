"""Comparing and copying the plain values of tags and `extra_info`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import numpy as np

from transfer_queue.errors import WrongType

_ATOMS = frozenset((str, int, float, bool, type(None)))


def same_value(one: Any, other: Any, exact: bool = False) -> bool:
    """Equality that also answers for arrays and tensors, inside containers too; `exact` tells 1, 1.0 and True apart."""
    if one is other:
        return True
    if exact and type(one) is not type(other):
        return False
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and bool((one == other).all())
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same_value(value, other[key], exact) for key, value in one.items())
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(same_value(*pair, exact) for pair in zip(one, other, strict=True))
    try:
        return bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # an array against something else: no single answer
        return False


def copy_tags(name: str, tags: Iterable[Any]) -> list[dict[str, Any]]:
    """Copy many tags deeply, faster than one by one."""
    given = [{} if tag is None else tag for tag in tags]
    if set(map(type, given)) <= {dict} and _ATOMS.issuperset(map(type, chain.from_iterable(map(dict.values, given)))):
        return list(map(dict.copy, given))
    return [copy_tag(name, tag) for tag in given]


def copy_tag(name: str, tag: Any) -> dict[str, Any]:
    """Copy a tag deeply; None is an empty one."""
    if type(tag) is dict and _ATOMS.issuperset(map(type, tag.values())):
        return tag.copy()
    if tag is None:
        return {}
    if not isinstance(tag, Mapping):
        raise WrongType(f"{name} must be a dict, not {type(tag).__name__} {tag!r}")
    return {key: value if type(value) in _ATOMS else copy.deepcopy(value) for key, value in tag.items()}
