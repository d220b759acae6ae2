"""The pure core: every decision about rows, fields, tasks and draws. No input or output, no clock, no threads."""

from transfer_queue.ledger.core import Ledger
from transfer_queue.ledger.limits import Limits

__all__ = ["Ledger", "Limits"]
