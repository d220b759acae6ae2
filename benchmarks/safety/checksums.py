"""What checksums of all bytes cost: computed by who puts, and compared by who gets if that is asked for."""

from __future__ import annotations

import time

import numpy as np
import xxhash

from benchmarks import whole
from benchmarks.figures import Report
from benchmarks.safety.data import ALL, measure_batches
from benchmarks.safety.sides import WITHOUT, Sides
from benchmarks.scale import Scale

WRITTEN = "checksums written"
VERIFIED = "checksums written and verified"
AT_MOST = 1.05  # times the whole way without

_CHUNK_BYTES = 1 << 19  # as in `transfer_queue.storage.digests`
_BATCHES = ("dense", "ragged", "small")
_CONFS = {WITHOUT: {"checksums": False}, WRITTEN: {"checksums": True}, VERIFIED: {"checksums": True}}


def measure(report: Report, scale: Scale) -> None:
    """Clients with and without, in turn on one session; before it, what computing checksums takes at best."""
    _measure_floor(report, scale)
    with Sides(_CONFS) as sides:
        writer, reader = sides.stage(whole.Writer), sides.stage(whole.Reader)
        measure_batches(
            report,
            scale,
            writer,
            reader,
            _BATCHES,
            prefix="data",
            sides=list(_CONFS),
            base=WITHOUT,
            rounds=scale.turns,
            ways={VERIFIED: whole.Way("verified", verify=True)},
            aims={ALL: {WRITTEN: {"at_most": AT_MOST}, VERIFIED: {"at_most": AT_MOST}}},
        )


def _measure_floor(report: Report, scale: Scale) -> None:
    """The checksum of a chunk that lies in the cache of the core, by one thread."""
    chunk = np.ones(_CHUNK_BYTES, np.uint8)
    name = f"xxh3 of {_CHUNK_BYTES >> 10} KiB in cache, one thread"
    series = report.series("floor of checksums", name, size_bytes=_CHUNK_BYTES, skip=scale.calls // 10)
    for _ in range(scale.calls + series.skip):
        begin = time.perf_counter()
        xxhash.xxh3_64_intdigest(chunk.data)
        series.add(time.perf_counter() - begin)
