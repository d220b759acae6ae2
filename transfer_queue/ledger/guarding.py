"""Calling samplers: whatever users' code does, it fails one request and nothing else."""

from __future__ import annotations

import copy
import functools
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from transfer_queue.errors import InsufficientSamples, SamplerError, TransferQueueError
from transfer_queue.samplers import BaseSampler
from transfer_queue.samplers.states import states_of


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


@functools.lru_cache(maxsize=256)
def has_own_state(cls: type[BaseSampler]) -> bool:
    """Samplers of this class say themselves what has to come back, beside the batches that they keep for ranks."""
    return cls.save_checkpoint is not BaseSampler.save_checkpoint or hasattr(cls, "state_dict")


def state_of(sampler: BaseSampler) -> dict[str, Any] | None:
    """A copy of what a sampler keeps, None if it keeps nothing; `SamplerError` for what a journal cannot hold."""
    if not has_own_state(type(sampler)) and not states_of(sampler):
        return None
    take = getattr(sampler, "state_dict", sampler.save_checkpoint)
    state = guarded(sampler, take)
    if not isinstance(state, dict):
        raise SamplerError(_UNFIT.format(take.__name__, sampler, state))
    return dict(plain_copy(sampler, take.__name__, state))


def plain_copy(sampler: BaseSampler, source: str, value: Any) -> Any:
    """A copy of what a sampler keeps; `SamplerError` for what a journal cannot hold."""
    if not _is_plain(value):
        raise SamplerError(_UNFIT.format(source, sampler, value))
    return copy.deepcopy(value)


_UNFIT = (
    "{} of sampler {!r} must be a dict of numbers, texts, bytes, NumPy arrays, and lists, tuples and dicts of those, "
    "not {!r:.200}"
)


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key is None or isinstance(key, str | int) for key in value) and all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufc"
    return value is None or isinstance(value, bool | int | float | str | bytes | np.generic)
