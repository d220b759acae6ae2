"""What `kv` moves and what `safety` measures, by name."""

from __future__ import annotations

WORKLOADS = {
    "dense": "1024 samples of 9 fields of 8192 float32",
    "ragged": "1024 samples of up to 4096 tokens, 5 fields and strings",
    "small": "16384 samples of 5 fields of up to 32 bytes",
    "wide": "256 MiB as 1, 8, 32 and 128 fields of 256 samples",
    "drawn": "the dense samples, put in 8 calls, read 64 at a time out of order",
    "large": "one field of 2 GB and one above 4 GiB",
    "multimodal": "dicts of tensors and strings, one image shared by a group of 8",
}

SAFETY = "safety"  # the benchmark; its parts:
PARTS = {
    "journal": "small calls with a journal in shared memory, on a disk and without",
    "journal-data": "whole batches with a journal in shared memory and without",
    "connections": "new clients, and the proof of the token alone",
    "encryption": "TCP with CURVE and without",
    "checksums": "whole batches with checksums, verified or not, and without",
    "leases": "consumers that acknowledge what they drew, and others",
    "controller-idle": "from SIGKILL of the controller to the first call served",
    "controller-loaded": "the same while others use the queue",
    "unit-idle": "from SIGKILL of the storage unit to the first call served",
    "unit-loaded": "the same while others use the queue",
    "checkpoint": "save and load, and the pauses that others see",
}
