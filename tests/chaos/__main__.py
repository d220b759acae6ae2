"""Chaos for as long as wanted: `python -m tests.chaos --minutes 30 --seed 7`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.chaos.faults import BY_NAME, FAULTS
from tests.chaos.run import run, summary
from tests.chaos.steps import every_step
from tests.chaos.zygote import Zygote


def main() -> int:
    """Run, print a table, return whether anything was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--faults", default="", help="parts of names, separated by commas; default: all")
    parser.add_argument("--runtime", default="processes", choices=["processes"])
    parser.add_argument("--json", type=Path, help="write the summary here")
    parser.add_argument(
        "--keep",
        type=Path,
        default=Path("/tmp/tq-chaos-failed"),
        help="folder for the evidence of rounds that failed, one folder each",
    )
    parser.add_argument("--steps", action="store_true", help="first kill every process at every step of each operation")
    arguments = parser.parse_args()
    wanted = [part for part in arguments.faults.split(",") if part]
    faults = [fault for fault in FAULTS if not wanted or any(part in fault.name for part in wanted)]
    if not faults:
        parser.error(f"no fault is called like that; there are: {', '.join(BY_NAME)}")
    steps: dict[str, Any] = {"kills": [], "violations": []}

    def save(found: dict[str, Any]) -> None:
        """Write what was found so far, so that nothing is lost if the run is ended."""
        if arguments.json:
            partial = arguments.json.with_name(f"{arguments.json.name}.new")
            whole = found | {"steps": steps, "violations": found["violations"] + steps["violations"]}
            partial.write_text(json.dumps(whole, indent=1))
            partial.rename(arguments.json)

    if arguments.steps:
        steps = _steps()
        save(summary(arguments.seed, 0.0, []))
    found = run(arguments.minutes, arguments.seed, faults, arguments.keep, _say, save) | {"steps": steps}
    save(found)
    found["violations"] = found["violations"] + steps["violations"]
    _say(table(found))
    return bool(found["violations"])


def table(found: dict[str, Any]) -> str:
    """Fault × times × outcome, recovery times, and what was violated."""
    lines = [f"{'fault':44} {'times':>5}  outcome"]
    for name, entry in sorted(found["faults"].items()):
        bad = entry["in failed rounds"]
        outcome = f"{entry['recovered']} recovered" if not bad else f"in {bad} rounds with a violation"
        lines.append(f"{name:44} {entry['times']:5}  {outcome}")
    for entry in found["steps"]["kills"]:
        name = f"kill {entry['victim']} in {entry['operation']}"
        lines.append(f"{name:44} {entry['kills']:5}  {entry['outcome']}")
    for server, entry in found["recovery"].items():
        if entry["kills"]:
            lines.append(
                f"{server}: first call served after {entry['p50_s']} s (p50), {entry['p99_s']} s (p99) of "
                f"{entry['kills']} kills; after Python and the library were loaded: "
                f"{entry['beyond_restart_p50_s']} s, {entry['beyond_restart_p99_s']} s"
            )
    lines.append(f"{found['rounds']} rounds, {found['minutes']} minutes, seed {found['seed']}: {found['counts']}")
    lines += [f"evidence: {folder}" for folder in found["evidence"]]
    lines += [f"VIOLATION {violation}" for violation in found["violations"]]
    return "\n".join(lines)


def _steps() -> dict[str, Any]:
    with Zygote() as zygote:
        return every_step(zygote, tell=_say).as_plain()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
