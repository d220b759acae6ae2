"""The job as a whole: the queue, a producer and the ranks as processes, and what came of them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from tensordict import TensorDict
from torch import Tensor

import transfer_queue
from recipe.grpo_tiny.checks import Check, ConservationError
from recipe.grpo_tiny.job import status_of
from recipe.sparkline import sparkline
from recipe.streaming_ddp.config import NUM_RANKS, PARTITION, TASK, Settings
from recipe.streaming_ddp.rank import REPORTS, train
from recipe.streaming_ddp.stream import produce

MIN_EXPLAINED = 0.5  # share of the variance of `y`, which is 1


def exit_status(settings: Settings) -> int:
    """Run the job, say what ended it early, and return the status that the command line promises."""
    return status_of(lambda: run(settings), "interrupted")


def run(settings: Settings) -> bool:
    """Run the job; return whether the network learned. Raises ConservationError, or what a process raised."""
    started = time.perf_counter()
    try:
        conf = _start_queue(settings)
        with tempfile.TemporaryDirectory(prefix="streaming_ddp_") as folder:
            torch.multiprocessing.spawn(_process, (conf, settings, Path(folder) / "ranks"), nprocs=NUM_RANKS + 1)
        client = transfer_queue.get_client()
        reports = client.kv_batch_get([str(rank) for rank in range(NUM_RANKS)], REPORTS)
        accounts = client.audit(PARTITION)["partitions"][PARTITION]["tasks"][TASK]
    finally:
        transfer_queue.close()
    check = _show(settings, reports)
    check_weights(reports["weights"])
    check_rows(settings.rows, reports["row_ids"].flatten(), accounts)
    print(f"rows       {settings.rows:,} put, each seen exactly once, on one rank; all acknowledged")
    print(f"{check}\nwhole job {time.perf_counter() - started:.1f} s")
    return check.passed


def _start_queue(settings: Settings) -> Any:
    """Every draw of a batch is split over the ranks, so that all of them take the same number of steps."""
    os.environ["TQ_PRE_ALLOC_SAMPLE_NUM"] = str(settings.rows)  # a stream with fewer is not over, only slow
    conf = transfer_queue.init({"runtime": "embedded"})
    transfer_queue.get_client().register_sampler(TASK, "DPSampler", dp_size=NUM_RANKS)
    return conf


def _process(index: int, conf: Any, settings: Settings, meeting_file: Path) -> None:
    """The ranks, and after them the producer. If one of the processes fails, `spawn` ends the others."""
    if index < NUM_RANKS:
        train(index, conf, settings, meeting_file)
    else:
        produce(conf, settings)


def check_rows(num_rows: int, seen: Tensor, accounts: Mapping[str, Any]) -> None:
    """Raise ConservationError unless every row was trained on once, and the queue's own accounts say the same."""
    times = torch.bincount(seen, minlength=num_rows)
    for problem, rows in (("never trained on", times == 0), ("trained on more than once", times > 1)):
        if rows.any():
            raise ConservationError(f"{int(rows.sum())} rows {problem}: {rows.nonzero().flatten()[:5].tolist()}")
    if accounts["consumed"] != num_rows or accounts["redelivered"]:
        raise ConservationError(f"{num_rows} rows were put and trained on, the queue counts {dict(accounts)}")


def check_weights(weights: Tensor) -> None:
    """Raise ConservationError unless the ranks, one per row, hold the same weights."""
    if not (weights == weights[0]).all():
        raise ConservationError("the ranks hold different weights: their gradients were not of the same steps")


def _show(settings: Settings, reports: TensorDict) -> Check:
    """Print what each rank did; `losses` and `waits_s` are [rank, step].

    On a few cores all processes of the job share them: a rank then waits for a processor as well as for its batch.
    """
    print(f"{NUM_RANKS} ranks on gloo, {settings.num_workers} loader workers each, leases of {settings.lease_s:g} s")
    size_mb = settings.batch_size * settings.num_features * 4 / 2**20
    for rank, (waits_s, rows) in enumerate(zip(reports["waits_s"], reports["row_ids"], strict=True)):
        between = 1e3 * waits_s[1:].quantile(torch.tensor([0.5, 0.95, 1.0]))
        print(
            f"rank {rank}     {len(rows):,} rows in {len(waits_s)} batches of {size_mb:.2f} MiB; first after "
            f"{waits_s[0]:.2f} s, then waited {between[0]:.1f} ms (median), {between[1]:.1f} ms (95%), "
            f"{between[2]:.1f} ms (most)"
        )
    print(f"cores      {os.cpu_count()}, busy {float(reports['busy'].mean()):.0%} from the first batch to the last")
    losses = reports["losses"].mean(0)
    tenth = max(len(losses) // 10, 1)
    explained = 1 - float(losses[-tenth:].mean())
    print(f"loss       {sparkline(losses.tolist(), top=float(losses.max()))}  {losses[0]:.2f} → {losses[-1]:.2f}")
    return Check("variance explained, last tenth of the steps", explained >= MIN_EXPLAINED, explained, MIN_EXPLAINED)
