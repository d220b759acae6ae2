"""Client operations: written once as generators of steps, driven by a synchronous and an asynchronous driver."""

from transfer_queue.aliases import lazily

__getattr__ = lazily(__name__)
