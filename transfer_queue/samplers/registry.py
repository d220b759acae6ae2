"""The one table of sampler names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from transfer_queue.errors import InvalidArgument, UnknownName, WrongType, nearest
from transfer_queue.samplers.base import BaseSampler
from transfer_queue.samplers.dp import DPSampler
from transfer_queue.samplers.group_n import GRPOGroupNSampler
from transfer_queue.samplers.grpo import GRPOSampler
from transfer_queue.samplers.rank_aware import RankAwareSampler
from transfer_queue.samplers.seqlen_balanced import SeqlenBalancedSampler
from transfer_queue.samplers.sequential import SequentialSampler

SamplerLike: TypeAlias = "BaseSampler | type[BaseSampler] | Callable[[], BaseSampler] | str"

_CLASSES: dict[str, type[BaseSampler]] = {
    "SequentialSampler": SequentialSampler,
    "GRPOSampler": GRPOSampler,
    "DPSampler": DPSampler,
    "GRPOGroupNSampler": GRPOGroupNSampler,
    "RankAwareSampler": RankAwareSampler,
    "SeqlenBalancedSampler": SeqlenBalancedSampler,
}


def register_sampler_class(name: str, cls: type[BaseSampler]) -> None:
    """Make `cls` known as `name` in this process. The same class again is fine; another one under the name is not."""
    if not (isinstance(cls, type) and issubclass(cls, BaseSampler)):
        raise WrongType(f"{cls!r} is not a subclass of BaseSampler")
    known = _CLASSES.setdefault(name, cls)
    if known is not cls:
        raise InvalidArgument(f"sampler name {name!r} is taken by {known.__module__}.{known.__qualname__}")


def create_sampler(name: str, **arguments: Any) -> BaseSampler:
    """Make a sampler by its registered name."""
    if name not in _CLASSES:
        raise UnknownName(f"unknown sampler {name!r}{nearest(name, _CLASSES)}")
    cls = _CLASSES[name]
    accepted = accepted_names(cls)
    if accepted is not None and (unknown := set(arguments) - accepted):
        raise InvalidArgument(f"{name} takes no argument {sorted(unknown)} (it takes: {sorted(accepted)})")
    return cls(**arguments)


def as_sampler(sampler: SamplerLike) -> BaseSampler:
    """Accept an instance, a class, a name, or a callable without arguments that returns an instance."""
    if isinstance(sampler, BaseSampler):
        return sampler
    if isinstance(sampler, str):
        return create_sampler(sampler)
    if not callable(sampler):
        raise WrongType(f"a sampler is an instance, class, name or zero-argument callable, not {sampler!r}")
    made = sampler()
    if not isinstance(made, BaseSampler):
        raise WrongType(f"{sampler!r} returned {type(made).__name__}, not a sampler")
    return made


def accepted_names(function: Callable[..., Any]) -> frozenset[str] | None:
    """Names that `function` takes as keywords; None: any."""
    return _accepted_names(getattr(function, "__func__", function))


@functools.lru_cache(maxsize=256)
def _accepted_names(function: Callable[..., Any]) -> frozenset[str] | None:
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)) - {"self"}
