"""The controller: the ledger behind one lock, and the storage units it knows."""

from transfer_queue.aliases import lazily
from transfer_queue.controller.service import ControllerService

__all__ = ["ControllerService"]

__getattr__ = lazily(__name__)
