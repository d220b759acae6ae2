"""Calling samplers: whatever users' code does, it fails one request and nothing else."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from transfer_queue.errors import InsufficientSamples, SamplerError, TransferQueueError
from transfer_queue.samplers import BaseSampler


def guarded(sampler: BaseSampler, call: Callable[[], Any]) -> Any:
    """Run user code: "not enough yet" becomes None, anything that is not ours a `SamplerError` with the traceback."""
    try:
        return call()
    except InsufficientSamples:
        return None
    except TransferQueueError:
        raise
    except Exception as error:  # user code: whatever it raises fails only this request
        if isinstance(error, ValueError) and str(error).startswith("Insufficient ready indices"):
            return None
        text = "".join(traceback.format_exception(error)).rstrip()
        raise SamplerError(f"sampler {sampler!r} raised {type(error).__name__}: {error}\n{text}") from error


def state_of(sampler: BaseSampler) -> dict[str, Any] | None:
    """A copy of what a sampler keeps, None if it keeps nothing; `SamplerError` for what a journal cannot hold."""
    state_dict = getattr(sampler, "state_dict", None)
    if state_dict is None:
        return None
    state = guarded(sampler, state_dict)
    if not isinstance(state, dict) or not _is_plain(state):
        raise SamplerError(
            f"state_dict of sampler {sampler!r} must return a dict of numbers, texts, bytes, NumPy arrays, and lists, "
            f"tuples and dicts of those, not {state!r:.200}"
        )
    return copy.deepcopy(state)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str | int) and _is_plain(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return value is None or isinstance(value, bool | int | float | str | bytes)
