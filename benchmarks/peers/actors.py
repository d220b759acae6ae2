"""A writer and a reader as actors of a Ray cluster of their own; used inside a peer's process."""

from __future__ import annotations

import logging
from typing import Any

# One Ray CPU per core would do for the two actors; some peers reserve several for themselves and wait for ever.
CPUS = 16


class Actors:
    """Two actors, made of classes whose instances have a method per command."""

    def __init__(self, object_store_bytes: int) -> None:
        import ray

        self._ray = ray
        ray.init(
            "local",
            num_cpus=CPUS,
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )

    def start(self, kind: type, *arguments: Any) -> Any:
        return self._ray.remote(num_cpus=0)(kind).remote(*arguments)

    def ask(self, method: Any, *arguments: Any) -> Any:
        return self._ray.get(method.remote(*arguments))

    def close(self) -> None:
        self._ray.shutdown()
