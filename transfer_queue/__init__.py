"""A data queue for RL post-training: producers write fields of samples, tasks draw the samples that are ready."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transfer_queue import aliases

__version__ = "0.5.0"

if TYPE_CHECKING:
    from transfer_queue.client.client import TransferQueueClient
    from transfer_queue.dataloader import StreamingDataLoader, StreamingDataset
    from transfer_queue.kv import (
        async_kv_batch_get,
        async_kv_batch_get_by_meta,
        async_kv_batch_put,
        async_kv_clear,
        async_kv_list,
        async_kv_put,
        async_kv_wait,
        async_kv_watch,
        kv_batch_get,
        kv_batch_get_by_meta,
        kv_batch_put,
        kv_clear,
        kv_list,
        kv_put,
        kv_wait,
        kv_watch,
    )
    from transfer_queue.metadata import BatchMeta, KVBatchMeta, KVDelta, ZMQServerInfo
    from transfer_queue.runtime.actors import SimpleStorageUnit, TransferQueueController
    from transfer_queue.runtime.by_hand import get_placement_group, process_zmq_server_info
    from transfer_queue.samplers import (
        BaseSampler,
        DPSampler,
        GRPOGroupNSampler,
        GRPOSampler,
        RankAwareSampler,
        SeqlenBalancedSampler,
        SequentialSampler,
    )
    from transfer_queue.session import (
        close,
        get_client,
        get_metrics_endpoint,
        init,
        load_checkpoint,
        save_checkpoint,
    )

# Everything is imported at its first use, so that `import transfer_queue` loads neither ray nor torch.
_HOME = {
    "BaseSampler": "samplers",
    "BatchMeta": "metadata",
    "DPSampler": "samplers",
    "GRPOGroupNSampler": "samplers",
    "GRPOSampler": "samplers",
    "KVBatchMeta": "metadata",
    "KVDelta": "metadata",
    "RankAwareSampler": "samplers",
    "SeqlenBalancedSampler": "samplers",
    "SequentialSampler": "samplers",
    "SimpleStorageUnit": "runtime.actors",
    "StreamingDataLoader": "dataloader",
    "StreamingDataset": "dataloader",
    "TransferQueueClient": "client.client",
    "TransferQueueController": "runtime.actors",
    "ZMQServerInfo": "metadata",
    "async_kv_batch_get": "kv",
    "async_kv_batch_get_by_meta": "kv",
    "async_kv_batch_put": "kv",
    "async_kv_clear": "kv",
    "async_kv_list": "kv",
    "async_kv_put": "kv",
    "async_kv_wait": "kv",
    "async_kv_watch": "kv",
    "close": "session",
    "get_client": "session",
    "get_metrics_endpoint": "session",
    "get_placement_group": "runtime.by_hand",
    "init": "session",
    "kv_batch_get": "kv",
    "kv_batch_get_by_meta": "kv",
    "kv_batch_put": "kv",
    "kv_clear": "kv",
    "kv_list": "kv",
    "kv_put": "kv",
    "kv_wait": "kv",
    "kv_watch": "kv",
    "load_checkpoint": "session",
    "process_zmq_server_info": "runtime.by_hand",
    "save_checkpoint": "session",
}

__all__ = [
    "BaseSampler",
    "BatchMeta",
    "DPSampler",
    "GRPOGroupNSampler",
    "GRPOSampler",
    "KVBatchMeta",
    "KVDelta",
    "RankAwareSampler",
    "SeqlenBalancedSampler",
    "SequentialSampler",
    "SimpleStorageUnit",
    "StreamingDataLoader",
    "StreamingDataset",
    "TransferQueueClient",
    "TransferQueueController",
    "ZMQServerInfo",
    "__version__",
    "async_kv_batch_get",
    "async_kv_batch_get_by_meta",
    "async_kv_batch_put",
    "async_kv_clear",
    "async_kv_list",
    "async_kv_put",
    "async_kv_wait",
    "async_kv_watch",
    "close",
    "get_client",
    "get_metrics_endpoint",
    "get_placement_group",
    "init",
    "kv_batch_get",
    "kv_batch_get_by_meta",
    "kv_batch_put",
    "kv_clear",
    "kv_list",
    "kv_put",
    "kv_wait",
    "kv_watch",
    "load_checkpoint",
    "process_zmq_server_info",
    "save_checkpoint",
]


aliases.install()


_other_name = aliases.lazily(__name__)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        return _other_name(name)
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
