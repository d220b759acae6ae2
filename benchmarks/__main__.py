"""`python -m benchmarks kv` or `control`; `--help` lists the options.

Ends with status 0, or 130 after Ctrl-C. What was measured until then is printed and written in any case.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.scale import SCALES

BENCHMARKS = {
    "kv": "put and get of whole batches, from one process to another",
    "control": "latencies: draws, a put of one sample, wake-ups",
}
RUNTIMES = ("ray", "processes", "embedded")
INTERRUPTED = 130
DESCRIPTION = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
EPILOG = """ray: everything in actors of one host; processes: the queue here, writer and reader in a process each;
embedded: everything in threads of this process"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("benchmark", choices=tuple(BENCHMARKS))
    parser.add_argument("--json", type=_file, metavar="FILE", help="write commit, machine, versions and all figures")
    parser.add_argument("--runtime", choices=RUNTIMES, default="ray", help="where queue, writer and reader live")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="tiny: to see that it works")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark; return the exit status."""
    options = parse(argv)
    from benchmarks import floors  # from here on torch is needed
    from benchmarks.figures import Report
    from benchmarks.placement import PLACEMENTS

    scale = SCALES[options.scale]
    benchmark = importlib.import_module(f"benchmarks.{options.benchmark}")
    report = Report(options.benchmark, {"runtime": options.runtime, "scale": options.scale})
    try:
        print("measuring floors ...", flush=True)
        floors.measure(report, scale)
        print(f"measuring {options.benchmark} ...", flush=True)
        with PLACEMENTS[options.runtime]() as placement:
            benchmark.measure(report, scale, placement)
        report.complete = True
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        print(report.table())
        if options.json is not None:
            report.write(options.json)
    return 0


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
