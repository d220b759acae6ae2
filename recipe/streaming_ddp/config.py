"""What a run is made of, and its command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from recipe import command_line

NUM_RANKS = 2
PARTITION, TASK = "stream", "train"
FIELDS = ["row_id", "x", "y"]


@dataclass(frozen=True)
class Settings:
    rows: int = 65_536
    batch_size: int = 512  # rows that a rank draws and trains on at a time
    num_features: int = 512  # float32: a batch is 1 MiB
    num_workers: int = 1  # of the loader of each rank; 0: batches are drawn by a thread of the rank
    rows_per_put: int = 2_048
    lease_s: float = 30.0  # a batch that is not acknowledged for so long is handed out again
    lr: float = 3e-3
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.rows // (NUM_RANKS * self.batch_size)

    def problem(self) -> str | None:
        """Say why these settings cannot be run, if so."""
        if min(self.batch_size, self.num_features, self.rows_per_put) < 1:
            return "--batch-size, --features and --rows-per-put must be at least 1"
        if self.rows < 1 or self.rows % (NUM_RANKS * self.batch_size):
            return f"--rows {self.rows} must be divisible by {NUM_RANKS} ranks times --batch-size {self.batch_size}"
        if self.num_workers < 0:
            return f"--num-workers {self.num_workers} must be at least 0"
        if not self.lease_s > 0:
            return f"--lease {self.lease_s} must be a positive number of seconds"
        return None


def parse(argv: Sequence[str] | None) -> Settings:
    """Read a command line; a bad one exits with status 2 and says why."""
    return command_line.read(_parser(), Settings, argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recipe.streaming_ddp",
        description=f"Train on a stream of rows with DistributedDataParallel: {NUM_RANKS} ranks on gloo, one producer.",
        epilog="exit status: 0 learned; 1 crash; 2 bad arguments; 3 nothing learned; 4 rows lost or repeated; "
        "130 interrupted",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Settings()
    add = parser.add_argument
    add("--rows", type=int, default=default.rows, help="rows of the stream")
    add("--batch-size", type=int, default=default.batch_size, help="rows of a batch of one rank")
    add("--features", type=int, default=default.num_features, dest="num_features", help="numbers in a row")
    add("--num-workers", type=int, default=default.num_workers, help="worker processes of each rank's loader")
    add("--rows-per-put", type=int, default=default.rows_per_put, help="rows that the producer puts at a time")
    add("--lease", type=float, default=default.lease_s, dest="lease_s", help="seconds until a dead rank's rows return")
    add("--lr", type=float, default=default.lr, help="learning rate of Adam")
    add("--seed", type=int, default=default.seed)
    return parser
