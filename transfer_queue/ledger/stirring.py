"""What changes make possible: where parked requests have to be looked at again."""

from __future__ import annotations


class Stirred:
    """What changed since `take`."""

    def __init__(self) -> None:
        self.window_freed = False  # puts that wait may pass now
        self._partitions: dict[str, set[str] | None] = {}

    def __bool__(self) -> bool:
        return bool(self._partitions) or self.window_freed

    def stir(self, partition: str, tasks: set[str] | None = None) -> None:
        """More of a partition may be served now: to these tasks, or (None) to any."""
        if tasks is None or self._partitions.get(partition, tasks) is None:
            self._partitions[partition] = None
        elif tasks:
            self._partitions[partition] = tasks.union(self._partitions.get(partition) or ())

    def take(self) -> dict[str, set[str] | None]:
        """The partitions in which more may be served, and to which tasks; None: to any."""
        taken, self._partitions = self._partitions, {}
        return taken
