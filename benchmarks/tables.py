"""A record of a run as the text that is printed at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def text(record: dict[str, Any]) -> str:
    """Series, numbers, comparisons and peers, in tables of their own."""
    lines = [
        " · ".join([record["benchmark"], *(f"{key} {value}" for key, value in record["settings"].items())]),
        f"commit {commits(record)} · {machine_line(record['machine'])}",
        "",
        *_aligned([_HEADER, *map(_cells, record["measurements"])]),
    ]
    if record["quantities"]:
        numbers = [(one["case"], one["measure"], f"{one['value']:.4g}", one["unit"]) for one in record["quantities"]]
        lines += ["", *_aligned([("case", "measure", "value", "unit"), *numbers])]
    if record["comparisons"]:
        header = ("case", "measure", "ratio", "p10", "p90", "n", "compared with")
        lines += ["", *_aligned([header, *map(_comparison, record["comparisons"])])]
    if record["peers"]:
        lines += ["", *map(_peer, record["peers"])]
    if not record["complete"]:
        lines.append("ended early: the figures are what was measured until then")
    return "\n".join(lines)


def commit(record: dict[str, Any]) -> str:
    return f"{record['commit']} with changes" if record["changed"] else str(record["commit"])


def commits(record: dict[str, Any]) -> str:
    """Of all runs whose figures the record has."""
    return ", ".join(sorted(set(record.get("commits", {}).values()))) or commit(record)


def machine_line(machine: dict[str, Any]) -> str:
    memory = machine["memory_bytes"] / 2**30
    load = machine["load_1_min_at_start"]
    return f"{machine['cores']} cores ({machine['cpu']}), {memory:.0f} GiB, load {load:.1f} at the start"


_HEADER = ("case", "measure", "p50 ms", "p99 ms", "min ms", "n", "first ms", "GB/s", "compared")


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    compared = ""
    if record["ratio"] is not None:
        share = f"{100 * record['ratio']:.3g} % of" if record["gb_per_s"] is not None else f"{record['ratio']:.2f} ×"
        compared = f"{share} {record['against']['measure']}"
    return (
        record["case"],
        record["measure"],
        _number(record["p50_ms"]),
        _number(record["p99_ms"]),
        _number(record["min_ms"]),
        str(record["n"]),
        "" if record["first_ms"] is None else _number(record["first_ms"]),
        "" if record["gb_per_s"] is None else f"{record['gb_per_s']:.2f}",
        compared,
    )


def _comparison(record: dict[str, Any]) -> tuple[str, ...]:
    aim = ""
    if record["met"] is not None:
        bound = f"≥ {record['at_least']:g}" if record["at_least"] is not None else f"≤ {record['at_most']:g}"
        aim = f"; aim {bound}: {'met' if record['met'] else 'not met'}"
    ratios = (f"{record[key]:.3g}" for key in ("median", "p10", "p90"))
    return record["case"], record["measure"], *ratios, str(record["n"]), f"{record['unit']} {record['against']}{aim}"


def _peer(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    told = f"peer {record['peer']}" + (f" ({versions})" if versions else "")
    return told if record["reason"] is None else f"{told}: not measured or not wholly: {record['reason']}"


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def short(value: float) -> str:
    """Three significant digits, never with an exponent."""
    for limit, digits in ((100, 0), (10, 1), (1, 2)):
        if abs(value) >= limit:
            return f"{value:,.{digits}f}"
    return f"{value:.3f}"


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Text to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = {0, 1, len(widths) - 1}
    lines = []
    for row in rows:
        cells = zip(range(len(row)), row, widths, strict=True)
        padded = [cell.ljust(width) if number in left else cell.rjust(width) for number, cell, width in cells]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]
