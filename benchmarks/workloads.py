"""What `kv` moves, by name."""

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
