"""One data-parallel rank: an ordinary training loop around a `StreamingDataLoader`.

The loader needs the configuration of the queue and nothing else: a rank may as well be started by torchrun.

Legend: S steps of the rank, B rows of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

from recipe.streaming_ddp.config import FIELDS, NUM_RANKS, PARTITION, TASK, Settings
from recipe.streaming_ddp.stream import network
from transfer_queue.dataloader import StreamingDataLoader, StreamingDataset

REPORTS = "reports"  # partition: a row per rank

TIMEOUT = timedelta(seconds=60)


def train(rank: int, conf: Any, settings: Settings, meeting_file: Path) -> None:
    """Train on this rank's share of the stream, and put what happened into the queue under the name of the rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting_file}", TIMEOUT, world_size=NUM_RANKS, rank=rank)
    try:
        model = DistributedDataParallel(network(settings.num_features, settings.seed))
        with closing(loader_of(rank, conf, settings)) as loader:
            report = _train(model, loader, settings.lr)
            loader.dataset.client().kv_put(str(rank), REPORTS, report)
    finally:
        dist.destroy_process_group()


def loader_of(rank: int, conf: Any, settings: Settings) -> StreamingDataLoader:
    """Batches of the rank until the stream ends. A batch is acknowledged when the next one is asked for."""
    dataset = StreamingDataset(
        conf,
        batch_size=settings.batch_size,
        micro_batch_size=settings.batch_size,
        data_fields=FIELDS,
        partition_id=PARTITION,
        task_name=TASK,
        dp_rank=rank,
        should_check_consumption_status=True,
        lease=settings.lease_s,
        keep_batches=False,
    )
    # a rank that was spawned would spawn its workers as well, and each of them would import torch anew
    context = "fork" if settings.num_workers else None
    return StreamingDataLoader(dataset, num_workers=settings.num_workers, multiprocessing_context=context)


def _train(model: nn.Module, loader: Iterable[tuple[TensorDict, Any]], lr: float) -> dict[str, Tensor]:
    """Step once per batch; the gradients are averaged over the ranks while they are computed.

    Returns `losses` [S], `waits_s` [S] for each batch, `row_ids` [S B], `weights` [number of parameters], and `busy`,
    the share of the time after the first batch in which the processors of the machine worked, on anything.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    losses, waits_s, row_ids = [], [], []
    before = processor_ticks()
    for (data, _), waited_s in timed(loader):
        loss = nn.functional.mse_loss(model(data["x"])[:, 0], data["y"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        waits_s.append(waited_s)
        row_ids.append(data["row_id"])
        if len(losses) == 1:
            before = processor_ticks()
    busy, total = (now - then for now, then in zip(processor_ticks(), before, strict=True))
    return {
        "losses": torch.stack(losses),
        "waits_s": torch.tensor(waits_s),
        "row_ids": torch.cat(row_ids),
        "busy": torch.tensor(busy / max(total, 1)),
        "weights": parameters_to_vector(model.parameters()).detach(),
    }


def processor_ticks() -> tuple[int, int]:
    """Those for which the processors of the machine worked since its start, and all; see `man 5 proc`."""
    line = Path("/proc/stat").read_text().partition("\n")[0]
    ticks = [int(number) for number in line.split()[1:9]]  # what follows is counted in the first two already
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def timed(batches: Iterable[Any]) -> Iterator[tuple[Any, float]]:
    """Yield each batch with the seconds that the loop waited for it."""
    upcoming = iter(batches)
    while True:
        started = time.perf_counter()
        try:
            batch = next(upcoming)
        except StopIteration:
            return
        yield batch, time.perf_counter() - started
