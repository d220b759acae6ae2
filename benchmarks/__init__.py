"""How fast the queue is on this machine, beside what the machine could do at best: `python -m benchmarks --help`."""
