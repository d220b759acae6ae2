"""Fuzzing for as long as wanted: `python -m tests.fuzz --frames 10000000 --seed 7`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.attack import Attack
from tests.fuzz.servers import Servers


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, Servers() as servers:
        report = Attack(servers, arguments.seed, Path(folder)).run(arguments.frames)
        counters = servers.counters() if servers.alive else None
    seconds = time.monotonic() - begin
    shown = {"seed": arguments.seed, "seconds": round(seconds, 1), "good": report.good, **report.sent}
    sys.stdout.write(json.dumps({**shown, "counters": counters, "wrong": report.wrong}, indent=1) + "\n")
    return bool(report.wrong)


if __name__ == "__main__":
    sys.exit(main())
