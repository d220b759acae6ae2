"""Configuration: the packaged defaults, the caller's changes, and what they mean."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import TYPE_CHECKING, Any

from transfer_queue.errors import InvalidArgument, UnknownName, WrongType, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger("transfer_queue")

RUNTIMES = ("auto", "embedded", "processes", "ray")
TRANSPORTS = ("auto", "tcp")
LAYOUTS = ("as_put", "jagged", "dense")
BACKENDS = ("SimpleStorage",)

_LEAST_SLACK_BYTES = 16 << 20


@dataclass(frozen=True)
class Limits:
    """How much a queue takes before a put has to wait. `None`: no such limit.

    producer_*       of the samples that one client put and that are not cleared
    max_deliveries   times that a sample is handed out under a lease before it is set aside
    max_staleness    versions by which the policy that generated a sample may lag behind when it is handed out
    """

    total_bytes: int | None = None
    total_samples: int | None = None
    partition_bytes: int | None = None
    partition_samples: int | None = None
    producer_bytes: int | None = None
    producer_samples: int | None = None
    max_deliveries: int | None = None
    max_staleness: int | None = None


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
    journal_enabled: bool
    journal_path: str | None
    limits: Limits
    encrypt: bool
    checksums: bool

    @property
    def ledger(self) -> dict[str, Any]:
        """What a ledger is made with beside its sampler, as plain values."""
        limits = asdict(self.limits)
        return {
            "global_batch_size": self.global_batch_size,
            "num_global_batch": self.num_global_batch,
            "num_n_samples": self.num_n_samples,
            "max_deliveries": limits.pop("max_deliveries"),
            "max_staleness": limits.pop("max_staleness"),
            "limits": limits,
        }


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
    for name in ("journal", "limits", "security"):
        if not isinstance(conf[name], Mapping):
            raise InvalidArgument(f"{name} must be a section of keys, not {conf[name]!r}")
    storage, controller = conf.backend[backend], conf.controller
    limits = _limits(conf.limits)
    return Settings(
        runtime=_one_of("runtime", conf.runtime, RUNTIMES),
        address=conf.address if conf.address is not None else os.environ.get("TQ_ADDRESS"),
        namespace=conf.namespace,
        attach_timeout_s=_positive("attach_timeout_s", conf.attach_timeout_s, float),
        transport=_one_of("transport", conf.transport, TRANSPORTS),
        layout=_one_of("layout (or TQ_LAYOUT)", os.environ.get("TQ_LAYOUT", conf.layout), LAYOUTS),
        allow_pickle=_flag("allow_pickle", conf.allow_pickle),
        sampler=controller.sampler,
        global_batch_size=_optional("controller.global_batch_size", controller.global_batch_size),
        num_global_batch=_positive("controller.num_global_batch", controller.num_global_batch, int),
        num_n_samples=_positive("controller.num_n_samples", controller.num_n_samples, int),
        host=controller.host,
        num_units=_optional(f"backend.{backend}.num_data_storage_units", storage.num_data_storage_units),
        capacity_bytes=_capacity(f"backend.{backend}.capacity_bytes", storage.capacity_bytes, limits),
        arena_bytes=_positive(f"backend.{backend}.arena_bytes", storage.arena_bytes, int),
        journal_enabled=_flag("journal.enabled", conf.journal.enabled),
        journal_path=_text_or_none("journal.path", conf.journal.path),
        limits=limits,
        encrypt=_flag("security.encrypt", conf.security.encrypt),
        checksums=_flag("checksums", conf.checksums),
    )


def _capacity(name: str, value: Any, limits: Limits) -> int | None:
    """With a limit of bytes a unit takes no more memory than that and room to work: a tenth, at least 16 MiB."""
    if value is not None or limits.total_bytes is None:
        return _optional(name, value)
    return limits.total_bytes + max(limits.total_bytes // 10, _LEAST_SLACK_BYTES)


def _limits(conf: Any) -> Limits:
    """Every limit a positive number of samples or bytes; one within another must not exceed it."""
    most = conf["max_staleness"]
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
        raise InvalidArgument(f"limits.max_staleness must be an int of at least 0, not {most!r}")
    positive = [field.name for field in fields(Limits) if field.name != "max_staleness"]
    limits = Limits(**{name: _optional(f"limits.{name}", conf[name]) for name in positive}, max_staleness=most)
    for unit in ("bytes", "samples"):
        total = getattr(limits, f"total_{unit}")
        for part in ("partition", "producer"):
            of_part = getattr(limits, f"{part}_{unit}")
            if total is not None and of_part is not None and of_part > total:
                raise InvalidArgument(
                    f"limits.{part}_{unit} is {of_part} and could never be reached: limits.total_{unit} is {total}"
                )
    return limits


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


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be true or false, not {value!r}")
    return value


def _text_or_none(name: str, value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidArgument(f"{name} must be a path or null, not {value!r}")
    return value


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else int(_positive(name, value, int))
