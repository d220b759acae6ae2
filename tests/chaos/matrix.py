"""The fault matrix as Markdown: `python -m tests.chaos.matrix [FILE…] [--readme]`, of what `--json` wrote.

Each row is injected by the random run, by the kills at every step, or by the tests of the suite that it names. Without
files it is made of those in `tests/chaos/results`; `--readme` writes it into the README.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.numbers import README, written
from tests.chaos.rows import ROWS, Row

RESULTS = Path(__file__).parent / "results"
BEGIN = "<!-- fault matrix: `python -m tests.chaos.matrix --readme` writes what follows -->"
END = "<!-- end of fault matrix -->"

# The rows to which the kills at every step belong, by operation (for the client) and by server.
_ROWS_OF_CLIENT = {"put": ("F04", "F05", "F06"), "draw": ("F01",), "ack": ("F02", "F03")}
_ROWS_OF_SERVER = {"controller": ("F08",), "unit-0": ("F11",)}
_IN_TURN = "SIGKILL at each journal and message step in turn"


@dataclass
class _Sum:
    """What was done for a row by one fault, over all runs. `where`: seed and minutes of those that did it."""

    how: str
    times: int = 0
    reached: int = 0
    failed: int = 0
    where: list[str] = field(default_factory=list)


def matrix(found: Sequence[dict[str, Any]]) -> str:
    """Fault, injected how, how often, with what outcome, in which runs; then the kills at every step."""
    lines = ["| fault | injected how | injections | outcome | seeds × minutes |", "| --- | --- | --- | --- | --- |"]
    lines += [_line(name, row, _injected(name, found)) for name, row in ROWS.items()]
    return "\n".join([*lines, "", *_steps(found), *_below(found)])


def _line(name: str, row: Row, injected: dict[str, _Sum]) -> str:
    by_how: dict[str, list[str]] = {}
    for fault, one in sorted(injected.items()):
        by_how.setdefault(one.how, []).append(fault)
    how = [f"{', '.join(faults)}: {words}" for words, faults in by_how.items()]
    how += [f"`{test}`" for test in row.tests]
    times, reached, failed = (
        sum(getattr(one, what) for one in injected.values()) for what in ("times", "reached", "failed")
    )
    outcome = row.outcome if reached or row.tests else "not run"
    if failed:
        outcome = f"{failed} times in a run with a violation; else {row.outcome}"
    if row.but:
        outcome += f"; {row.but}"
    count = f"{times}" if times == reached else f"{times}, {reached} of them reached"
    where = sorted({place for one in injected.values() for place in one.where})
    return f"| {name} {row.words} | {'; '.join(how)} | {count if times else 'the suite'} | {outcome} | " \
           f"{', '.join(where) or '–'} |"  # fmt: skip


def _injected(name: str, found: Sequence[dict[str, Any]]) -> dict[str, _Sum]:
    """What the runs did for a row, by fault."""
    sums: dict[str, _Sum] = {}
    for each in found:
        for fault, how, times, reached, failed, where in _done(name, each):
            one = sums.setdefault(fault, _Sum(how))
            one.times += times
            one.reached += reached
            one.failed += failed
            one.where += [] if where in one.where else [where]
    return sums


def _done(name: str, run: dict[str, Any]) -> Iterator[tuple[str, str, int, int, int, str]]:
    """Fault, how, times, reached, failed and where, for what one run did for a row."""
    where = f"{run['seed']} × {run['minutes']:g}"
    for fault, entry in run["faults"].items():
        if name in entry["rows"].split():
            yield fault, entry["how"], entry["times"], entry["recovered"], entry["in failed rounds"], where
    for entry in run["steps"]["kills"]:
        operation, victim, kills = entry["operation"], entry["victim"], entry["kills"]
        rows = _ROWS_OF_CLIENT.get(operation, ()) if victim == "client" else _ROWS_OF_SERVER[victim]
        if name in rows:
            what = f"kill client in {operation}" if victim == "client" else f"kill idle {victim.split('-')[0]}"
            yield what, _IN_TURN, kills, kills, _failed(run, operation, victim), "every step"


def _failed(run: dict[str, Any], operation: str, victim: str) -> int:
    return sum(text.startswith(f"{operation} with {victim} ") for text in run["steps"]["violations"])


def _steps(found: Sequence[dict[str, Any]]) -> list[str]:
    """The kills at every step: how many, and what had come of the operation."""
    kills: dict[str, dict[str, dict[str, int]]] = {}
    for run in found:
        for entry in run["steps"]["kills"]:
            outcomes = kills.setdefault(entry["operation"], {}).setdefault(entry["victim"], {})
            outcomes[entry["outcome"]] = outcomes.get(entry["outcome"], 0) + entry["kills"]
    if not kills:
        return []
    lines = ["| killed at every step of | client | controller | unit | violations |", "| --- | --- | --- | --- | --- |"]
    for operation, victims in kills.items():
        cells = [_told(victims.get(victim, {})) for victim in ("client", "controller", "unit-0")]
        bad = sum(_failed(run, operation, victim) for run in found for victim in victims)
        lines.append(f"| {operation} | {' | '.join(cells)} | {bad} |")
    return [*lines, ""]


def _told(outcomes: dict[str, int]) -> str:
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items()))
    times = sum(outcomes.values())
    return f"{times} kill{'s' if times > 1 else ''}: {told}" if outcomes else "has no step in it"


def _below(found: Sequence[dict[str, Any]]) -> list[str]:
    seeds = ", ".join(str(each["seed"]) for each in found)
    minutes, rounds = (sum(each[what] for each in found) for what in ("minutes", "rounds"))
    violations = sum(len(each["violations"]) for each in found)
    samples, calls = (sum(each["counts"].get(what, 0) for each in found) for what in ("samples", "calls"))
    again, expired = (sum(each["counts"].get(what, 0) for each in found) for what in ("redelivered", "expired"))
    lines = [
        f"Seeds {seeds}: {rounds} sessions in {minutes:.0f} minutes, {samples} samples, {calls} calls, {violations} "
        f"violations; {expired} deliveries ran out with their lease and {again} were delivered again for it.",
    ]
    for server in ("controller", "unit"):
        for entry in (each["recovery"][server] for each in found):
            if entry["kills"]:
                lines.append(
                    f"A killed {server} serves its first call after {entry['p50_s']} s (p99 {entry['p99_s']} s of "
                    f"{entry['kills']} kills), which is {entry['beyond_restart_p50_s']} s (p99 "
                    f"{entry['beyond_restart_p99_s']} s) after Python and the library were loaded."
                )
    return lines


def main(argv: Sequence[str] | None = None, readme: Path = README, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.matrix", description=(__doc__ or "").split(":")[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help=f"default: those in {results.name}")
    parser.add_argument("--readme", action="store_true", help="write it into the README instead of printing it")
    options = parser.parse_args(argv)
    text = matrix([json.loads(path.read_text()) for path in options.files or sorted(results.glob("*.json"))])
    if options.readme:
        readme.write_text(written(readme.read_text(), text, BEGIN, END))
    else:
        sys.stdout.write(f"{text}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
