"""Which of the two dialects a sampler speaks, told by the signature of its `sample` without calling it."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

from transfer_queue.samplers.base import BaseSampler

_NATIVE, _OTHER = "ready_indices", "ready_indexes"  # what the first argument is called
_PAIR = re.compile(r"(typing\.)?tuple\[[^|]*\]", re.IGNORECASE)


def returns_pairs(sampler: BaseSampler) -> bool:
    """True for `sample(ready_indexes, batch_size, *args, **kwargs) -> (sampled, consumed)`.

    The name of the first argument decides. Where it is another one: `*args`, an argument `partition`, or a tuple as
    the annotated result.
    """
    return _returns_pairs(type(sampler).sample)


@functools.lru_cache(maxsize=256)
def _returns_pairs(sample: Callable[..., Any]) -> bool:
    signature = inspect.signature(sample)
    names = list(signature.parameters)
    first = names[1] if len(names) > 1 else ""
    if first in (_NATIVE, _OTHER):
        return first == _OTHER
    if any(each.kind is each.VAR_POSITIONAL for each in signature.parameters.values()) or "partition" in names:
        return True
    result = signature.return_annotation
    return _PAIR.fullmatch(result if isinstance(result, str) else inspect.formatannotation(result)) is not None
