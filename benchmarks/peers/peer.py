"""What a peer is asked to do, the same as our own writer and reader in `benchmarks.kv`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any


class Peer(ABC):
    """A store with a writer in one process and a reader in another. Commands come one at a time."""

    @abstractmethod
    def open(self) -> dict[str, str]:
        """Start everything; return the versions of the packages in use."""

    @abstractmethod
    def close(self) -> None:
        """End everything that was started. May be called at any time, more than once."""

    @abstractmethod
    def prepare(self, workload: str, scale: dict[str, Any]) -> None:
        """Make the batch of that name, the same as on our side, in the writer; `scale` has the fields of a `Scale`."""

    @abstractmethod
    def put(self) -> float:
        """Put the batch; return the seconds."""

    @abstractmethod
    def read(self) -> tuple[float, ...]:
        """Return the seconds to find the batch (if its reader has to), to get it to a view, to touch every byte.

        Raises `ValueError` if other bytes come out than were put.
        """

    @abstractmethod
    def clear(self) -> None:
        """Forget the batch that was put."""
