"""Storage units: columnar blocks in shared memory, lent to the processes that write and read them."""
