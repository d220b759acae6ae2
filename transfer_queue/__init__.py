"""A data queue for RL post-training: producers write fields of samples, tasks draw the samples that are ready."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.4.0"

if TYPE_CHECKING:
    from transfer_queue.client.client import TransferQueueClient
    from transfer_queue.metadata import BatchMeta, ZMQServerInfo
    from transfer_queue.runtime.ray import SimpleStorageUnit, TransferQueueController
    from transfer_queue.samplers import BaseSampler, DPSampler, GRPOSampler, SequentialSampler
    from transfer_queue.session import close, get_client, init

# Everything is imported at its first use, so that `import transfer_queue` loads neither ray nor torch.
_HOME = {
    "BaseSampler": "samplers",
    "BatchMeta": "metadata",
    "DPSampler": "samplers",
    "GRPOSampler": "samplers",
    "SequentialSampler": "samplers",
    "SimpleStorageUnit": "runtime.ray",
    "TransferQueueClient": "client.client",
    "TransferQueueController": "runtime.ray",
    "ZMQServerInfo": "metadata",
    "close": "session",
    "get_client": "session",
    "init": "session",
}

__all__ = [
    "BaseSampler",
    "BatchMeta",
    "DPSampler",
    "GRPOSampler",
    "SequentialSampler",
    "SimpleStorageUnit",
    "TransferQueueClient",
    "TransferQueueController",
    "ZMQServerInfo",
    "__version__",
    "close",
    "get_client",
    "init",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
