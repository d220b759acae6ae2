"""Configuration keys that are not known, and those that have no effect here: told once per process (checklist 2, 3)."""

from __future__ import annotations

import logging
import os
from importlib import resources
from typing import Any

import pytest
from omegaconf import OmegaConf

from transfer_queue import config
from transfer_queue.errors import InvalidArgument, TransferQueueError

Log = pytest.LogCaptureFixture

HONOURED: dict[str, tuple[Any, str]] = {  # by path: a value, and the setting that it ends in
    "metrics.enabled": (True, "metrics_enabled"),
    "metrics.port": (9001, "metrics_port"),
    "controller.sampler": ("RankAwareSampler", "sampler"),
    "controller.polling_mode": (True, "polling_mode"),
    "controller.get_meta_timeout_s": (7.0, "get_meta_timeout_s"),
    "backend.SimpleStorage.total_storage_size": (100, "limits.total_samples"),
    "backend.SimpleStorage.num_data_storage_units": (3, "num_units"),
    "backend.SimpleStorage.required_node_resource": ("disk", "required_node_resource"),
    "layout": ("jagged", "layout"),
    "strict": (True, "strict"),
    "allow_pickle": (True, "allow_pickle"),
}
TOGETHER = {f"backend.SimpleStorage.ssd_offload.{name}" for name in ("enabled", "path", "capacity_bytes")}
FILLED_BY_INIT = {"metrics.endpoint", "controller.zmq_info", "backend.SimpleStorage.zmq_info"}
NO_EFFECT: dict[str, Any] = {
    "backend.SimpleStorage.ssd_offload.threshold_bytes": 1,
    "backend.SimpleStorage.ssd_offload.glibc_mmap_threshold_bytes": 1,
    "backend.MooncakeStore.auto_init": False,
    "backend.MooncakeStore.metadata_server": "host:1",
    "backend.MooncakeStore.master_server_address": "host:2",
    "backend.MooncakeStore.local_hostname": "host",
    "backend.MooncakeStore.protocol": "rdma",
    "backend.MooncakeStore.global_segment_size": 1,
    "backend.MooncakeStore.local_buffer_size": 1,
    "backend.MooncakeStore.device_name": "mlx5_0",
    "backend.MooncakeStore.hard_pin": True,
    "backend.MooncakeStore.use_gdr": True,
    "backend.MooncakeStore.gdr_staging_buffer_mb": 1,
    "backend.MooncakeStore.offload.enabled": True,
    "backend.MooncakeStore.offload.file_storage_path": "/tmp/elsewhere",
    "backend.MooncakeStore.offload.local_buffer_size_bytes": 1,
    "backend.MooncakeStore.offload.use_uring": True,
    "backend.MooncakeStore.offload.heartbeat_interval_seconds": 1,
    "backend.MooncakeStore.offload.client_port": 1,
    "backend.MooncakeStore.offload.eviction_high_watermark_ratio": 0.5,
    "backend.MooncakeStore.offload.eviction_ratio": 0.5,
    "backend.Yuanrong.auto_init": False,
    "backend.Yuanrong.worker_port": 1,
    "backend.Yuanrong.metastore_port": 1,
    "backend.Yuanrong.enable_yr_npu_transport": True,
    "backend.Yuanrong.enable_rdma": True,
    "backend.Yuanrong.ucx_env_vars": {"UCX_TLS": "rc"},
    "backend.Yuanrong.worker_args": "--verbose",
    "backend.Yuanrong.ds_max_workers": 2,
}


@pytest.fixture(autouse=True)
def _nothing_was_told(monkeypatch: pytest.MonkeyPatch, caplog: Log) -> None:
    monkeypatch.setattr(config, "_warned_of", set())
    monkeypatch.delenv("TQ_LAYOUT", raising=False)
    monkeypatch.delenv("TQ_CONTROLLER_GET_METADATA_TIMEOUT", raising=False)
    caplog.set_level(logging.WARNING, "transfer_queue")


def conf_of(path: str, value: Any) -> dict[str, Any]:
    for key in reversed(path.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def leaves(section: Any, path: str = "") -> set[str]:
    """Paths of the values; an empty section is one."""
    found = set()
    for key, value in section.items():
        below = leaves(value, f"{path}{key}.") if isinstance(value, dict) else set()
        found |= below or {path + key}
    return found


@pytest.mark.parametrize("path", HONOURED)
def test_02_a_key_that_is_honoured(path: str, caplog: Log) -> None:
    value, setting = HONOURED[path]
    found: Any = config.settings(config.merged(conf_of(path, value)))
    for name in setting.split("."):
        found = getattr(found, name)
    assert found == value and caplog.messages == []


@pytest.mark.parametrize(
    ("section", "path"),
    [
        ({}, None),
        ({"path": "/tmp/spill"}, None),
        ({"enabled": True}, "/var/tmp"),
        ({"enabled": True, "path": "/tmp/spill"}, "/tmp/spill"),
        ({"enabled": True, "path": "spill"}, os.path.abspath("spill")),
    ],
)
def test_02_rows_go_to_disk_where_that_is_enabled(section: dict[str, Any], path: str | None, caplog: Log) -> None:
    """Other processes may have other working directories."""
    merged = config.merged(conf_of("backend.SimpleStorage.ssd_offload", {**section, "capacity_bytes": 1 << 30}))
    settings = config.settings(merged)
    assert (settings.spill_path, settings.spill_bytes) == (path, 1 << 30) and caplog.messages == []


@pytest.mark.parametrize(
    ("section", "key"),
    [(True, ""), ({"enabled": "yes"}, ".enabled"), ({"path": 1}, ".path"), ({"capacity_bytes": 0}, ".capacity_bytes")],
)
def test_02_what_is_no_such_section_is_refused_with_its_key(section: Any, key: str) -> None:
    with pytest.raises(InvalidArgument, match=f"backend.SimpleStorage.ssd_offload{key} must be"):
        config.settings(config.merged(conf_of("backend.SimpleStorage.ssd_offload", section)))


@pytest.mark.parametrize("path", NO_EFFECT)
def test_02_a_key_without_effect_is_told_once_with_what_holds_instead(path: str, caplog: Log) -> None:
    """Nothing is said where it has its default; its value is kept."""
    usual = OmegaConf.select(config.merged(None), path)
    config.merged(conf_of(path, OmegaConf.to_container(usual) if OmegaConf.is_config(usual) else usual))
    assert caplog.messages == []
    for _ in range(2):
        merged = config.merged(conf_of(path, NO_EFFECT[path]))
        config.settings(merged)
        assert OmegaConf.select(merged, path) == NO_EFFECT[path]
    [message] = caplog.messages
    assert path in message and "shared memory" in message


def test_02_the_tables_name_every_key_of_the_storage_sections() -> None:
    """Those of the packaged file that this library knows and others do not are tested with what they do."""
    text = resources.files("transfer_queue").joinpath("config.yaml").read_text()
    defaults = OmegaConf.to_container(OmegaConf.create(text))
    assert isinstance(defaults, dict)
    ours = {"backend.storage_backend", "backend.RayStore"}
    ours |= {f"backend.SimpleStorage.{name}" for name in ("capacity_bytes", "arena_bytes")}
    listed = {*HONOURED, *TOGETHER, *FILLED_BY_INIT, *NO_EFFECT, *ours}
    assert {path for path in leaves(defaults) if path.startswith(("backend.", "metrics."))} == {
        path for path in listed if path.startswith(("backend.", "metrics."))
    }


@pytest.mark.parametrize("name", ["RayStore", "MooncakeStore", "Yuanrong"])
def test_02_a_store_without_adapter_is_refused_with_what_to_use(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*SimpleStorage") as caught:
        config.settings(config.merged({"backend": {"storage_backend": name}}))
    assert isinstance(caught.value, LookupError) and isinstance(caught.value, TransferQueueError)


def test_02_an_unknown_store_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"MoonCake.*did you mean 'MooncakeStore'") as caught:
        config.settings(config.merged({"backend": {"storage_backend": "MoonCakeStor"}}))
    assert isinstance(caught.value, LookupError)


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "many"])
@pytest.mark.parametrize("key", ["total_storage_size", "num_data_storage_units"])
def test_02_a_number_of_storage_is_at_least_one(key: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"backend.SimpleStorage.{key}"):
        config.settings(config.merged(conf_of(f"backend.SimpleStorage.{key}", value)))


def test_03_an_unknown_key_is_told_once_with_the_nearest(caplog: Log) -> None:
    """However often the same configuration is read, as by a client beside the session; another key is told too."""
    for _ in range(3):
        config.merged({"enable": True, "controller": {"poling_mode": True}})
    assert len(caplog.messages) == 2
    assert any("'controller.poling_mode' is not known" in line and "'polling_mode'" in line for line in caplog.messages)
    config.merged({"controller": {"token": "x", "poling_mode": False}})
    assert len(caplog.messages) == 3 and "'controller.token'" in caplog.messages[-1]
