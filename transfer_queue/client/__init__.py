"""Client operations: written once as generators of steps, driven by a synchronous and an asynchronous driver."""
