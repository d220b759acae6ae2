"""`python -m benchmarks kv` and others; `--help` lists them and the options.

Ends with status 0, or 130 after Ctrl-C. What was measured until then is printed and written in any case.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.scale import SCALES
from benchmarks.workloads import PARTS, SAFETY, WORKLOADS

if TYPE_CHECKING:
    from benchmarks.figures import Report
    from benchmarks.peers.table import PeerKind
    from benchmarks.scale import Scale

BENCHMARKS = {
    "kv": "put and get of whole batches, from one process to another",
    "control": "latencies: draws, a put of one sample, wake-ups",
    "stream": "many producers of single trajectories, several consumers",
    "loader": "micro-batches of a StreamingDataLoader; 4 ranks × 2 workers, one of them restarted",
    "rl_step": "the stages of one training step, and how long each waits",
    "costs": "starts, idle processor time and memory",
    "curves": "how times grow with bytes, samples, fields, partitions, tasks, waiters and clients",
    SAFETY: "what journal, checksums, encryption, leases, recovery and checkpoints cost",
}
ALL = "all"
RUNTIMES = ("ray", "processes", "embedded")
INTERRUPTED = 130
DESCRIPTION = "; ".join(f"{name}: {text}" for name, text in BENCHMARKS.items())
EPILOG = """ray: everything in actors of one host; processes: the queue here, writer and reader in a process each;
embedded: everything in threads of this process; safety starts sessions of child processes of its own"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("benchmark", choices=(*BENCHMARKS, ALL))
    told = "; ".join(f"{name}: {text}" for name, text in WORKLOADS.items())
    parser.add_argument("--workloads", type=_workloads, default=tuple(WORKLOADS), metavar="W,W", help=f"of kv. {told}")
    told = "; ".join(f"{name}: {text}" for name, text in PARTS.items())
    parser.add_argument("--parts", type=_parts, default=tuple(PARTS), metavar="P,P", help=f"of safety. {told}")
    text = "ray, transferqueue==VERSION, mooncake: measured in turn with ours by kv and control"
    parser.add_argument("--peers", type=_peers, default=(), metavar="P,P", help=text)
    parser.add_argument("--json", type=_file, metavar="FILE", help="write commit, machine, versions and all figures")
    parser.add_argument("--plot", type=_picture, metavar="FILE.png", help="draw the figures; needs the extra 'rollout'")
    parser.add_argument("--runtime", choices=RUNTIMES, default="ray", help="where queue, writer and reader live")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="tiny: to see that it works")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark or all; return the exit status."""
    options = parse(argv)
    from benchmarks.figures import Report  # from here on torch is needed

    runtime = "processes" if options.benchmark == SAFETY else options.runtime
    report = Report(options.benchmark, {"runtime": runtime, "scale": options.scale})
    try:
        _measure(report, options)
        report.complete = True
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        print(report.table())
        if options.json is not None:
            if options.benchmark == SAFETY:
                report.join(options.json)
            report.write(options.json)
        if options.plot is not None:
            _plot(report, options.plot)
    return 0


def _measure(report: Report, options: argparse.Namespace) -> None:
    from benchmarks import calls, floors
    from benchmarks.placement import PLACEMENTS

    scale = SCALES[options.scale]
    if options.benchmark == SAFETY:
        _measure_safety(report, scale, options)
        return
    more: dict[str, dict[str, Any]] = {"kv": {"workloads": options.workloads, "peers": options.peers}}
    print("measuring floors ...", flush=True)
    floors.measure(report, scale)
    alone = [name for name in BENCHMARKS if name != SAFETY]
    for name in alone if options.benchmark == ALL else (options.benchmark,):
        print(f"measuring {name} ...", flush=True)
        report.benchmark = name
        measure = importlib.import_module(f"benchmarks.{name}").measure
        with PLACEMENTS[options.runtime]() as placement:
            measure(report, scale, placement, **more.get(name, {}))
            if name == "control":
                calls.measure(report, scale, placement, options.peers)
    if options.benchmark == ALL:
        _measure_safety(report, scale, options)


def _measure_safety(report: Report, scale: Scale, options: argparse.Namespace) -> None:
    from benchmarks import safety

    safety.measure(report, scale, options.parts)


def _plot(report: Report, file: Path) -> None:
    from benchmarks import charts

    charts.draw(report.record(), file)


# ---------------------------------------------------------------- arguments


def _workloads(text: str) -> tuple[str, ...]:
    return _known("workload", text, WORKLOADS)


def _parts(text: str) -> tuple[str, ...]:
    return _known("part", text, PARTS)


def _known(what: str, text: str, known: Mapping[str, str]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no {what} {unknown[0]!r}; known: {', '.join(known)}")
    return names


def _peers(text: str) -> tuple[PeerKind, ...]:
    from benchmarks.peers.table import chosen

    try:
        return tuple(chosen(name) for name in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def _picture(text: str) -> Path:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("drawing needs matplotlib: pip install 'transfer-queue[rollout]'")
    return _file(text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
