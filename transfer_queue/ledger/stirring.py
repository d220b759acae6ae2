"""What changes make possible: where parked requests have to be looked at again."""

from __future__ import annotations


class Stirred:
    """What changed since `take`."""

    def __init__(self) -> None:
        self.window_freed = False  # puts that wait may pass now
        self.partitions: dict[str, set[str] | None] = {}  # as `take` returns them

    def __bool__(self) -> bool:
        return bool(self.partitions) or self.window_freed

    def stir(self, partition: str, tasks: set[str] | None = None) -> None:
        """More of a partition may be served now: to these tasks, or (None) to any."""
        if tasks is None or self.partitions.get(partition, tasks) is None:
            self.partitions[partition] = None
        elif tasks:
            self.partitions[partition] = tasks.union(self.partitions.get(partition) or ())

    def take(self) -> dict[str, set[str] | None]:
        """The partitions in which more may be served, and to which tasks; None: to any."""
        taken, self.partitions = self.partitions, {}
        return taken
