"""`python -m benchmarks.numbers`: the section "Numbers" of the README, made from the records in `benchmarks/results`.

A record is what `python -m benchmarks NAME --json benchmarks/results/NAME.json` writes; `all.json` stands for the
benchmarks that have none of their own. `--check` only says whether the section has the form that its records give: the
same tables, rows and labels; the values may be those of other runs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks import safety_tables
from benchmarks.tables import commits, machine_line, markdown, short
from benchmarks.workloads import SAFETY

Entry: TypeAlias = "dict[str, Any]"
Value: TypeAlias = "Callable[[str], str]"  # writes a measured value into the text

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
BEGIN = "<!-- numbers: `python -m benchmarks.numbers` writes what follows -->"
END = "<!-- end of numbers -->"
COMMAND = "python -m benchmarks.numbers"

_ALL = "all"
_MISSING = "–"
_VALUE = "\0"  # stands for any value while forms are compared
_ANY = r"[^|\n]+?"


# ---------------------------------------------------------------- records


class Results:
    """The figures of several records, found by benchmark, case and measure."""

    def __init__(self, records: Iterable[Entry]) -> None:
        self.records = sorted(records, key=lambda record: record["benchmark"] == _ALL)
        self._settled: dict[str, Entry] = {}
        for record in self.records:
            for entry in [*record["measurements"], *record["comparisons"], *record["quantities"]]:
                self._settled.setdefault(entry["benchmark"], record)

    def entries(self, kind: str, benchmark: str) -> list[Entry]:
        record = self._settled.get(benchmark)
        return [] if record is None else [one for one in record[kind] if one["benchmark"] == benchmark]

    def find(self, kind: str, benchmark: str, case: str, measure: str, **more: str) -> Entry | None:
        wanted = {"case": case, "measure": measure, **more}
        entries = self.entries(kind, benchmark)
        return next((one for one in entries if all(one[key] == value for key, value in wanted.items())), None)

    def floor(self, measure: str) -> Entry | None:
        floors = (one for record in self.records for one in record["measurements"] if one["case"] == "floor")
        return next((one for one in floors if one["measure"] == measure), None)


def load(folder: Path = RESULTS) -> Results:
    return Results(json.loads(file.read_text()) for file in sorted(folder.glob("*.json")))


# ---------------------------------------------------------------- text


def section(results: Results, value: Value) -> str:
    """The text between the marks. Parts whose benchmark has no record are left out."""
    parts = [_origin(results, value), _batches(results, value), _peers(results, value), _lines(results, value)]
    parts += [_loader(results, value)]
    parts += [safety_tables.ratios(results, value), safety_tables.recovery(results, value)]
    parts += [safety_tables.checkpoints(results, value)]
    return "\n\n".join(part for part in parts if part)


def _origin(results: Results, value: Value) -> str:
    lines = []
    for record in results.records:
        settings = record["settings"]
        command = f"python -m benchmarks {record['benchmark']}"
        peers = ",".join(dict.fromkeys(_peer_argument(one["peer"]) for one in record["peers"]))
        command += f" --peers {peers}" if peers else ""
        if record["benchmark"] != SAFETY and settings["runtime"] != "ray":
            command += f" --runtime {settings['runtime']}"
        lines.append(f"* `{command}`: commit {value(commits(record))}, {value(machine_line(record['machine']))}")
    roof = results.floor("memcpy, warm pages")
    trip = results.floor("Unix socket round trip, 0.1 ms of work at either end")
    floors = ""
    if roof is not None and trip is not None:
        floors = (
            f" Floors of that machine: memcpy of warm pages {value(short(roof['gb_per_s']))} GB/s; a bare Unix"
            f" socket there and back {value(short(trip['p50_ms']))} ms if both ends have 0.1 ms of work in between."
        )
    return "\n".join([f"Medians, unless something else is said.{floors}", "", *lines])


def _peer_argument(label: str) -> str:
    """How `--peers` is told of what a record calls `ray-numpy` or `transferqueue 0.1.11`."""
    name, _, version = label.partition(" ")
    return f"{name.removesuffix('-numpy')}=={version}" if version else name.removesuffix("-numpy")


_BATCHES = {
    "dense, 1024 × 9 × 8192 float32": ("dense", "copied"),
    "the same with `copy=False`": ("dense", "copy=False"),
    "the same, rows in random order": ("dense", "copied, rows at random"),
    "ragged, 1024 samples of up to 4096 tokens, 5 fields and strings": ("ragged", "copied"),
    "small, 16384 samples × 5 fields": ("small", "copied"),
}
_STEPS = ("draw", "get to a view", "touch every byte")
_TOTAL = "put + draw + get + touch"
_PEAK = "peak private memory beyond the start"


def _batches(results: Results, value: Value) -> str:
    rows = []
    for name, (batch, way) in _BATCHES.items():
        put = results.find("measurements", "kv", batch, "put")
        steps = [results.find("measurements", "kv", f"{batch}, {way}", step) for step in _STEPS]
        total = results.find("measurements", "kv", f"{batch}, {way}", _TOTAL)
        cells = [_ms(one, value) for one in (put, *steps)]
        rate = _MISSING if total is None else f"{value(short(total['gb_per_s']))} GB/s"
        if put is not None:
            rows.append((name, *cells, rate))
    if not rows:
        return ""
    header = ("batch", "put", "draw", "get to a view", "touch every byte", "bytes once ÷ all of it")
    told = "Whole batches from a writer to a reader, two processes of one host; a put includes its commit:"
    return f"{told}\n\n{markdown(header, rows)}"


_COMPARED = {
    "dense: put": ("dense", "put"),
    "dense: put and get, every byte touched": ("dense, copied", _TOTAL),
    "the same with `copy=False`": ("dense, copy=False", _TOTAL),
    "ragged: put and get": ("ragged, copied", _TOTAL),
    "small: put": ("small", "put"),
    "small: get": ("small, copied", "draw + get + touch"),
}
_CALLS_COMPARED = {
    "put of one 12 KiB sample": ("put of one 12 KiB sample", "alone"),
    "64 such puts in flight": ("put of one 12 KiB sample", "64 in flight, per put"),
    "`get_meta` of 64 of 65536 samples": ("get_meta(64)", "65536 samples"),
}


def _peers(results: Results, value: Value) -> str:
    found = [*results.entries("comparisons", "kv"), *results.entries("comparisons", "control")]
    told = {one["peer"]: one for record in results.records for one in record["peers"]}
    labels = [label for label in told if any(one["against"] == label for one in found)]
    if not labels:
        return ""
    rows = []
    for benchmark, table in (("kv", _COMPARED), ("control", _CALLS_COMPARED)):
        for name, (case, measure) in table.items():
            ratios = [results.find("comparisons", benchmark, case, measure, against=label) for label in labels]
            if any(ratios):
                rows.append(
                    (name, *(_MISSING if one is None else f"{value(short(one['median']))} ×" for one in ratios))
                )
    text = (
        "How many times as fast as others, measured in turn with the same data, median of the ratios of each round\n"
        "(`ray`: the object store with the TensorDict; `ray-numpy`: with a dict of NumPy arrays, which it hands out\n"
        "as views; `mooncake`: raw buffers over TCP; none of the three has samples or fields):"
    )
    return f"{text}\n\n{markdown(('', *labels), rows)}"


@dataclass(frozen=True)
class _Line:
    """What a row of the last table says, and the figure that it shows; a `*` ends a case that names its sizes."""

    text: str
    benchmark: str
    case: str
    measure: str
    kind: str = "measurements"
    unit: str | None = None  # of one that has the same name as others


_COMPARISON, _NUMBER = "comparisons", "quantities"
_SHARED = "multimodal, shared by the group"
_PARKED = "parked get_meta(1)"
_STREAM = "stream, *"
_LINES = (
    _Line("`get_meta` of 64 of 1 k samples", "control", "get_meta(64)", "1k samples"),
    _Line("… of 64 k samples", "control", "get_meta(64)", "64k samples"),
    _Line("… of 1 M samples", "control", "get_meta(64)", "1M samples"),
    _Line("put of one 12 KiB sample, alone", "control", "put of one 12 KiB sample", "beside 1M samples"),
    _Line("… 64 at once, per put", "control", "put of one 12 KiB sample", "64 in flight, per put"),
    _Line("a waiting `get_meta` returns, since the put began", "control", _PARKED, "since the put began"),
    _Line("… beside 1000 others", "control", f"{_PARKED}, 1000 others wait elsewhere", "since the put began"),
    _Line("put of the dense batch", "kv", "dense", "put", _COMPARISON, "× the rate of"),
    _Line("64 rows out of order from 8 puts, as a copy", "kv", "drawn, *", "get to a view", _COMPARISON),
    _Line("put and get of 256 MiB as 128 fields", "kv", "wide, 128 fields, copied", _TOTAL, _COMPARISON),
    _Line("a field of 4.5 GB: private memory of its writer", "kv", "one field of 4.5 GB", f"{_PEAK}, writer", _NUMBER),
    _Line("… of its reader, which gets a copy", "kv", "one field of 4.5 GB", f"{_PEAK}, reader", _NUMBER),
    _Line("one image for 8 samples: bytes stored", "kv", _SHARED, "bytes stored", _NUMBER, "× one copy"),
    _Line(
        "8 × 64 coroutines that put, 4 processes that draw", "stream", _STREAM, "samples put, drawn and read", _NUMBER
    ),
    _Line("… from put to draw", "stream", _STREAM, "from put to draw"),
    _Line("one step of rollout, reward, reference, 4 trainers", "rl_step", "rl_step, *", "step"),
    _Line("… a trainer waits", "rl_step", "rl_step, *", "trainer waits"),
    _Line("start of a session on Ray, beyond `ray.init`", "costs", "*", "start of a session beyond ray.init"),
    _Line("… of an embedded one, beyond imports", "costs", "*", "start of an embedded session beyond imports"),
    _Line("idle controller, of a core", "costs", "*", "idle processor time, controller", _NUMBER),
    _Line("idle unit, of a core", "costs", "*", "idle processor time, unit 0", _NUMBER),
)


def _lines(results: Results, value: Value) -> str:
    rows = []
    for line in _LINES:
        cells = _figure(results, line, value)
        if cells is not None:
            rows.append((line.text, *cells))
    return f"Small calls, and what else was measured:\n\n{markdown(('', 'median', 'p99'), rows)}" if rows else ""


def _figure(results: Results, line: _Line, value: Value) -> tuple[str, str] | None:
    """Median and 99th percentile, of a duration or a comparison, or the number; None if it was not measured."""

    def wanted(one: Entry) -> bool:
        prefix = line.case.removesuffix("*")
        same = one["case"].startswith(prefix) if line.case.endswith("*") else one["case"] == line.case
        return same and one["measure"] == line.measure and line.unit in {None, one.get("unit")}

    one = next((one for one in results.entries(line.kind, line.benchmark) if wanted(one)), None)
    if one is None:
        return None
    if line.kind == _COMPARISON:
        return f"{value(short(one['median']))} {one['unit']} {one['against']}", ""
    if line.kind == _NUMBER:
        return f"{value(short(one['value']))} {one['unit'].replace('1/s', 'per second')}", ""
    return _ms(one, value), f"{value(short(one['p99_ms']))} ms"


def _ms(entry: Entry | None, value: Value) -> str:
    return _MISSING if entry is None else f"{value(short(entry['p50_ms']))} ms"


_NEXT = "to the next 1 MiB micro-batch"
_GAPS = (
    ("0 workers, a loop that asks at once", "loader, 0 workers"),
    ("… that computes for 10 ms", "loader, 0 workers, 10 ms of work in between"),
    ("2 workers, a loop that asks at once", "loader, 2 workers"),
    ("… that computes for 10 ms", "loader, 2 workers, 10 ms of work in between"),
)
_RESTARTED = "loader, 4 ranks × 2 workers, one restarted"
_GAP_AIM = "≤ 2 ms"


def _loader(results: Results, value: Value) -> str:
    """How long a loop waits for micro-batches, and what ranks that share a partition were handed."""
    rows = []
    for text, case in _GAPS:
        one = results.find("measurements", "loader", case, _NEXT)
        if one is not None:
            rows.append((text, _ms(one, value), f"{value(short(one['p99_ms']))} ms", _GAP_AIM))
    if not rows:
        return ""
    told = "`StreamingDataLoader`: how long a loop waits for the next micro-batch of 1 MiB that is there:"
    parts = [f"{told}\n\n{markdown(('', 'median', 'p99', 'aim of the median'), rows)}"]
    once = results.find("quantities", "loader", _RESTARTED, "samples that came exactly once")
    rate = results.find("quantities", "loader", _RESTARTED, "samples drawn, read and handed out")
    if once is not None and rate is not None:
        parts.append(
            f"4 ranks × 2 workers under leases, one rank stopped midway and replaced: {value(short(once['value']))}"
            f" samples put,\neach handed out exactly once; {value(short(rate['value']))} per second, starts of all"
            " processes included."
        )
    return "\n\n".join(parts)


# ---------------------------------------------------------------- README


def written(readme: str, text: str, begin: str = BEGIN, end: str = END) -> str:
    """The README with that text between two marks. Raises `ValueError` if it lacks them."""
    before, _, rest = readme.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the README lacks the lines {begin!r} and {end!r}")
    return f"{before}{begin}\n\n{text}\n\n{end}{after}"


def has_form(readme: str, results: Results) -> bool:
    """Whether the section differs in values alone from what the records give."""
    form = written(readme, section(results, lambda _: _VALUE))
    return re.fullmatch(_ANY.join(map(re.escape, form.split(_VALUE))), readme) is not None


def main(argv: Sequence[str] | None = None, readme: Path = README, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the section has another form")
    options = parser.parse_args(argv)
    results, text = load(folder), readme.read_text()
    if not options.check:
        readme.write_text(written(text, section(results, lambda value: value)))
        return 0
    if has_form(text, results):
        return 0
    print(f"the section 'Numbers' does not show the records of {folder.name}: run `{COMMAND}`", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
