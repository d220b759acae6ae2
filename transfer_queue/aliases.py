"""Module paths under which other libraries with this import name have what is somewhere else here.

`MODULES` holds modules that exist only as such paths, `NAMES` what modules of ours answer to beside what they define.
Both say where a name really lives, as "module:name" below `transfer_queue`; nothing is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PACKAGE = "transfer_queue"

_SAMPLERS = {
    "BaseSampler": "samplers:BaseSampler",
    "GRPOGroupNSampler": "samplers:GRPOGroupNSampler",
    "RankAwareSampler": "samplers:RankAwareSampler",
    "SeqlenBalancedSampler": "samplers:SeqlenBalancedSampler",
    "SequentialSampler": "samplers.pairs:SequentialSampler",
}
_SERVER_INFO = {
    "ZMQServerInfo": "metadata:ZMQServerInfo",
    "process_zmq_server_info": "runtime.by_hand:process_zmq_server_info",
}
_PLACEMENT = {"get_placement_group": "runtime.by_hand:get_placement_group"}

MODULES: Mapping[str, Mapping[str, str]] = {
    "interface": {
        name: f":{name}"
        for name in (
            *("init", "close", "get_client", "get_metrics_endpoint", "save_checkpoint", "load_checkpoint"),
            *("kv_put", "kv_batch_put", "kv_batch_get", "kv_batch_get_by_meta", "kv_list", "kv_clear"),
            *("async_kv_put", "async_kv_batch_put", "async_kv_batch_get", "async_kv_batch_get_by_meta"),
            *("async_kv_list", "async_kv_clear"),
        )
    },
    "sampler": _SAMPLERS,
    "sampler.base": {"BaseSampler": _SAMPLERS["BaseSampler"]},
    "sampler.grpo_group_n_sampler": {"GRPOGroupNSampler": _SAMPLERS["GRPOGroupNSampler"]},
    "sampler.rank_aware_sampler": {"RankAwareSampler": _SAMPLERS["RankAwareSampler"]},
    "sampler.sequential_sampler": {"SequentialSampler": _SAMPLERS["SequentialSampler"]},
    "sampler.seqlen_balanced_sampler": {
        "SeqlenBalancedSampler": _SAMPLERS["SeqlenBalancedSampler"],
        "get_seqlen_balanced_partitions": "samplers.balancing:get_seqlen_balanced_partitions",
    },
    "storage.simple_storage": {"SimpleStorageUnit": "runtime.actors:SimpleStorageUnit"},
    "utils": {},
    "utils.logging_utils": {"get_logger": "aliases:get_logger"},
    "utils.zmq_utils": _SERVER_INFO,
    "utils.enum_utils": {"Role": "metadata:Role"},
    "utils.common": _PLACEMENT,
}

NAMES: Mapping[str, Mapping[str, str]] = {
    "": {
        "AsyncTransferQueueClient": "client.client:TransferQueueClient",
        "StorageKeyNotFoundError": "errors:StaleSampleError",
    },
    "client": {
        "TransferQueueClient": "client.client:TransferQueueClient",
        "AsyncTransferQueueClient": "client.client:TransferQueueClient",
    },
    "controller": {"TransferQueueController": "runtime.actors:TransferQueueController"},
    "storage": {"SimpleStorageUnit": "runtime.actors:SimpleStorageUnit"},
}

# which are attributes of the package without being imported by name
_MODULES_OF_THE_PACKAGE = {"metadata", "dataloader"} | {path.partition(".")[0] for path in (*MODULES, *NAMES) if path}


def resolve(target: str) -> Any:
    """What "module:name" below the package means."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(f"{PACKAGE}.{module}" if module else PACKAGE), name)


def lazily(module: str) -> Callable[[str], Any]:
    """A module's `__getattr__` for the names that the table has for it; of the package, also for modules below it."""
    names = NAMES[_below(module)]

    def look_up(name: str) -> Any:
        if name in names:
            return resolve(names[name])
        if module == PACKAGE and name in _MODULES_OF_THE_PACKAGE:
            return importlib.import_module(f"{PACKAGE}.{name}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return look_up


def _below(module: str) -> str:
    return module.removeprefix(PACKAGE).removeprefix(".")


def get_logger(name: str, default_level: int | str = "WARNING") -> logging.Logger:
    """The logger of this name, at TQ_LOGGING_LEVEL or `default_level` unless it has a level. No handlers are added."""
    logger = logging.getLogger(name)
    if logger.level == logging.NOTSET:
        level = importlib.import_module(f"{PACKAGE}.environment").logging_level("TQ_LOGGING_LEVEL")
        logger.setLevel(default_level if level is None else level)
    return logger


class _Alias(types.ModuleType):
    """A module that consists of names of others."""

    def __init__(self, name: str, doc: str) -> None:
        super().__init__(name, doc)
        self.__path__ = []  # so that paths below it are looked for

    def __getattr__(self, name: str) -> Any:
        below = _below(self.__name__)
        if f"{below}.{name}" in MODULES:
            return importlib.import_module(f"{self.__name__}.{name}")
        names = MODULES[below]
        if name not in names:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return resolve(names[name])

    def __dir__(self) -> list[str]:
        return sorted(MODULES[_below(self.__name__)])


class _Interface(_Alias):
    """`_TQ_CLIENT` and `_TQ_CONTROLLER` are the attachment of this process; assigning None to either drops it."""

    _ATTACHMENT = ("_TQ_CLIENT", "_TQ_CONTROLLER")

    def __getattr__(self, name: str) -> Any:
        if name not in self._ATTACHMENT:
            return super().__getattr__(name)
        session = importlib.import_module(f"{PACKAGE}.session")
        return session.current_client() if name == "_TQ_CLIENT" else session.current_controller()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._ATTACHMENT:
            super().__setattr__(name, value)
        elif value is None:
            importlib.import_module(f"{PACKAGE}.session").detach()
        else:
            raise AttributeError(f"{name} can be set to None only, which detaches this process")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = fullname.startswith(f"{PACKAGE}.") and _below(fullname) in MODULES
        return importlib.machinery.ModuleSpec(fullname, self) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        kind = _Interface if spec.name == f"{PACKAGE}.interface" else _Alias
        return kind(spec.name, f"Names of other modules, see {__name__}.")

    def exec_module(self, module: types.ModuleType) -> None:
        """There is nothing to execute: names are looked up when they are asked for."""


def install() -> None:
    """Let the paths be imported. Ours come first: the finder is asked last."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
