"""Configuration: the packaged defaults, the caller's changes, and what they mean."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import TYPE_CHECKING, Any

from transfer_queue import environment
from transfer_queue.errors import InvalidArgument, UnknownName, WrongType, nearest

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger("transfer_queue")

RUNTIMES = ("auto", "embedded", "processes", "ray")
TRANSPORTS = ("auto", "tcp")
LAYOUTS = ("as_put", "jagged", "dense")
BACKENDS = ("SimpleStorage",)
BACKENDS_ELSEWHERE = ("RayStore", "MooncakeStore", "Yuanrong")  # of libraries with the same import name

_WHERE = ("runtime", "address", "namespace", "attach_timeout_s")
_PLAIN = (str, int, float, bool, type(None))
_LEAST_SLACK_BYTES = 16 << 20
_IN_MEMORY = "rows are in shared memory, see backend.SimpleStorage"
_SPILL_PATH = "/var/tmp"  # a disk, where /tmp may be memory
_WHOLE_FILES = "with ssd_offload, rows of any size go to files of arena_bytes when shared memory is full"
_UNUSED = {  # keys, or sections of them, and what holds instead
    "backend.SimpleStorage.ssd_offload.threshold_bytes": _WHOLE_FILES,
    "backend.SimpleStorage.ssd_offload.glibc_mmap_threshold_bytes": _WHOLE_FILES,
    **{f"backend.{name}": _IN_MEMORY for name in BACKENDS_ELSEWHERE},
}
_FREE = ("backend.Yuanrong.ucx_env_vars",)  # whose keys are names that users choose
_warned_of: set[str] = set()  # keys, in this process


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
    strict: bool
    allow_pickle: bool
    polling_mode: bool
    get_meta_timeout_s: float
    metrics_enabled: bool
    metrics_port: int
    sampler: Any
    global_batch_size: int | None
    num_global_batch: int
    num_n_samples: int
    host: str
    num_units: int | None
    required_node_resource: str | None
    capacity_bytes: int | None
    arena_bytes: int
    spill_path: str | None
    spill_bytes: int | None
    journal_enabled: bool
    journal_path: str | None
    limits: Limits
    encrypt: bool
    checksums: bool

    @property
    def client(self) -> dict[str, Any]:
        """What clients of the session do unless told otherwise, by the names of `TransferQueueClient`'s arguments."""
        return {
            "layout": self.layout,
            "strict": self.strict,
            "allow_pickle": self.allow_pickle,
            "polling_mode": self.polling_mode,
            "get_meta_timeout_s": self.get_meta_timeout_s,
            "checksums": self.checksums,
        }

    @property
    def metrics(self) -> int | None:
        """The port that metrics are served at, 0 for any free one; None: they are not served."""
        return self.metrics_port if self.metrics_enabled else None

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

    Known keys that have no effect in this library are kept too, with a warning that says what holds instead, unless
    they have their default. A process warns once of each key. The caller's object is not changed. Values may be objects
    (samplers, endpoints).
    """
    from omegaconf import OmegaConf

    text = resources.files("transfer_queue").joinpath("config.yaml").read_text()
    defaults: Any = OmegaConf.to_container(OmegaConf.create(text))
    given = _plain(conf)
    _warn_unknown(defaults, given, "")
    _warn_unused(defaults, given)
    laid = _laid_over(defaults, given)
    laid["layout"] = environment.text("TQ_LAYOUT") or laid["layout"]  # of who starts the queue, for all that attach
    return OmegaConf.create(laid, flags={"allow_objects": True})


def layout_in_force(asked: str | None, default: str) -> str:
    """The layout of one call: what it asks for, else TQ_LAYOUT of this process, else the default of the queue."""
    if asked is not None:
        return known_layout(asked)
    override = environment.text("TQ_LAYOUT")
    return known_layout(default) if override is None else known_layout(override, "TQ_LAYOUT")


def known_layout(value: Any, source: str = "layout") -> str:
    """Return the value if it is a layout, else raise `UnknownName` with where it came from and the known ones."""
    return _one_of(source, value, LAYOUTS)


def as_json(conf: DictConfig) -> dict[str, Any]:
    """The configuration as JSON has it: objects are there as they describe themselves, endpoints are left out."""
    plain = _plain(conf)
    plain["controller"].pop("zmq_info", None)
    text = json.dumps(plain, default=lambda value: getattr(value, "__name__", None) or repr(value))
    known: dict[str, Any] = json.loads(text)
    return known


def differences(asked: DictConfig | Mapping[str, Any] | None, live: DictConfig) -> list[tuple[str, Any, Any]]:
    """(key, asked, live) where plain values differ, but for the keys that only say where to look for a queue."""
    return list(_differences(_plain(asked), _plain(live), ""))


def _differences(asked: Mapping[str, Any], live: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any, Any]]:
    for key, value in asked.items():
        there = live.get(key)
        if isinstance(value, Mapping):
            yield from _differences(value, there if isinstance(there, Mapping) else {}, f"{path}{key}.")
        elif path + key not in _WHERE and isinstance(value, _PLAIN) and isinstance(there, _PLAIN) and value != there:
            yield path + key, value, there


def settings(conf: DictConfig) -> Settings:
    """Check the values; each error names the key."""
    backend = _backend(conf.backend.storage_backend)
    for name in ("journal", "limits", "metrics", "security"):
        if not isinstance(conf[name], Mapping):
            raise InvalidArgument(f"{name} must be a section of keys, not {conf[name]!r}")
    storage, controller = conf.backend[backend], conf.controller
    limits = _limits(conf.limits, _optional(f"backend.{backend}.total_storage_size", storage.total_storage_size))
    return Settings(
        runtime=_one_of("runtime", conf.runtime, RUNTIMES),
        address=conf.address if conf.address is not None else environment.text("TQ_ADDRESS"),
        namespace=conf.namespace,
        attach_timeout_s=_positive("attach_timeout_s", conf.attach_timeout_s, float),
        transport=_one_of("transport", conf.transport, TRANSPORTS),
        layout=known_layout(conf.layout, "layout (or TQ_LAYOUT)"),
        strict=_flag("strict", conf.strict),
        allow_pickle=_flag("allow_pickle", conf.allow_pickle),
        polling_mode=_flag("controller.polling_mode", controller.polling_mode),
        get_meta_timeout_s=environment.seconds("TQ_CONTROLLER_GET_METADATA_TIMEOUT")
        or _positive("controller.get_meta_timeout_s", controller.get_meta_timeout_s, float),
        metrics_enabled=_flag("metrics.enabled", conf.metrics.enabled),
        metrics_port=_port("metrics.port", conf.metrics.port),
        sampler=controller.sampler,
        global_batch_size=_optional("controller.global_batch_size", controller.global_batch_size),
        num_global_batch=_positive("controller.num_global_batch", controller.num_global_batch, int),
        num_n_samples=_positive("controller.num_n_samples", controller.num_n_samples, int),
        host=controller.host,
        num_units=_optional(f"backend.{backend}.num_data_storage_units", storage.num_data_storage_units),
        required_node_resource=_text_or_none(
            f"backend.{backend}.required_node_resource", storage.required_node_resource, "name"
        ),
        capacity_bytes=_capacity(f"backend.{backend}.capacity_bytes", storage.capacity_bytes, limits),
        arena_bytes=_positive(f"backend.{backend}.arena_bytes", storage.arena_bytes, int),
        **_spill(f"backend.{backend}.ssd_offload", storage.ssd_offload),
        journal_enabled=_flag("journal.enabled", conf.journal.enabled),
        journal_path=_text_or_none("journal.path", conf.journal.path, "path"),
        limits=limits,
        encrypt=_flag("security.encrypt", conf.security.encrypt),
        checksums=_flag("checksums", conf.checksums),
    )


def _backend(name: Any) -> str:
    if name in BACKENDS_ELSEWHERE:
        raise UnknownName(
            f"backend.storage_backend: this library has no adapter for {name!r}; leave it at {BACKENDS[0]!r}, which "
            "keeps rows in shared memory"
        )
    if name not in BACKENDS:
        known = (*BACKENDS, *BACKENDS_ELSEWHERE)
        raise UnknownName(f"backend.storage_backend: unknown backend {name!r}{nearest(str(name), known)}")
    return str(name)


def _capacity(name: str, value: Any, limits: Limits) -> int | None:
    """With a limit of bytes a unit takes no more memory than that and room to work: a tenth, at least 16 MiB."""
    if value is not None or limits.total_bytes is None:
        return _optional(name, value)
    return limits.total_bytes + max(limits.total_bytes // 10, _LEAST_SLACK_BYTES)


def _spill(name: str, conf: Any) -> dict[str, Any]:
    """Where rows go that find no shared memory, and how many bytes of them."""
    if not isinstance(conf, Mapping):
        raise InvalidArgument(f"{name} must be a section of keys, not {conf!r}")
    path = _text_or_none(f"{name}.path", conf["path"], "path") or _SPILL_PATH
    enabled = _flag(f"{name}.enabled", conf["enabled"])
    return {
        "spill_path": os.path.abspath(path) if enabled else None,
        "spill_bytes": _optional(f"{name}.capacity_bytes", conf["capacity_bytes"]),
    }


def _limits(conf: Any, total_rows: int | None) -> Limits:
    """Every limit a positive number of samples or bytes; one within another must not exceed it.

    `total_rows` is another name of `total_samples`; of both, the smaller counts.
    """
    most = conf["max_staleness"]
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 0):
        raise InvalidArgument(f"limits.max_staleness must be an int of at least 0, not {most!r}")
    positive = [field.name for field in fields(Limits) if field.name != "max_staleness"]
    given = {name: _optional(f"limits.{name}", conf[name]) for name in positive}
    given["total_samples"] = min(filter(None, (given["total_samples"], total_rows)), default=None)
    limits = Limits(**given, max_staleness=most)
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
            if _first_time(path + key):
                near = nearest(key, defaults)
                log.warning("configuration key %r is not known and is kept as it is%s", path + key, near)
        elif isinstance(value, Mapping) and isinstance(defaults[key], Mapping) and path + key not in _FREE:
            _warn_unknown(defaults[key], value, f"{path}{key}.")


def _warn_unused(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    changed = list(_changed(defaults, given, ""))
    for unused, instead in _UNUSED.items():
        told = [key for key in changed if f"{key}.".startswith(f"{unused}.") and _first_time(key)]
        if told:
            log.warning("configuration keys without effect in this library: %s; %s", ", ".join(told), instead)


def _changed(defaults: Mapping[str, Any], given: Mapping[str, Any], path: str) -> Iterator[str]:
    """The known keys that are given another value than their default."""
    for key, value in given.items():
        if isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping) and path + key not in _FREE:
            yield from _changed(defaults[key], value, f"{path}{key}.")
        elif key in defaults and value != defaults[key]:
            yield path + key


def _first_time(key: str) -> bool:
    """Whether this process has not warned of the key yet."""
    new = key not in _warned_of
    _warned_of.add(key)
    return new


def _one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise UnknownName(f"{name}: unknown value {value!r}{nearest(str(value), choices)}")
    return str(value)


def _positive(name: str, value: Any, kind: type[Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
        raise InvalidArgument(f"{name} must be a positive {kind.__name__}, not {value!r}")
    return kind(value)


def _port(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 16:
        raise InvalidArgument(f"{name} must be a port, or 0 for any, not {value!r}")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name} must be true or false, not {value!r}")
    return value


def _text_or_none(name: str, value: Any, what: str) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise InvalidArgument(f"{name} must be a {what} or null, not {value!r}")
    return value


def _optional(name: str, value: Any) -> int | None:
    return None if value is None else int(_positive(name, value, int))
