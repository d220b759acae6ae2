"""Names and paths under which other frameworks import the library (checklist 1, 2, 47, 48)."""

from __future__ import annotations

import importlib
import importlib.resources
import importlib.util
import logging
import subprocess
import sys

import pytest
from omegaconf import OmegaConf
from packaging.version import Version

import transfer_queue as tq
from transfer_queue import aliases

TOP_LEVEL = """
    init close get_client get_metrics_endpoint save_checkpoint load_checkpoint
    kv_put kv_batch_put kv_batch_get kv_batch_get_by_meta kv_list kv_clear
    async_kv_put async_kv_batch_put async_kv_batch_get async_kv_batch_get_by_meta async_kv_list async_kv_clear
    BatchMeta KVBatchMeta TransferQueueClient AsyncTransferQueueClient StreamingDataset StreamingDataLoader
    BaseSampler SequentialSampler GRPOGroupNSampler RankAwareSampler SeqlenBalancedSampler
    TransferQueueController SimpleStorageUnit get_placement_group process_zmq_server_info ZMQServerInfo
    StorageKeyNotFoundError
"""

PATHS = {
    "transfer_queue.metadata": "BatchMeta KVBatchMeta",
    "transfer_queue.client": "TransferQueueClient AsyncTransferQueueClient",
    "transfer_queue.sampler": "BaseSampler SequentialSampler GRPOGroupNSampler RankAwareSampler SeqlenBalancedSampler",
    "transfer_queue.sampler.grpo_group_n_sampler": "GRPOGroupNSampler",
    "transfer_queue.sampler.rank_aware_sampler": "RankAwareSampler",
    "transfer_queue.sampler.sequential_sampler": "SequentialSampler",
    "transfer_queue.sampler.seqlen_balanced_sampler": "SeqlenBalancedSampler get_seqlen_balanced_partitions",
    "transfer_queue.dataloader": "StreamingDataset StreamingDataLoader",
    "transfer_queue.dataloader.streaming_dataset": "StreamingDataset default_fetch_batch_fn chunk_batch_fn",
    "transfer_queue.dataloader.streaming_dataloader": "StreamingDataLoader",
    "transfer_queue.storage.simple_storage": "SimpleStorageUnit",
    "transfer_queue.controller": "TransferQueueController",
    "transfer_queue.interface": "init close get_client kv_put async_kv_batch_get kv_list get_metrics_endpoint",
    "transfer_queue.utils.logging_utils": "get_logger",
    "transfer_queue.utils.zmq_utils": "ZMQServerInfo process_zmq_server_info",
    "transfer_queue.utils.enum_utils": "Role",
    "transfer_queue.utils.common": "get_placement_group",
}

KEYS = """
    metrics.enabled metrics.port metrics.endpoint
    controller.sampler controller.polling_mode controller.zmq_info controller.get_meta_timeout_s
    backend.storage_backend backend.SimpleStorage.total_storage_size backend.SimpleStorage.num_data_storage_units
    backend.SimpleStorage.required_node_resource backend.SimpleStorage.zmq_info
    backend.SimpleStorage.ssd_offload.enabled backend.SimpleStorage.ssd_offload.path
    backend.SimpleStorage.ssd_offload.threshold_bytes backend.SimpleStorage.ssd_offload.glibc_mmap_threshold_bytes
    backend.MooncakeStore.auto_init backend.MooncakeStore.metadata_server backend.MooncakeStore.master_server_address
    backend.MooncakeStore.local_hostname backend.MooncakeStore.protocol backend.MooncakeStore.global_segment_size
    backend.MooncakeStore.local_buffer_size backend.MooncakeStore.device_name backend.MooncakeStore.hard_pin
    backend.MooncakeStore.use_gdr backend.MooncakeStore.gdr_staging_buffer_mb backend.MooncakeStore.offload.enabled
    backend.MooncakeStore.offload.file_storage_path backend.MooncakeStore.offload.local_buffer_size_bytes
    backend.MooncakeStore.offload.use_uring backend.MooncakeStore.offload.heartbeat_interval_seconds
    backend.MooncakeStore.offload.client_port backend.MooncakeStore.offload.eviction_high_watermark_ratio
    backend.MooncakeStore.offload.eviction_ratio
    backend.Yuanrong.auto_init backend.Yuanrong.worker_port backend.Yuanrong.metastore_port
    backend.Yuanrong.enable_yr_npu_transport backend.Yuanrong.enable_rdma backend.Yuanrong.ucx_env_vars
    backend.Yuanrong.worker_args backend.Yuanrong.ds_max_workers
    layout strict allow_pickle
"""


def test_01_every_name_imports() -> None:
    assert Version(tq.__version__) >= Version("0.1.9")
    for name in TOP_LEVEL.split():
        assert getattr(tq, name) is not None, name
    for path, names in PATHS.items():
        module = importlib.import_module(path)
        for name in names.split():
            assert getattr(module, name) is not None, (path, name)
    assert tq.AsyncTransferQueueClient is tq.TransferQueueClient
    assert issubclass(tq.StorageKeyNotFoundError, KeyError)
    assert importlib.util.find_spec("transfer_queue.storage") is not None


def test_01_one_class_under_all_its_names() -> None:
    from transfer_queue.sampler import BaseSampler, GRPOGroupNSampler, SequentialSampler
    from transfer_queue.sampler.grpo_group_n_sampler import GRPOGroupNSampler as by_module

    assert GRPOGroupNSampler is by_module is tq.GRPOGroupNSampler
    assert BaseSampler is tq.BaseSampler
    assert SequentialSampler is not tq.SequentialSampler  # that of the other dialect returns pairs


def test_01_the_roles_have_the_values_that_are_compared_with() -> None:
    from transfer_queue.utils.enum_utils import Role

    assert {role.value for role in Role} == {"TransferQueueController", "TransferQueueStorage", "TransferQueueClient"}


@pytest.mark.parametrize("module", sorted(aliases.MODULES))
def test_01_every_alias_leads_somewhere(module: str) -> None:
    imported = importlib.import_module(f"transfer_queue.{module}")
    assert dir(imported) == sorted(aliases.MODULES[module])
    for name in dir(imported):
        assert getattr(imported, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        imported.nothing  # noqa: B018  the attribute is what is tested


def test_01_a_path_that_is_in_no_table_does_not_import() -> None:
    with pytest.raises(ModuleNotFoundError, match="transfer_queue.sampler.nothing"):
        importlib.import_module("transfer_queue.sampler.nothing")


def test_01_importing_starts_nothing() -> None:
    """Neither threads nor libraries that take long."""
    program = """
import sys, threading
import transfer_queue, transfer_queue.interface, transfer_queue.sampler, transfer_queue.utils.common
heavy = {"ray", "torch", "tensordict", "zmq"} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_02_the_packaged_configuration_has_every_key() -> None:
    conf = OmegaConf.load(str(importlib.resources.files("transfer_queue") / "config.yaml"))
    for key in KEYS.split():
        *path, last = key.split(".")
        section = conf
        for part in path:
            section = section[part]
        assert last in section, key


def test_48_get_logger_adds_no_handler() -> None:
    from transfer_queue.utils.logging_utils import get_logger

    logger = get_logger("transfer_queue.test_names", "ERROR")
    assert (logger.level, logger.handlers) == (logging.ERROR, [])
    assert get_logger("transfer_queue.test_names", "DEBUG").level == logging.ERROR


def test_01_modules_are_attributes_of_the_package() -> None:
    """`import transfer_queue` is enough to name them, as where the package imports them all."""
    program = """
import sys, transfer_queue as tq
assert "init" in dir(tq.interface) and "BaseSampler" in dir(tq.sampler)
assert tq.utils.enum_utils.Role and tq.metadata.KVBatchMeta is tq.KVBatchMeta
assert not hasattr(tq, "nothing") and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
