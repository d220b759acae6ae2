"""Configuration: the packaged defaults, the caller's changes, and what they mean."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from transfer_queue.errors import InvalidArgument, UnknownName, WrongType, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger("transfer_queue")

RUNTIMES = ("auto", "embedded", "ray")
TRANSPORTS = ("auto", "tcp")
LAYOUTS = ("as_put", "jagged", "dense")
BACKENDS = ("SimpleStorage",)


@dataclass(frozen=True)
class Settings:
    """The checked values of a configuration that the library itself reads."""

    runtime: str
    address: str | None
    namespace: str
    attach_timeout_s: float
    transport: str
    layout: str
    allow_pickle: bool
    sampler: Any
    global_batch_size: int | None
    num_global_batch: int
    num_n_samples: int
    host: str
    num_units: int | None
    capacity_bytes: int | None
    arena_bytes: int


def merged(conf: DictConfig | Mapping[str, Any] | None) -> DictConfig:
    """Lay `conf` over the packaged defaults. Unknown keys are kept, with a warning that names the nearest known one.

    The caller's object is not changed. Values may be objects (samplers, endpoints).
    """
    from omegaconf import OmegaConf

    text = resources.files("transfer_queue").joinpath("config.yaml").read_text()
    defaults: Any = OmegaConf.to_container(OmegaConf.create(text))
    given = _plain(conf)
    _warn_unknown(defaults, given, "")
    return OmegaConf.create(_laid_over(defaults, given), flags={"allow_objects": True})


def settings(conf: DictConfig) -> Settings:
    """Check the values; each error names the key."""
    backend = conf.backend.storage_backend
    if backend not in BACKENDS:
        raise UnknownName(f"backend.storage_backend: unknown backend {backend!r}{nearest(str(backend), BACKENDS)}")
    storage, controller = conf.backend[backend], conf.controller
    return Settings(
        runtime=_one_of("runtime", conf.runtime, RUNTIMES),
        address=conf.address if conf.address is not None else os.environ.get("TQ_ADDRESS"),
        namespace=conf.namespace,
        attach_timeout_s=_positive("attach_timeout_s", conf.attach_timeout_s, float),
        transport=_one_of("transport", conf.transport, TRANSPORTS),
        layout=_one_of("layout (or TQ_LAYOUT)", os.environ.get("TQ_LAYOUT", conf.layout), LAYOUTS),
        allow_pickle=bool(conf.allow_pickle),
        sampler=controller.sampler,
        global_batch_size=_optional("controller.global_batch_size", controller.global_batch_size),
        num_global_batch=_positive("controller.num_global_batch", controller.num_global_batch, int),
        num_n_samples=_positive("controller.num_n_samples", controller.num_n_samples, int),
        host=controller.host,
        num_units=_optional(f"backend.{backend}.num_data_storage_units", storage.num_data_storage_units),
        capacity_bytes=_optional(f"backend.{backend}.capacity_bytes", storage.capacity_bytes),
        arena_bytes=_positive(f"backend.{backend}.arena_bytes", storage.arena_bytes, int),
    )


def _plain(conf: DictConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    from omegaconf import DictConfig, OmegaConf

    if conf is None:
        return {}
    if isinstance(conf, DictConfig):
        plain = OmegaConf.to_container(conf, resolve=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}
    if not isinstance(conf, Mapping):
        raise WrongType(f"conf must be a dict or DictConfig, not {type(conf).__name__}")
    return {
        str(key): _plain(value) if isinstance(value, Mapping | DictConfig) else value for key, value in conf.items()
    }


def _laid_over(defaults: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    joined = copy.copy(defaults)
    for key, value in given.items():
        below = joined.get(key)
        both = isinstance(below, dict) and isinstance(value, Mapping)
        joined[key] = _laid_over(below, value) if both else value  # type: ignore[arg-type]  # `both` says it is a dict
    return joined


def _warn_unknown(defaults: Mapping[str, Any], given: Mapping[str, Any], path: str) -> None:
    for key, value in given.items():
        if key not in defaults:
            log.warning("configuration key %r is not known and is kept as it is%s", path + key, nearest(key, defaults))
        elif isinstance(value, Mapping) and isinstance(defaults[key], Mapping):
            _warn_unknown(defaults[key], value, f"{path}{key}.")


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UnknownName(f"{name}: unknown value {value!r}{nearest(str(value), choices)}")
    return str(value)


def _positive(name: str, value: Any, kind: type[Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise InvalidArgument(f"{name} must be a positive {kind.__name__}, not {value!r}")
    return kind(value)


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else int(_positive(name, value, int))
