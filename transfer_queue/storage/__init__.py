"""Storage units: columnar blocks in shared memory, lent to the processes that write and read them."""

from transfer_queue.aliases import lazily

__getattr__ = lazily(__name__)
