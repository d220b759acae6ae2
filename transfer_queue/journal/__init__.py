"""A journal: records of bytes that outlive the process that appended them. It knows nothing of what they say."""

from transfer_queue.journal.reading import Recovered
from transfer_queue.journal.snapshot import SnapshotWriter
from transfer_queue.journal.writer import Journal

__all__ = ["Journal", "Recovered", "SnapshotWriter"]
