"""A sampler as plain values that JSON holds, from which another process makes the same one. No pickle.

name                                                 a registered name
{"from": "module:name"}                              a class, or a callable without arguments, of a module
{"class": "module:name", "attributes": [[name, value], …]}      an instance
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from transfer_queue.errors import InvalidArgument
from transfer_queue.samplers.base import BaseSampler
from transfer_queue.samplers.registry import SamplerLike, as_sampler


def describe(sampler: SamplerLike) -> Any:
    """Describe a sampler; one that a nameless callable returns is described as an instance.

    Raises `InvalidArgument` for classes that another process cannot import, and instances that hold other things than
    numbers, texts, and lists, tuples, dicts and samplers of those.
    """
    if isinstance(sampler, str):
        return sampler
    if not isinstance(sampler, BaseSampler) and (path := _path_of(sampler)) is not None:
        return {"from": path}
    return _described(as_sampler(sampler))


def make(described: Any) -> SamplerLike:
    """Return the sampler that was described, or what it is made by."""
    if isinstance(described, str):
        return described
    if "from" in described:
        found: SamplerLike = _found(described["from"])
        return found
    return _made(described)


def _described(sampler: BaseSampler) -> dict[str, Any]:
    path = _path_of(type(sampler))
    if path is None:
        raise InvalidArgument(
            f"controller.sampler: the controller is another process and imports its sampler, so {sampler!r} has to be "
            "of a class of a module (not of the main program, nor within a function)"
        )
    return {"class": path, "attributes": [[name, _plain(sampler, each)] for name, each in vars(sampler).items()]}


def _made(described: dict[str, Any]) -> BaseSampler:
    cls = _found(described["class"])
    sampler: BaseSampler = cls.__new__(cls)
    vars(sampler).update((name, _value(each)) for name, each in described["attributes"])
    return sampler


def _plain(sampler: BaseSampler, value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) in (list, tuple):
        return {type(value).__name__: [_plain(sampler, each) for each in value]}
    if type(value) is dict:
        return {"dict": [[_plain(sampler, key), _plain(sampler, each)] for key, each in value.items()]}
    if isinstance(value, BaseSampler):
        return _described(value)
    raise InvalidArgument(
        f"controller.sampler: the controller is another process, and {sampler!r} holds {value!r:.100}, which is not a "
        "number, a text, or a list, tuple, dict or sampler of those; give a callable of a module that makes it"
    )


def _value(plain: Any) -> Any:
    if not isinstance(plain, dict):
        return plain
    if "class" in plain:
        return _made(plain)
    ((kind, items),) = plain.items()
    if kind == "dict":
        return {_value(key): _value(each) for key, each in items}
    values = [_value(each) for each in items]
    return tuple(values) if kind == "tuple" else values


def _path_of(known: Any) -> str | None:
    """module:name under which another process finds this object, None if it does not."""
    module, name = getattr(known, "__module__", None), getattr(known, "__qualname__", None)
    found: Any = sys.modules.get(module or "")
    for part in (name or "").split("."):
        found = getattr(found, part, None)
    return f"{module}:{name}" if found is known and module != "__main__" else None


def _found(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
